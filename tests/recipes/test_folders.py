"""Folders as people have them, and files that are damaged: right, or refused by a name that can be found."""

import json
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastda.recipes.common import folders, images
from fastda.recipes.common.folders import DataError
from fastda.recipes.common.mnist import mnist
from fastda.recipes.dann import data as dann
from fastda.recipes.simgan import data, digits, eyes
from tests.recipes.common import write_image as write
from tests.recipes.common import write_mnist

pytestmark = pytest.mark.isa_independent
JUNK = (
    "._0.png", ".hidden.png", ".ipynb_checkpoints/0-checkpoint.png", ".git/objects/x.png", "__MACOSX/0.png",
    "Thumbs.db", ".DS_Store", "desktop.ini", "@eaDir/0.png", "$RECYCLE.BIN/0.png",
)  # fmt: skip


def tree(folder, classes=("a", "b"), count=5):
    for c, name in enumerate(classes):
        for i in range(count):
            path = folder / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((20, 20), 50 * c + i, np.uint8)).save(path)
    return folder


def both(folder, other):
    """What both commands make of two class folders: their classes and all pixels."""
    pair = dann.folders(folder, other, 16)
    domains = data.folders(folder, other)
    assert pair.classes == domains.classes
    shown = [torch.cat([pair.source_train.x, pair.source_test.x])]
    shown += [torch.cat([domains.synthetic.x, domains.synthetic_test.x])]
    return pair.classes, [x.flatten(1).double().mean(1).sort().values for x in shown]


def refusals(folder, other):
    """What both commands say of two class folders."""
    said = []
    for read in (lambda: dann.folders(folder, other, 16), lambda: data.folders(folder, other)):
        with pytest.raises(DataError) as raised:
            read()
        assert "\n" not in str(raised.value)
        said.append(str(raised.value))
    return said


@pytest.mark.parametrize("place", ["", "a/", "a/deeper/"])
def test_hidden_files_and_the_systems_play_no_part(tmp_path, place):
    other, folder = tree(tmp_path / "other"), tree(tmp_path / "folder")
    before = both(folder, other)
    for name in JUNK:
        path = folder / (place + name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((folder / "b" / "1.png").read_bytes())
    classes, shown = both(folder, other)
    assert classes == before[0]
    assert all(torch.equal(x, y) for x, y in zip(shown, before[1], strict=True))
    assert len(folders.files(folder)) == 10 and len(folders.image_files(folder)) == 10


def test_links_to_folders_are_followed_and_end(tmp_path):
    other, folder = tree(tmp_path / "other"), tree(tmp_path / "folder", ("a",))
    elsewhere = tree(tmp_path / "elsewhere", ("b",))
    (folder / "b").symlink_to(elsewhere / "b", target_is_directory=True)
    (folder / "b" / "round").symlink_to(folder, target_is_directory=True)  # a folder within itself
    found = folders.class_folders(folder)
    assert {name: len(set(map(os.path.realpath, paths))) for name, paths in found.items()}["a"] == 5
    (elsewhere / "b" / "round").unlink()
    assert both(folder, other)[0] == ("a", "b")
    (folder / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert all(str(folder / "a" / "gone.png") in said for said in refusals(folder, other))


def _empty(folder):
    (folder / "c").mkdir()
    return folder / "c", "holds no images"


def _only_a_table(folder):
    (folder / "c").mkdir()
    (folder / "c" / "labels.csv").write_text("file,label\n")
    return folder / "c", "but files of other kinds (.csv)"


def _stray(folder):
    write(folder / "stray.png", 20, 20)
    return folder / "stray.png", "beside class folders"


def _of_a_kind_that_is_not_read(folder):
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(folder / "a" / "x.gif")
    return folder / "a" / "x.gif", "images of this kind are not read"


def _film(folder):
    (folder / "b" / "x.exr").write_bytes(b"v/1\x01")
    return folder / "b" / "x.exr", "images of this kind are not read"


def _not_an_image(folder):
    (folder / "a" / "x.png").write_text("not an image")
    return folder / "a" / "x.png", "not an image"


def _alike(folder):
    for form in ("NFC", "NFD"):
        tree(folder, (unicodedata.normalize(form, "é"),))
    return folder, "two folders that look alike, 'e\\u0301' and '\\xe9'"


@pytest.mark.parametrize(
    "change", [_empty, _only_a_table, _stray, _of_a_kind_that_is_not_read, _film, _not_an_image, _alike]
)
def test_what_is_wrong_in_a_folder_is_said_by_name(tmp_path, change):
    other, folder = tree(tmp_path / "other"), tree(tmp_path / "folder")
    path, message = change(folder)
    for said in refusals(folder, other):
        assert said.startswith(f"{path}: ") and message in said


def test_accents_are_compared_as_they_are_seen(tmp_path):
    forms = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    trees = [tree(tmp_path / form, ("a", name)) for form, name in zip("cd", forms, strict=True)]
    assert both(*trees)[0] == ("a", "é")


def test_one_class_is_none(tmp_path):
    folder = tree(tmp_path / "folder", ("a",))
    assert all(str(folder) in said for said in refusals(folder, folder))


def test_colours_are_kept_where_both_folders_have_them_and_asked_for_where_one_has(tmp_path):
    grey, colour = tree(tmp_path / "grey"), tree(tmp_path / "colour")
    for path in (colour / "b").iterdir():
        write(path, 20, 20, "RGB")
    assert data.folders(grey, grey).synthetic.x.shape[1] == 1
    assert data.folders(colour, colour).synthetic.x.shape[1] == 3
    for pair in ((grey, colour), (colour, grey)):
        with pytest.raises(DataError, match=re.escape(f"{colour / 'b' / '0.png'}: coloured, but {grey}")):
            data.folders(*pair)
        for asked in (True, False):
            made = data.folders(*pair, data.Preparation(colour=asked))
            assert made.synthetic.x.shape[1] == made.real.x.shape[1] == (3 if asked else 1)
            assert made.preparation.colour is asked


def test_depth_in_16_bits_needs_to_be_told_its_span(tmp_path):
    values = np.random.default_rng(0).integers(400, 900, (6, 20, 20)).astype(np.uint16)
    for i, image in enumerate(values):
        for name in ("synthetic", "real"):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
    with pytest.raises(DataError, match=r"nearly black, none reaches above 899 of 65535; --span"):
        data.folders(tmp_path / "synthetic", tmp_path / "real")
    preparation = data.Preparation(span=(400, 900))
    x = data.folders(tmp_path / "synthetic", tmp_path / "real", preparation).synthetic.x
    assert x.float().std() > 60 and x.min() < 5 and x.max() > 250
    spread = preparation.spread(values[0])
    assert np.abs(preparation.unspread(spread, values[0]).astype(int) - values[0]).max() <= 1
    beyond = np.array([[0, 65535]], np.uint16)
    np.testing.assert_array_equal(preparation.unspread(preparation.spread(beyond), beyond), beyond)


# ---------------------------------------------------------------------------------------------------- damage


def _png(folder):
    write(folder / "0.png", 20, 20)
    write(folder / "x.png", 20, 20, "RGBA")
    return folder / "x.png", lambda: [images.open_image(p) for p in folders.image_files(folder)]


def _jpeg(folder):
    exif = Image.Exif()
    exif[274] = 6
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)).save(
        folder / "x.jpg", exif=exif
    )
    return folder / "x.jpg", lambda: images.open_image(folder / "x.jpg")


