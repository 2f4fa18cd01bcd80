"""The DANN example: its data, that it never sees target labels, checkpoints, processes, errors, report."""

import gzip
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.common.checkpoint import CheckpointError, digest
from examples.dann import cli, data, sda
from examples.dann.data import Images, Pair
from examples.dann.models import SOURCE, TARGET, DomainBatchNorm, DomainNet, WeightRelation
from examples.dann.train import Settings, Trainer, information, train, vary_strokes, warp

pytestmark = pytest.mark.isa_independent

ROOT = Path(__file__).parents[1]
CLASSES = ("bar", "box", "cross")
QUICK = Settings(epochs=2, batch=16, lr=0.05, average=0.9, batch_norm=True)


@pytest.fixture(scope="module")
def mnistm():
    return data.mnist_to_mnistm()


def shapes(count, seed, inverted=False):
    """`count` images 16x16 of each class, at random places, coloured on black or inverted on noise."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.zeros(3 * count, 3, 16, 16), torch.arange(3).repeat_interleave(count)
    for image, label in zip(x, y.tolist(), strict=True):
        top, left = torch.randint(0, 7, (2,), generator=g).tolist()
        colour = 120 + 120 * torch.rand(3, 1, 1, generator=g)
        image[:, top + 3 : top + 6, left : left + 9] = colour
        if CLASSES[label] != "bar":
            image[:, top : top + 9, left + 3 : left + 6] = colour
        if CLASSES[label] == "box":
            image[:, top : top + 9, left : left + 9] = colour
    if inverted:
        x = (200 - x + 30 * torch.randn(x.shape, generator=g)).clamp(0, 255)
    return Images(x.to(torch.uint8), y)


def shapes_pair():
    return Pair("shapes", CLASSES, shapes(24, 0), shapes(8, 1), shapes(24, 2, True), shapes(8, 3, True))


@pytest.fixture(scope="module")
def pair():
    return shapes_pair()


def write_tree(folder, images):
    for i, (x, label) in enumerate(zip(images.x, images.y.tolist(), strict=True)):
        path = folder / CLASSES[label] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(path)
    return folder


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """A source and a target tree, as users have them."""
    root = tmp_path_factory.mktemp("trees")
    return write_tree(root / "source", shapes(24, 0)), write_tree(root / "target", shapes(24, 2, True))


# ---------------------------------------------------------------------------------------------------- data


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


def write_idx(path, values):
    content = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder, suffix=""):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        images, labels = (
            rng.integers(0, 256, (count, 28, 28), np.uint8),
            np.arange(count, dtype=np.uint8) % 10,
        )
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels)
    return folder


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


# ---------------------------------------------------------------------------------------------------- errors


def _tree_without_images(root):
    (root / "s").mkdir()
    return ["--source", root / "s", "--target", root / "s"], f"{root / 's'}: empty"


def _no_such_folder(root):
    return ["--source", root / "none", "--target", root], f"{root / 'none'}: no such folder"


def _empty_class(root):
    tree = write_tree(root / "s", shapes(3, 0))
    (tree / "zebra").mkdir()
    return ["--source", tree, "--target", tree], f"{tree / 'zebra'}: needs at least two images"


def _other_classes(root):
    source, target = write_tree(root / "s", shapes(3, 0)), write_tree(root / "t", shapes(3, 0))
    (target / "box").rename(target / "ball")
    return [
        "--source",
        source,
        "--target",
        target,
    ], "only in the source: ['box'], only in the target: ['ball']"


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
    return ["--mnist", root / "m"], f"{path}: cannot be read"


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
    ], f"{root / 'p'}: needs at least two photos"


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
    assert expected in err and err.startswith("examples.dann: ")
    assert "Traceback" not in err


def test_source_and_target_go_together(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--source", "somewhere"])
    assert "--source and --target go together" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- the net


def test_domain_batch_norm_is_batch_norm_of_each_domain():
    ours, theirs = DomainBatchNorm(4), [torch.nn.BatchNorm2d(4) for _ in range(2)]
    for _ in range(3):
        for domain in (SOURCE, TARGET):
            x = torch.randn(6, 4, 5, 5) * (1 + domain) + domain
            torch.testing.assert_close(ours(x, domain), theirs[domain](x))
    ours.eval()
    x = torch.randn(6, 4, 5, 5)
    for domain in (SOURCE, TARGET):
        torch.testing.assert_close(ours(x, domain), theirs[domain].eval()(x))


def test_related_weights_penalty_is_zero_for_equal_streams_and_the_formula_otherwise():
    net = DomainNet(3, 16, streams=2)
    assert net.relation(*net.features).item() == 0
    with torch.no_grad():
        net.relation.a.copy_(torch.rand(4))
        net.relation.b.copy_(torch.rand(4))
        for p in net.features[1].parameters():
            p.add_(torch.randn_like(p))
    expected = 0.0
    for i, (s, t) in enumerate(zip(net.features[0].parameters(), net.features[1].parameters(), strict=True)):
        a, b = 1 + net.relation.a[i] / s.numel() ** 0.5, net.relation.b[i] / s.numel() ** 0.5
        expected += (a * s + b - t).double().square().sum()
    torch.testing.assert_close(net.relation(*net.features).double(), expected)
    assert isinstance(net.relation, WeightRelation)


def test_features_get_the_reversed_gradient_and_the_domain_classifier_the_plain_one():
    net = DomainNet(3, 16, ceiling=2.0, reversal_steps=1)
    net.reverse.step()
    features = torch.randn(4, 48, requires_grad=True)
    net.domain_logits(features).sum().backward()
    reversed_, of_classifier = features.grad.clone(), net.domain[0].weight.grad.clone()
    net.zero_grad()
    features.grad = None
    net.domain(features).sum().backward()
    torch.testing.assert_close(reversed_, -float(net.reverse.scale) * features.grad)
    torch.testing.assert_close(of_classifier, net.domain[0].weight.grad)
    assert float(net.reverse.scale) == pytest.approx(2 * (2 / (1 + np.exp(-10)) - 1))


# ---------------------------------------------------------------------------------------------- the training


def weights(result):
    return digest(dict(result.net.state_dict()))


@pytest.mark.parametrize("method", ["source", "dann", "related"])
def test_target_labels_play_no_part(pair, method):
    """With wrong target labels, and early stopping, the weights and the criterion stay the same bits."""
    settings = replace(QUICK, method=method, epochs=3, patience=1, augment=True, information=1.0)
    wrong = replace(
        pair,
        target_train=Images(pair.target_train.x, pair.target_train.y.flip(0)),
        target_test=Images(pair.target_test.x.flip(0), pair.target_test.y),
    )
    true, false = train(pair, settings), train(wrong, settings)
    assert weights(true) == weights(false)
    assert [row["criterion"] for row in true.history] == [row["criterion"] for row in false.history]
    assert true.accuracy != false.accuracy or true.history != false.history


def test_information_is_the_mutual_information_of_image_and_prediction():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    p = logits.detach().softmax(1)
    expected = sum((q * (q / p.mean(0)).log()).sum() for q in p) / len(p)
    torch.testing.assert_close(information(logits).detach(), expected)
    assert torch.autograd.gradcheck(information, logits)
    certain = 1000 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(information(certain), torch.tensor(4.0, dtype=torch.float64).log())
    assert information(certain[:1].expand(5, -1)).item() == 0


def test_warp_keeps_an_image_within_its_bounds_and_moves_each_differently():
    x = torch.zeros(200, 1, 28, 28)
    x[:, :, 13:15, 13:15] = 255  # the middle
    y = warp(x, torch.Generator().manual_seed(0))
    place = torch.arange(28.0) - 13.5
    mass = y.sum((1, 2, 3))
    centre = torch.stack([(y.sum((1, 2)) * place).sum(1), (y.sum((1, 3)) * place).sum(1)]) / mass
    assert centre.abs().max() < 2 * 1.22 * 1.45 and centre.std(1).min() > 0.8
    assert (mass / mass.median()).log().abs().max() < 0.8
    x[:] = torch.randint(256, (28, 28)).float()
    y = warp(x, torch.Generator().manual_seed(1))
    assert y.min() >= 0 and y.max() <= 255
    assert len({image.numpy().tobytes() for image in y}) == 200


def test_strokes_vary_between_erosion_and_dilation():
    x = torch.zeros(400, 1, 9, 9, dtype=torch.uint8)
    x[:, :, :, 3:6] = 200  # a stroke three pixels wide: one when eroded, five when dilated
    width = vary_strokes(x, torch.Generator().manual_seed(0))[:, 0, 4].sum(1) / 200
    assert width.min() >= 1 and width.max() <= 5
    assert width.min() < 1.1 and width.max() > 4.9 and abs(width.mean() - 3) < 0.25


def test_relation_is_stable_at_the_default_rate_and_momentum():
    """Gradient descent on the relation alone, from the weights that the digit net starts from."""
    net = DomainNet(10, 28, streams=2, batch_norm=True)
    with torch.no_grad():
        for p in net.features[1].parameters():
            p.add_(0.1 * torch.randn_like(p))
    settings = cli.PRESETS["tuned"]
    sgd = torch.optim.SGD(net.relation.parameters(), lr=settings.lr, momentum=settings.momentum)
    values = []
    for _ in range(60):
        sgd.zero_grad()
        loss = settings.relation * net.relation(*net.features)
        loss.backward()
        sgd.step()
        values.append(loss.item())
    assert max(values) == values[0] and values[-1] < values[0]


@pytest.mark.parametrize("method", ["dann", "related", "target"])
def test_training_learns(pair, method):
    history = train(pair, replace(QUICK, method=method, epochs=12)).history
    assert history[-1]["label_loss"] < 0.5 * history[0]["label_loss"]
    # On the domain whose labels it saw; chance is 1/3.
    assert history[-1]["target_accuracy" if method == "target" else "source_accuracy"] > 0.6


def test_fused_and_reference_ops_learn_alike(pair):
    fused = train(pair, QUICK)
    plain = train(pair, replace(QUICK, backend="reference"))
    for (name, a), b in zip(fused.net.state_dict().items(), plain.net.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("change", [{"amp": True}, {"invert": True}, {"randomise": True}, {"augment": True},
                                    {"information": 1.0}, {"normalisation": "domain"},
                                    {"normalisation": "none"}])  # fmt: skip
def test_options_change_the_training_and_stay_finite(pair, change):
    plain, other = train(pair, QUICK), train(pair, replace(QUICK, **change))
    assert weights(plain) != weights(other)
    assert all(torch.isfinite(p).all() for p in other.net.state_dict().values())


def test_stops_early_at_the_best_criterion(pair):
    result = train(pair, replace(QUICK, epochs=40, patience=2))
    criterion = [row["criterion"] for row in result.history]
    assert len(criterion) < 40
    assert criterion.index(max(criterion)) == len(criterion) - 3


def test_denoising_layer_is_the_least_squares_solution_over_maskings():
    """Against the normal equations of very many masked copies, drawn; and no better one is near."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(40, 6, generator=g).double() @ torch.rand(6, 6, generator=g).double()
    ours = sda.denoising_layer(x, 0.4)
    clean = x.repeat(20_000, 1)
    noisy = clean * (torch.rand(clean.shape, generator=g) >= 0.4)
    noisy = torch.cat([noisy, torch.ones(len(noisy), 1, dtype=torch.float64)], 1)
    drawn = torch.linalg.solve(noisy.T @ noisy, noisy.T @ clean).T
    torch.testing.assert_close(ours, drawn, atol=0.01, rtol=0.02)
    unmasked = sda.denoising_layer(x, 0.0)
    torch.testing.assert_close(unmasked[:, :-1], torch.eye(6, dtype=torch.float64), atol=1e-2, rtol=0)


