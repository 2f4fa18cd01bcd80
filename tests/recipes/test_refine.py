"""`fastda simgan refine`: people's own folders, given back as they were but for what R changes."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastda.recipes.common import images
from fastda.recipes.simgan import cli, data, eyes
from fastda.recipes.simgan.train import Trainer, load_refiner, refine
from tests.recipes.common import QUICK_SIMGAN

pytestmark = pytest.mark.isa_independent
RNG = np.random.default_rng(3)


def trained(path, shape=(1, 20, 24), task="class", net="change", **preparation):
    """A checkpoint of a training that has not begun: the net `change` leaves images as they are."""
    x = torch.randint(256, (6, *shape), dtype=torch.uint8)
    domains = data.Domains("x", task, *[data.Images(x)] * 4, preparation=data.Preparation(**preparation))
    Trainer(domains, replace(QUICK_SIMGAN, net=net)).save(path)
    return path


def run(tmp_path, capsys, *more, status=0, **options):
    checkpoint = trained(tmp_path / "checkpoint.safetensors", **options)
    words = ["refine", checkpoint, tmp_path / "in", "--out", tmp_path / "out", *more]
    assert cli.main([str(word) for word in words]) == status
    return capsys.readouterr().err


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def grey(height=20, width=24):
    return RNG.integers(0, 256, (height, width), np.uint8)


def test_depth_alpha_orientation_and_text_come_back(tmp_path, folder, capsys):
    deep = RNG.integers(0, 65536, (20, 24)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    alpha = np.dstack([grey(), grey()])
    Image.fromarray(alpha).save(folder / "alpha.png")
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(grey(24, 20)).save(folder / "turned.png", exif=exif)
    assert run(tmp_path, capsys) == ""
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "out" / "deep.png")), deep)
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "out" / "alpha.png")), alpha)
    turned = images.read(folder / "turned.png").seen
    assert turned.shape == (20, 24)
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "out" / "turned.png")), turned)


def test_a_span_of_depth_is_refined_and_what_lies_beyond_stays(tmp_path, folder, capsys):
    deep = RNG.integers(400, 900, (20, 24)).astype(np.uint16)
    deep[:3], deep[-3:] = 0, 5000
    Image.fromarray(deep).save(folder / "deep.png")
    run(tmp_path, capsys, span=(400, 900), net="small")
    back = np.array(Image.open(tmp_path / "out" / "deep.png"))
    assert back.dtype == np.uint16 and (back[:3] == 0).all() and (back[-3:] == 5000).all()
    assert not np.array_equal(back, deep) and back[3:-3].min() >= 400 and back[3:-3].max() <= 900


def test_16_bits_are_refined_as_finely_as_they_are(tmp_path, folder, capsys):
    ramp = np.arange(480, dtype=np.uint16).reshape(20, 24) + 30_000  # two of 256 greys
    Image.fromarray(ramp).save(folder / "deep.png")
    run(tmp_path, capsys, net="small")
    net, _ = load_refiner(tmp_path / "checkpoint.safetensors")
    expected = refine(net, torch.from_numpy(ramp)[None, None])[0, 0].numpy()
    back = np.array(Image.open(tmp_path / "out" / "deep.png"))
    np.testing.assert_array_equal(back, expected)
    assert len(np.unique(back)) > 30


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.gif", "images of this kind are not read"),
        ("x.jpg", "coloured, but the refiner was trained on grey images; --no-colour"),
        ("y.png", "24×21, but the refiner was trained on 24×20; --resize"),
        ("z.tif", "pixels of the kind CMYK"),
    ],
)
def test_what_cannot_be_refined_is_named_before_anything_is_written(tmp_path, folder, capsys, name, message):
    Image.fromarray(grey()).save(folder / "a.png")
    pixels = Image.fromarray(grey(21, 24)) if name == "y.png" else Image.fromarray(grey())
    if name == "x.jpg":
        pixels = Image.fromarray(RNG.integers(0, 256, (20, 24, 3), np.uint8))
    if name == "z.tif":
        pixels = pixels.convert("CMYK")
    pixels.save(folder / name)
    err = run(tmp_path, capsys, status=2)
    assert f"{folder / name}: " in err and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_colours_turn_grey_where_told_and_stay_where_learned(tmp_path, folder, capsys):
    colour = RNG.integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(colour).save(folder / "x.png")
    run(tmp_path, capsys, "--no-colour")
    back = np.array(Image.open(tmp_path / "out" / "x.png"))
    np.testing.assert_array_equal(images.greyed(back), images.greyed(colour))
    run(tmp_path, capsys, "--overwrite", shape=(3, 20, 24))
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "out" / "x.png")), colour)


def test_resizing_writes_its_transform_and_keeps_proportions(tmp_path, folder, capsys):
    y, x = np.mgrid[:60, :100]
    Image.fromarray(((x - 50) ** 2 + (y - 30) ** 2 < 400).astype(np.uint8) * 255).save(folder / "disc.png")
    Image.fromarray(grey()).save(folder / "same.png")
    (folder / "labels.csv").write_text("file,x,y\ndisc.png,50,30\n")
    run(tmp_path, capsys, "--resize")
    rows = {row["file"]: row for row in csv.DictReader((tmp_path / "out" / "transforms.csv").open())}
    assert rows.keys() == {"disc.png", "same.png"}
    moved = {key: float(value) for key, value in rows["disc.png"].items() if key != "file"}
    disc = np.array(Image.open(tmp_path / "out" / "disc.png")) > 127
    v, u = np.nonzero(disc)
    at = [moved["scale"] * (50.5 - moved["left"]) - 0.5, moved["scale"] * (30.5 - moved["top"]) - 0.5]
    assert abs(u.mean() - at[0]) < 0.3 and abs(v.mean() - at[1]) < 0.3
    assert abs(np.ptp(u) - np.ptp(v)) <= 1  # still round
    assert np.ptp(v) + 1 == pytest.approx(39 * moved["scale"], abs=1)
    assert [float(rows["same.png"][key]) for key in ("scale", "left", "top")] == [1, 0, 0]
    assert (tmp_path / "out" / "labels.csv").read_text() == (folder / "labels.csv").read_text()


def test_unityeyes_are_cut_as_in_training_and_their_labels_can_be_read_again(tmp_path, folder, capsys):
    for i in range(2):
        Image.fromarray(RNG.integers(0, 256, (300, 400, 3), np.uint8)).save(folder / f"{i}.png")
        points = [f"({x}.5, {y}.0, 9.5)" for x, y in ((120, 140), (200, 160), (200, 120), (280 - i, 130))]
        label = {
            "interior_margin_2d": points, "caruncle_2d": points[:1], "iris_2d": ["(200.0, 141.0, 9.0)"],
            "eye_details": {"look_vec": "(0.1000, -0.2000, -0.9700, 0.0000)"}, "head_pose": "(0, 0, 0)",
        }  # fmt: skip
        (folder / f"{i}.json").write_text(json.dumps(label))
    run(tmp_path, capsys, "--resize", shape=(1, 35, 55), task="gaze", net="small")
    before, gazes = eyes.read_labelled(folder)
    after, moved_gazes = eyes.read_labelled(tmp_path / "out")
    net, _ = load_refiner(tmp_path / "checkpoint.safetensors")
    assert torch.equal(moved_gazes, gazes)
    assert (after.int() - refine(net, before, "gaze").int()).abs().max() <= 1  # equalised once more
    moved = json.loads((tmp_path / "out" / "0.json").read_text())
    assert moved["head_pose"] == "(0, 0, 0)" and moved["eye_details"] == label["eye_details"]
    (row, _) = csv.DictReader((tmp_path / "out" / "transforms.csv").open())
    x, y, z = eyes._numbers(moved["iris_2d"][0])
    scale, left, top = (float(row[key]) for key in ("scale", "left", "top"))
    assert (x, 35 - y, z) == pytest.approx((scale * (200 - left), scale * (300 - 141 - top), 9.0), abs=2e-3)
    (folder / "1.json").unlink()
    err = run(tmp_path, capsys, "--resize", "--overwrite", shape=(1, 35, 55), task="gaze", status=2)
    assert "1.png: not labelled: there is no 1.json" in err


def test_a_folder_that_holds_something_is_not_written_to_unless_told(tmp_path, folder, capsys):
    Image.fromarray(grey()).save(folder / "x.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "is not empty (mine.txt); --overwrite" in run(tmp_path, capsys, status=2)
    run(tmp_path, capsys, "--overwrite")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["mine.txt", "x.png"]