def _tiff(folder):
    folder.mkdir()
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20)).save(
        folder / "x.tif", compression="tiff_lzw"
    )
    return folder / "x.tif", lambda: images.open_image(folder / "x.tif")


def _label(folder):
    points = [f"({x}.0, {y}.0, 9.5)" for x, y in ((120, 140), (200, 160), (200, 120), (280, 130))]
    label = {"interior_margin_2d": points, "eye_details": {"look_vec": "(0.1000, -0.2000, -0.9700, 0.0000)"}}
    for name in "ax":
        write(folder / f"{name}.jpg", 300, 400)
        (folder / f"{name}.json").write_text(json.dumps(label))
    return folder / "x.json", lambda: eyes.read_labelled(folder)


def _recording(folder):
    from scipy.io import savemat

    folder.mkdir()
    rng = np.random.default_rng(0)
    sides = {
        side: {
            "image": rng.integers(0, 255, (3, 36, 60), np.uint8),
            "gaze": np.tile([0.0, 0.6, -0.8], (3, 1)),
        }
        for side in ("left", "right")
    }
    savemat(folder / "day01.mat", {"data": sides})
    return folder / "day01.mat", lambda: eyes.read_real(folder)


def _digits(folder):
    write_mnist(folder, ".gz")
    return folder / "train-images-idx3-ubyte.gz", lambda: mnist(folder)


def _font(folder):
    folder.mkdir()
    source = digits.font_files()[0].read_bytes()
    (folder / "x.ttf").write_bytes(source[:60_000])

    def read():
        digits._glyphs.cache_clear()
        digits.font_digits(torch.arange(3), torch.Generator(), folder)

    return folder / "x.ttf", read


def damaged(content, rng):
    """Cut off, with bytes turned, zeros, parts doubled or lost, a tail."""
    some = bytearray(content)
    kind = rng.integers(7)
    at, to = sorted(rng.integers(0, len(some) + 1, 2))
    if kind == 0:
        return bytes(some[:at])
    if kind == 1:
        for place in rng.integers(0, len(some), rng.integers(1, 20)):
            some[place] ^= 1 << rng.integers(8)
        return bytes(some)
    if kind == 2:
        some[: min(60, at)] = rng.bytes(min(60, at))  # the header
        return bytes(some)
    if kind == 3:
        return bytes(len(some))
    if kind == 4:
        return bytes(some[:at] + some[to:])
    if kind == 5:
        return bytes(some[:to] + some[at:])
    return bytes(some) + rng.bytes(50)