def test_sda_takes_the_masking_that_serves_on_the_source(pair):
    better, worse = (sda.train_sda(pair, 0, layers=2, shares=(p,)) for p in (0.9, 0.3))
    assert better["source_accuracy"] > worse["source_accuracy"]
    for shares in ((0.3, 0.9), (0.9, 0.3)):
        both = sda.train_sda(pair, 0, layers=2, shares=shares)
        assert both["masked"] == 0.9 and both["predictions"] == better["predictions"]
    assert len(both["predictions"]) == len(pair.target_test)
    # Target labels are for the accuracies alone.
    wrong = replace(
        pair,
        target_train=Images(pair.target_train.x, pair.target_train.y.flip(0)),
        target_test=Images(pair.target_test.x, pair.target_test.y.flip(0)),
    )
    blind = sda.train_sda(wrong, 0, layers=2, shares=shares)
    assert blind["predictions"] == both["predictions"]
    assert (
        blind["target_accuracy"]
        == (torch.tensor(both["predictions"]) == pair.target_test.y.flip(0)).double().mean()
    )


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("method", ["dann", "related"])
def test_resumed_after_any_epoch_has_the_same_bits(pair, tmp_path, method):
    settings = replace(QUICK, method=method, epochs=3, invert=True, patience=1)
    whole = train(pair, settings)
    for epochs in (1, 2):
        started, path = Trainer(pair, settings), tmp_path / f"{epochs}" / "checkpoint.safetensors"
        for _ in range(epochs):
            started.epoch()
        started.save(path)
        torch.manual_seed(99)
        resumed = train(pair, settings, folder=path.parent, resume=True)
        assert weights(resumed) == weights(whole)
        assert resumed.history == whole.history
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["checkpoint.safetensors"] * 2


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def _empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_cut, _flip, _empty])
def test_damaged_checkpoint_is_one_clear_error(pair, tmp_path, damage):
    path = tmp_path / "checkpoint.safetensors"
    Trainer(pair, QUICK).save(path)
    train(pair, QUICK, folder=tmp_path, resume=True)
    damage(path)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: .*delete it to start anew"):
        train(pair, QUICK, folder=tmp_path, resume=True)


