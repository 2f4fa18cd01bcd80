"""`fastda dann`: its data, and what it says of data that it cannot use."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastda.recipes.dann import cli, data
from tests.recipes.common import CLASSES, shapes, write_idx, write_mnist, write_tree

pytestmark = pytest.mark.isa_independent


@pytest.fixture(scope="module")
def mnistm():
    return data.mnist_to_mnistm()


def test_blend_is_the_absolute_difference():
    digits, patches = (torch.randint(256, s, dtype=torch.uint8) for s in ((5, 28, 28), (5, 3, 28, 28)))
    expected = (digits.double()[:, None] - patches.double()).abs()
    assert torch.equal(data.blend(digits, patches).double(), expected)


def test_patches_are_crops_of_every_photo_and_reach_its_edges():
    photos = [torch.arange(30 * 31).reshape(30, 31, 1).expand(-1, -1, 3) % 251 + i for i in (0, 3)]
    photos = [p.to(torch.uint8) for p in photos]
    patches = data.random_patches(photos, 400, 28, torch.Generator().manual_seed(0))
    crops = {
        (i, top, left): p[top : top + 28, left : left + 28].permute(2, 0, 1)
        for i, p in enumerate(photos) for top in range(3) for left in range(4)
    }  # fmt: skip
    seen = {key for patch in patches for key, crop in crops.items() if torch.equal(patch, crop)}
    assert seen == crops.keys()
    assert all(any(torch.equal(patch, crop) for crop in crops.values()) for patch in patches)


def test_mnistm_shares_neither_digits_nor_photos_between_training_and_test(mnistm):
    pair = mnistm
    assert (len(pair.source_train), len(pair.source_test)) == (4000, 1000)
    assert set(data.TRAIN_PHOTOS).isdisjoint(data.TEST_PHOTOS)
    flat = {x.numpy().tobytes() for x in pair.source_train.x}
    assert not any(x.numpy().tobytes() in flat for x in pair.source_test.x)
    assert torch.equal(pair.target_test.y.bincount(), torch.full((10,), 100))
    again = data.mnist_to_mnistm()
    assert torch.equal(pair.target_train.x, again.target_train.x)
    assert torch.equal(pair.target_test.x, again.target_test.x)
    redrawn = pair.redraw(torch.Generator().manual_seed(1))
    assert redrawn.shape == pair.target_train.x.shape
    assert not torch.equal(redrawn, pair.target_train.x)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_and_photos_of_ones_own(tmp_path, suffix):
    for i in range(6):
        Image.new("RGB", (40, 50), (i, 0, 0)).save(tmp_path / f"{i}.png")
    pair = data.mnist_to_mnistm(write_mnist(tmp_path / "mnist", suffix), tmp_path)
    assert (len(pair.source_train), len(pair.target_test)) == (40, 20)
    assert pair.source_train.y.tolist() == [i % 10 for i in range(40)]
    train_photos, test_photos = data.photos(tmp_path)
    assert [int(p[0, 0, 0]) for p in train_photos] == [0, 1, 2, 3, 5]
    assert [int(p[0, 0, 0]) for p in test_photos] == [4]


def test_small_digits_are_enlarged_into_mnists_frame():
    pair = data.digits_to_mnist()
    assert pair.source_train.x.shape[1:] == pair.target_train.x.shape[1:] == (3, 28, 28)
    assert not pair.source_train.x[:, :, :4].any() and not pair.source_train.x[..., -4:].any()
    assert len(pair.source_train) + len(pair.source_test) == 1797


def test_folders_hold_out_some_of_every_class(trees):
    pair = data.folders(*trees, size=16)
    assert pair.classes == CLASSES
    for part in (pair.source_test, pair.target_test):
        assert part.y.bincount().tolist() == [5, 5, 5]
    assert len(pair.target_train) + len(pair.target_test) == 72


def _tree_without_images(root):
    (root / "s").mkdir()
    return ["--source", root / "s", "--target", root / "s"], f"{root / 's'}: holds no images"


def _no_such_folder(root):
    return ["--source", root / "none", "--target", root], f"{root / 'none'}: no such folder"


def _empty_class(root):
    tree = write_tree(root / "s", shapes(3, 0))
    (tree / "zebra").mkdir()
    return ["--source", tree, "--target", tree], f"{tree / 'zebra'}: holds no images"


def _other_classes(root):
    source, target = write_tree(root / "s", shapes(3, 0)), write_tree(root / "t", shapes(3, 0))
    (target / "box").rename(target / "ball")
    return [
        "--source",
        source,
        "--target",
        target,
    ], "only in s: ['box'], only in t: ['ball']"


def _not_an_image(root):
    tree = write_tree(root / "s", shapes(3, 0))
    (tree / "box" / "notes.png").write_text("not an image")
    return ["--source", tree, "--target", tree], f"{tree / 'box' / 'notes.png'}: not an image"


def _truncated_image(root):
    tree = write_tree(root / "s", shapes(3, 0))
    path = next((tree / "bar").iterdir())
    path.write_bytes(path.read_bytes()[:60])
    return ["--source", tree, "--target", tree], f"{path}: not an image"


def _too_small(root):
    tree = write_tree(root / "s", shapes(20, 0))
    return ["--source", tree, "--target", tree, "--size", 8, "--batch", 8], "8x8 are too small"


def _batch_exceeds_domain(root):
    tree = write_tree(root / "s", shapes(3, 0))
    return ["--source", tree, "--target", tree], "batch: half of 128 exceeds a domain of"


def _odd_batch(root):
    return ["--mnist", write_mnist(root / "m"), "--batch", 7], "batch must be even"


def _missing_idx(root):
    (write_mnist(root / "m") / "t10k-labels-idx1-ubyte").unlink()
    return ["--mnist", root / "m"], f"{root / 'm'}: holds neither t10k-labels-idx1-ubyte nor"


def _short_idx(root):
    path = write_mnist(root / "m") / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    return ["--mnist", root / "m"], f"{path}: its header promises (40, 28, 28), but 984 bytes follow"


def _text_for_idx(root):
    path = write_mnist(root / "m") / "train-labels-idx1-ubyte"
    path.write_text("seven")
    return ["--mnist", root / "m"], f"{path}: not an IDX file"


def _cut_gzip(root):
    path = write_mnist(root / "m", ".gz") / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:200])
    return ["--mnist", root / "m"], f"{path}: not a file that can be read"


def _unequal_idx(root):
    path = write_mnist(root / "m") / "train-labels-idx1-ubyte"
    write_idx(path, np.zeros(39, np.uint8))
    return ["--mnist", root / "m"], f"{path}: 39 labels for the 40 images"


def _no_photos(root):
    (root / "p").mkdir()
    return [
        "--mnist",
        write_mnist(root / "m"),
        "--photos",
        root / "p",
    ], f"{root / 'p'}: holds no images"


def _small_photo(root):
    (root / "p").mkdir()
    for i in range(2):
        Image.new("RGB", (20 + 20 * i, 50)).save(root / "p" / f"{i}.png")
    return [
        "--mnist",
        write_mnist(root / "m"),
        "--photos",
        root / "p",
    ], "0.png: smaller than a 28x28 patch (20x50)"


@pytest.mark.parametrize(
    "case",
    [_tree_without_images, _no_such_folder, _empty_class, _other_classes, _not_an_image, _truncated_image,
     _too_small, _batch_exceeds_domain, _odd_batch, _missing_idx, _short_idx, _text_for_idx, _cut_gzip,
     _unequal_idx, _no_photos, _small_photo],
)  # fmt: skip
def test_bad_data_is_one_clear_error(tmp_path, capsys, case):
    argv, expected = case(tmp_path)
    status = cli.main([str(a) for a in (*argv, "--jobs", 1, "--out", tmp_path / "out")])
    err = capsys.readouterr().err
    assert status == 2
    assert expected in err and err.startswith("fastda dann: ")
    assert "Traceback" not in err


def test_source_and_target_go_together(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--source", "somewhere"])
    assert "--source and --target go together" in capsys.readouterr().err