@pytest.mark.parametrize("kind", [_png, _jpeg, _tiff, _label, _recording, _digits, _font])
def test_damaged_files_are_read_or_named(tmp_path, kind):
    path, read = kind(tmp_path / "files")
    whole = path.read_bytes()
    if kind is not _font:
        read()
    rng = np.random.default_rng(7)
    refused = 0
    for _ in range(40 if kind not in (_font, _recording) else 12):
        path.write_bytes(damaged(whole, rng))
        try:
            read()
        except DataError as error:
            refused += 1
            assert str(path.with_suffix("")) in str(error) and "\n" not in str(error), str(error)
    assert refused >= 5


ODD_LOOKS = [
    "(0,1, -0,2, -0,9, 0,0)", "(nan, 0, -1)", "(0, 0, 0)", "(inf, 0, -1, 0)", "(1, 2)", "", "()",
    "0.1 0.2 -0.9",
    [0.1, -0.2, -0.97], None, 3, {"x": 1}, "(a, b, c)", "(1, 2, 3, 4, 5)", True,
]  # fmt: skip


@pytest.mark.parametrize("look", ODD_LOOKS, ids=repr)
def test_odd_directions_are_refused_by_the_labels_name(tmp_path, look):
    path, read = _label(tmp_path / "files")
    label = json.loads(path.read_text())
    label["eye_details"]["look_vec"] = look
    path.write_text(json.dumps(label))
    with pytest.raises(DataError, match=re.escape(str(path))):
        read()


@pytest.mark.parametrize(
    "points",
    [[], None, "(1, 2, 3)", ["(1, 2, 3)"], ["(1, 2, 3)"] * 4, [[1, 2, 3]] * 4, ["(nan, 1, 2)"] * 4, 7],
)
def test_odd_margins_are_refused_by_the_labels_name(tmp_path, points):
    path, read = _label(tmp_path / "files")
    label = json.loads(path.read_text())
    label["interior_margin_2d"] = points
    path.write_text(json.dumps(label))
    with pytest.raises(DataError, match=re.escape(str(path.with_suffix("")))):
        read()
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match=re.escape(str(path))):
        read()


def recorded(path, **sides):
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    eye = {"image": np.full((3, 36, 60), 9, np.uint8), "gaze": np.tile([0.0, 0.6, -0.8], (3, 1))}
    savemat(path, {"data": {side: {**eye, **sides.get(side, {})} for side in ("left", "right")}})


NOTHING = {"image": np.zeros((0, 36, 60), np.uint8), "gaze": np.zeros((0, 3))}
ONE = {"image": np.full((1, 36, 60), 9, np.uint8), "gaze": np.array([[0.0, 0.6, -0.8]])}


def test_days_may_lack_the_eyes_of_a_side_or_have_one(tmp_path):
    recorded(tmp_path / "p" / "day01.mat", left=NOTHING)
    recorded(tmp_path / "p" / "day02.mat", right=ONE)
    (x, gaze), groups = eyes.read_real(tmp_path)
    assert groups.tolist() == [0] * 3 + [1] * 4 and len(x) == len(gaze) == 7


@pytest.mark.parametrize(
    ("side", "message"),
    [
        ({"gaze": np.zeros((3, 3))}, "gaze 1 of its 3 left eyes has no direction"),
        ({"gaze": np.array([[0, 0, -1], [0, np.nan, -1], [0, 0, -1.0]])}, "gaze 2 of its 3 left eyes"),
        ({"gaze": np.zeros((2, 3))}, "got for the left eyes uint8"),
        ({"gaze": np.array(["a", "b", "c"])}, "got for the left eyes uint8"),
        ({"image": np.zeros((3, 60, 36), np.uint8)}, "got for the left eyes uint8"),
        ({"image": np.zeros((3, 36, 60))}, "got for the left eyes float64"),
        ({"image": np.zeros((0, 0))}, "got for the left eyes"),
    ],
)
def test_odd_recordings_are_refused_by_name(tmp_path, side, message):
    recorded(tmp_path / "day01.mat", left=side)
    with pytest.raises(DataError, match=message) as raised:
        eyes.read_real(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path / 'day01.mat'}: ")


@pytest.mark.parametrize(
    "content", [b"", bytes(3), bytes(300), b"MATLAB 5.0 MAT-file" * 10, b"\x89HDF\r\n\x1a\n" * 9]
)
def test_files_that_are_no_recordings_are_refused_by_name(tmp_path, content):
    (tmp_path / "day01.mat").write_bytes(content)
    with pytest.raises(
        DataError, match=re.escape(f"{tmp_path / 'day01.mat'}: not a normalised MPIIGaze file")
    ):
        eyes.read_real(tmp_path)


def test_a_single_labelled_eye_is_too_few(tmp_path):
    write(Path(tmp_path / "f01_122_-0.3927_0.1963.png"), 80, 120)
    with pytest.raises(DataError, match="at least two labelled eyes"):
        eyes.read_labelled(tmp_path)