def test_checkpoint_of_other_settings_names_them(pair, tmp_path):
    Trainer(pair, QUICK).save(tmp_path / "checkpoint.safetensors")
    with pytest.raises(CheckpointError, match=r"other settings \(lr 0.05 → 0.5\)"):
        train(pair, replace(QUICK, lr=0.5), folder=tmp_path, resume=True)


# ---------------------------------------------------------------------------------------------- processes


def command(trees, out, *more):
    return [
        sys.executable, "-m", "examples.dann", "--source", trees[0], "--target", trees[1], "--size", 16,
        "--batch", 16, "--epochs", 20, "--methods", "dann", "--seeds", 0, "--jobs", 1, "--out", out, *more,
    ]  # fmt: skip


def launch(argv, **kwargs):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(a) for a in argv],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **kwargs,
    )


def test_killed_thrice_and_resumed_ends_with_the_same_bits(trees, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    checkpoint = killed / "dann-0" / "checkpoint.safetensors"

    def written():
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    for _ in range(3):
        last, deadline = written(), time.monotonic() + 240
        process = launch(command(trees, killed, "--resume"))
        while written() == last and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert not (killed / "results.json").exists()
    for argv in (command(trees, killed, "--resume"), command(trees, whole)):
        assert cli.main([str(a) for a in argv[3:]]) == 0
    assert checkpoint.read_bytes() != b""
    one, other = (f / "dann-0" / "checkpoint.safetensors" for f in (whole, killed))
    assert final_digest(one) == final_digest(other)
    histories = [
        json.loads((f / "results.json").read_text())["trainings"][0]["history"] for f in (whole, killed)
    ]
    assert histories[0] == histories[1]
    report = (whole / "report.html").read_text()
    assert report.count("<svg") == 3
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", report)  # a page of its own


def final_digest(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["state"])["step"] > 0
        return file.metadata()["digest"]


DISTRIBUTED = """
import sys, torch
from dataclasses import replace
from tests.test_dann import QUICK, shapes_pair
from examples.dann.train import train, rank_and_world
from safetensors.torch import save_file
torch.distributed.init_process_group("gloo")
torch.set_default_dtype(torch.float64)
pair = shapes_pair()
for method in ("dann", "related"):
    net = train(pair, replace(QUICK, method=method, epochs=1, augment=True, information=1.0)).net
    if rank_and_world()[0] == 0:
        weights = {k: v.contiguous() for k, v in net.state_dict().items()}
        save_file(weights, f"{sys.argv[1]}/{method}.safetensors")
torch.distributed.destroy_process_group()
"""


@pytest.fixture
def float64():
    """Where rounding seldom decides which of two pixels a pooling takes, results agree closely."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_two_processes_train_like_one_with_the_joined_batch(tmp_path, float64):
    from safetensors.torch import load_file

    script = tmp_path / "distributed.py"
    script.write_text(DISTRIBUTED)
    process = launch(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            script,
            tmp_path,
        ]
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()
    for method in ("dann", "related"):
        settings = replace(QUICK, method=method, epochs=1, augment=True, information=1.0)
        alone = train(shapes_pair(), settings).net.state_dict()
        together = load_file(tmp_path / f"{method}.safetensors")
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            error = (together[name] - value).abs().max().item()
            assert error < 1e-9, (method, name, error)


# ---------------------------------------------------------------------------------------------- results


def test_tensorboard_holds_the_history_of_every_epoch_also_after_resuming(trees, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = [str(a) for a in command(trees, tmp_path, "--tensorboard", "--resume")[3:]]
    arguments[arguments.index("--epochs") + 1] = "2"
    assert cli.main(arguments) == 0
    assert cli.main(arguments) == 0  # finds the training finished; writes nothing twice
    history = json.loads((tmp_path / "results.json").read_text())["trainings"][0]["history"]
    events = EventAccumulator(str(tmp_path / "tensorboard" / "dann-0"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == history[0].keys()
    for name in history[0]:
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(i + 1, pytest.approx(row[name])) for i, row in enumerate(history)]


def test_gap_covered_is_the_median_of_the_seeds_shares():
    runs = [
        {"method": method, "seed": seed, "target_accuracy": value}
        for method, values in (
            ("source", (0.5, 0.4, 0.5)),
            ("dann", (0.8, 0.5, 0.7)),
            ("target", (0.9, 0.9, 0.9)),
        )
        for seed, value in enumerate(values)
    ]
    covered = cli.summarise(runs)["gap_covered"]["dann"]
    assert covered["by_seed"] == {0: pytest.approx(0.75), 1: pytest.approx(0.2), 2: pytest.approx(0.5)}
    assert covered["median"] == pytest.approx(0.5)


def test_every_method_in_one_run_and_its_page(trees, tmp_path, capsys):
    out = tmp_path / "out"
    status = cli.main(
        ["--source", str(trees[0]), "--target", str(trees[1]), "--size", "16", "--batch", "16",
         "--epochs", "1", "--methods", "source", "dann", "related", "target", "sda", "--seeds", "3",
         "--jobs", "1", "--compare-reference", "--out", str(out)]
    )  # fmt: skip
    assert status == 0
    results = json.loads((out / "results.json").read_text())
    assert {t["method"] for t in results["trainings"]} == {"source", "dann", "related", "target", "sda"}
    assert results["summary"]["reference"]["agreement"] > 0.9
    assert results["summary"]["reference"]["step_ratio"] > 0
    page = (out / "report.html").read_text()
    for name in ("Source only", "DANN", "Related weights", "Train on target", "SDA"):
        assert name in page
    assert "a step with the reference takes" in " ".join(capsys.readouterr().out.split())


def test_lightning_goes_on_with_the_schedule_of_its_checkpoint(pair, tmp_path):
    pytest.importorskip("lightning", reason="lightning is not installed")
    from examples.dann.lightning_module import fit

    started = fit(pair, 2, tmp_path)
    before = {name: value.clone() for name, value in started.net.named_parameters()}
    resumed = fit(pair, 4, tmp_path / "more", resume=tmp_path / "last.ckpt")
    assert (int(started.net.reverse.steps), int(resumed.net.reverse.steps)) == (2, 4)
    assert float(resumed.net.reverse.scale) == pytest.approx(2 / (1 + np.exp(-10)) - 1)
    assert all(not torch.equal(value, before[name]) for name, value in resumed.net.named_parameters())
