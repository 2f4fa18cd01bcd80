"""examples/simgan: Algorithm 1, its data, its checkpoints and its command line."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fastda
from examples.common import checkpoint
from examples.common.checkpoint import CheckpointError
from examples.common.images import DataError, shifted
from examples.simgan import data, digits, evaluate, eyes, models, report
from examples.simgan.cli import arguments, main, settings_of
from examples.simgan.train import (
    Settings,
    Trainer,
    load_refiner,
    refine,
    to_float,
    to_uint8,
    train,
)

Image = pytest.importorskip("PIL.Image", reason="the examples' extra is not installed")
pytestmark = pytest.mark.isa_independent

ROOT = Path(__file__).parents[1]
QUICK = Settings(
    net="small", steps=4, batch=6, pretrain_refiner=3, pretrain_discriminator=2, history=16, average=0.9
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def domains():
    generator = torch.Generator().manual_seed(0)
    labels = digits.balanced_labels(120, 10, generator)
    thin = data.Images(digits.pen_strokes(labels, generator), labels)
    thick = data.Images(digits.pen_strokes(labels, generator, width=3.0), labels)
    return data.Domains(
        "thin → thick", "class", thin[:80], thin[80:], thick[:80], thick[80:], tuple("0123456789")
    )


def count(net):
    return sum(p.numel() for p in net.parameters())


# ------------------------------------------------------------------------------------------------- networks


def test_networks_have_the_papers_sizes():
    assert count(models.refiner("gaze")) == 296_129
    assert count(models.discriminator("gaze")) == 75_906
    assert count(models.refiner("hand")) == 4_018_625
    eye = torch.zeros(2, 1, 35, 55)
    assert models.refiner("gaze")(eye).shape == eye.shape
    assert models.discriminator("gaze")(eye).shape == (2, 2, 9, 14)
    assert models.discriminator("hand")(torch.zeros(1, 1, 224, 224)).shape == (1, 2, 7, 7)
    assert models.discriminator("gaze", kind="lsgan")(eye).shape == (2, 1, 9, 14)


def test_the_gaze_regressor_is_the_papers():
    net = models.GazeRegressor()
    assert next(m for m in net if isinstance(m, torch.nn.Linear)).in_features == 9600
    convolutions = 9 * (32 + 32 * 32 + 32 * 64 + 64 * 80 + 80 * 192) + 32 + 32 + 64 + 80 + 192
    assert count(net) == convolutions + 9600 * 1000 + 1000 + 3 * 1000 + 3
    assert net(torch.zeros(2, 1, 35, 55)).shape == (2, 3)


def test_a_mirrored_refiner_leaves_no_frame():
    torch.manual_seed(0)
    plain, mirrored = models.refiner("small"), models.refiner("small", mirror=6)
    mirrored.load_state_dict(plain.state_dict())
    flat = torch.full((1, 1, 35, 55), 0.7)
    assert plain(flat).std() > 1e-3
    assert mirrored(flat).shape == flat.shape and mirrored(flat).std() < 1e-6
    x = torch.rand(2, 1, 20, 30)
    assert torch.allclose(plain(x)[..., 5:-5, 5:-5], mirrored(x)[..., 5:-5, 5:-5], atol=1e-6)


def test_a_refiner_of_changes_begins_as_the_identity(domains, tmp_path):
    x = torch.rand(2, 1, 28, 28) * 2 - 1
    for mirror in (0, 5):
        assert torch.equal(models.refiner("change", mirror=mirror)(x), x)
    trainer = Trainer(domains, replace(QUICK, net="change", pretrain_refiner=0, mirror=5, match=1))
    while trainer.phase != "done":
        trainer.advance()
    refined = trainer.refine(domains.synthetic.x[:5])
    trainer.save(tmp_path / "checkpoint.safetensors")
    loaded, _ = load_refiner(tmp_path / "checkpoint.safetensors")
    assert not torch.equal(refined, domains.synthetic.x[:5])
    assert torch.equal(refine(loaded, domains.synthetic.x[:5]), refined)


def test_matching_gives_cells_the_real_images_statistics_and_leaves_detail():
    generator = torch.Generator().manual_seed(4)
    mixed = torch.randn(6, 6, generator=generator)

    def draw(mean, mixing):
        coarse = mean + torch.randn(4000, 6, generator=generator) @ mixing
        fine = torch.randn(4000, 1, 12, 18, generator=generator)
        blocks = coarse.view(-1, 1, 2, 3).repeat_interleave(6, 2).repeat_interleave(6, 3)
        return blocks + fine

    synthetic, real = draw(0.0, torch.eye(6)), draw(0.5, mixed)
    matching = models.Matching(6, 1, 12, 18)
    assert torch.equal(matching(synthetic), synthetic)
    matching.fit(synthetic, real)
    before, expected = matching.cells(synthetic), matching.cells(real)
    lit = before @ (matching.matrix.T + torch.eye(6)) + matching.offset
    torch.testing.assert_close(lit.mean(0), expected.mean(0), rtol=0, atol=1e-4)
    spread = matching.kept * before.T.cov() + (1 - matching.kept) * expected.T.cov()
    assert (lit.T.cov() - spread).norm() < 0.15 * spread.norm()  # the ridge's share
    assert (synthetic.flatten(1).T.cov().diagonal() - 2).abs().mean() < 0.2  # what it had been
    change = (matching(synthetic) - synthetic)[:, 0]
    assert change.diff(n=2, dim=2).abs().mean() < 0.15 * change.abs().mean()  # smooth
    matching.fit(synthetic, synthetic)
    torch.testing.assert_close(matching(synthetic), synthetic, rtol=0, atol=1e-4)


def test_psi_keeps_what_it_says():
    x = torch.randn(2, 3, 8, 9)
    assert torch.equal(models.features("identity", x), x)
    shifted = models.features("derivatives", x + 0.5)
    torch.testing.assert_close(shifted, models.features("derivatives", x), rtol=0, atol=1e-6)
    checkers = torch.ones(8, 9)
    checkers[::2, ::2] = checkers[1::2, 1::2] = -1
    assert models.features("blur", x + checkers).sub(models.features("blur", x)).abs().max() < 0.12


# ----------------------------------------------------------------------------------------------- Algorithm 1


def test_the_order_of_steps_and_who_takes_gradients(domains, monkeypatch):
    trainer = Trainer(domains, replace(QUICK, refiner_steps=3, discriminator_steps=2))
    calls = []
    nets = {"R": trainer.refiner, "D": trainer.discriminator}
    for name in ("refiner", "discriminator"):
        optimiser = getattr(trainer, f"{name}_optimiser")

        def step(*args, mine=name[0].upper(), real=optimiser.step, **kwargs):  # noqa: B008
            took = {key: [p.grad is not None for p in net.parameters()] for key, net in nets.items()}
            assert all(took[mine])
            other = "D" if mine == "R" else "R"
            assert not any(took[other]), f"{other}'s weights took a gradient in {mine}'s step"
            for net in nets.values():
                net.zero_grad(set_to_none=False)
            real(*args, **kwargs)
            for net in nets.values():
                net.zero_grad(set_to_none=True)
            calls.append(mine)

        monkeypatch.setattr(optimiser, "step", step)
    phases = []
    while trainer.phase != "done":
        phases.append(trainer.phase)
        trainer.advance()
    assert phases == ["pretrain refiner"] * 3 + ["pretrain discriminator"] * 2 + ["adversarial"] * 4
    assert "".join(calls) == "RRR" + "DD" + "RRRDD" * 4
    assert all(p.requires_grad for net in nets.values() for p in net.parameters())


def test_the_losses_of_both_steps_are_the_papers(domains):
    settings = replace(QUICK, history=0, reg_scale=0.3, average=0.0, reduction="batchmean")
    trainer = Trainer(domains, settings)
    state = trainer.generator.get_state()
    refiner, discriminator = trainer.refiner, trainer.discriminator
    synthetic = trainer.draw(domains.synthetic.x)
    refined = refiner(synthetic).detach()
    fake = discriminator(refined).detach().double().softmax(1)
    n = settings.batch
    expected = (-fake[:, 0].log().sum() + 0.3 * (refined.double() - synthetic).abs().sum()) / n
    trainer.generator.set_state(state)
    assert float(trainer.refiner_step()["refiner_loss"]) == pytest.approx(float(expected), rel=1e-4)

    state = trainer.generator.get_state()
    real = discriminator(trainer.draw(domains.real.x)).detach().double().softmax(1)
    fake = discriminator(refiner(trainer.draw(domains.synthetic.x))).detach().double().softmax(1)
    expected = -(real[:, 0].log().sum() + fake[:, 1].log().sum()) / n
    trainer.generator.set_state(state)
    logs = trainer.discriminator_step()
    assert float(logs["discriminator_loss"]) == pytest.approx(float(expected), rel=1e-4)
    assert float(logs["accuracy_real"]) == pytest.approx(float((real[:, 0] > 0.5).double().mean()), abs=1e-6)


def test_the_discriminator_sees_earlier_images_too(domains):
    trainer = Trainer(domains, QUICK)
    seen = []
    query = trainer.buffer.query
    trainer.buffer.query = lambda batch: seen.append((batch.clone(), query(batch))) or seen[-1][1]
    while trainer.phase != "done":
        trainer.advance()
    assert len(trainer.buffer) == 16
    now, given = seen[-1]
    new = sum(any(torch.equal(a, b) for b in now) for a in given)
    assert new == 3 and not given.requires_grad


def test_shifted_images_are_moved_and_no_more(domains):
    x = to_float(domains.real.x[:30])
    moved = shifted(x, 2, torch.Generator().manual_seed(0))
    inner = x[..., 2:-2, 2:-2]
    places = [(y, z) for y in range(5) for z in range(5)]
    for image, middle in zip(moved, inner, strict=True):
        assert any(torch.equal(image[:, y : y + 24, z : z + 24], middle) for y, z in places)
    assert not torch.equal(moved, x)


@pytest.mark.parametrize("kind", ["softmax", "bce", "lsgan", "hinge", "wgan"])
@pytest.mark.parametrize("psi", ["identity", "blur"])
def test_every_loss_trains(domains, kind, psi):
    trainer = train(domains, replace(QUICK, kind=kind, psi=psi, steps=2, batch=3), log_every=1)
    assert all(np.isfinite(v) for row in trainer.curves for v in row.values())


def test_fused_and_reference_runs_follow_the_same_curves(domains):
    # Adam divides gradients by their size, and with it rounding by what is nearly zero; plain SGD does not.
    # The paper's step size: with one ten times as large the game amplifies rounding until the runs part.
    settings = replace(
        QUICK, optimiser="sgd", steps=200, batch=4, pretrain_refiner=10, lr=0.001, discriminator_lr=0.001
    )
    fused = train(domains, settings, log_every=1).curves
    with fastda.use_backend("reference"):
        reference = train(domains, settings, log_every=1).curves
    assert len(fused) == 212
    # In single steps a ReLU falls on its other side: PyTorch with two threads was off from itself by 7e-4.
    differences = [
        abs(a[name] - b[name]) / abs(b[name])
        for a, b in zip(fused, reference, strict=True)
        for name in a.keys() - {"step", "accuracy_real", "accuracy_refined"}
    ]
    assert max(differences) <= 5e-3
    assert statistics.median(differences) <= 2e-6


# ----------------------------------------------------------------------------------------------- checkpoints


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_resuming_is_bit_identical(domains, tmp_path):
    whole = train(domains, QUICK, log_every=1)
    for stop in (2, 4, 7):
        part = Trainer(domains, QUICK)
        for _ in range(stop):
            part.curves.append({"step": part.step + 1, **{k: float(v) for k, v in part.advance().items()}})
        part.save(tmp_path / str(stop) / "checkpoint.safetensors")
        resumed = train(domains, QUICK, folder=tmp_path / str(stop), resume=True, log_every=1)
        assert resumed.curves == whole.curves
        for name in ("refiner", "discriminator"):
            assert same(getattr(resumed, name).state_dict(), getattr(whole, name).state_dict())
        assert same(resumed.averaged, whole.averaged)
        assert torch.equal(resumed.buffer.images, whole.buffer.images)


@pytest.fixture
def two_folders(tmp_path):
    for i in range(10):
        for name, draw in (("synthetic", digits.pen_strokes), ("real", digits.font_digits)):
            (tmp_path / name).mkdir(exist_ok=True)
            image = draw(torch.tensor([i]), torch.Generator().manual_seed(i))
            Image.fromarray(image[0, 0].numpy()).save(tmp_path / name / f"{i}.png")
    quick = ["--steps", "20", "--batch", "4", "--pretrain-refiner", "2", "--pretrain-discriminator", "1"]
    folders = ["--synthetic", str(tmp_path / "synthetic"), "--real", str(tmp_path / "real")]
    return ["train", "--data", "folders", *folders, *quick, "--eval-steps", "1", "--jobs", "1"]


def test_a_killed_training_goes_on_where_it_was(two_folders, tmp_path):
    # A process that is killed from outside, at a moment of no one's choosing.
    command = [
        sys.executable,
        "-m",
        "examples.simgan",
        *two_folders,
        "--save-every",
        "1",
        "--out",
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    written = tmp_path / "seed-0" / "checkpoint.safetensors"
    deadline = time.monotonic() + 240
    while not written.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, stored, state = checkpoint.load(written)
    assert 0 < state["step"] < 23 and not (tmp_path / "results.json").exists()
    settings = Settings(**stored)
    images = data.folders(tmp_path / "synthetic", tmp_path / "real")
    resumed = train(images, settings, folder=tmp_path / "seed-0", resume=True)
    whole = train(images, settings)
    assert resumed.curves == whole.curves
    assert same(resumed.refiner.state_dict(), whole.refiner.state_dict())
    assert same(resumed.averaged, whole.averaged)


def test_train_writes_pictures_results_and_a_report(two_folders, tmp_path, capsys):
    assert (
        main([*two_folders, "--out", str(tmp_path / "out"), "--sample-every", "10", "--compare-reference"])
        == 0
    )
    out = tmp_path / "out"
    assert {p.name for p in (out / "seed-0").iterdir()} == {
        "checkpoint.safetensors", "grid.png", "grid-000010.png", "grid-000020.png", "grid-000023.png",
    }  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert results["trainings"][0]["measures"]["two_sample"].keys() == {"raw", "refined"}
    assert 0 <= results["summary"]["reference"]["largest_difference"] < 0.1
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page and "<svg" in page and "reference ops" in page
    assert "report.html" in capsys.readouterr().out


def test_tensorboard_gets_every_logged_value(domains, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = train(domains, QUICK, log_every=1, tensorboard=tmp_path).curves
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    names = {name for row in curves for name in row} - {"step"}
    assert names == set(events.Tags()["scalars"]) and "change" in names
    for name in names:
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in curves if name in row]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected


@pytest.mark.parametrize("net", ["gaze", "hand"])
def test_the_papers_preset_trains(two_folders, tmp_path, net):
    few = [*two_folders, "--steps", "1", "--batch", "2", "--history", "4", "--out", str(tmp_path / "out")]
    assert settings_of(arguments(["train", "--preset", "paper"])).net == "gaze"
    settings = settings_of(arguments(["train", "--preset", "paper", "--net", net]))
    assert (settings.batch, settings.lr, settings.optimiser, settings.reduction) == (
        512, 0.001, "sgd", "batchmean",
    )  # fmt: skip
    assert (settings.pretrain_refiner, settings.pretrain_discriminator) == (1000, 200)
    assert (settings.refiner_steps, settings.discriminator_steps, settings.mirror) == (2, 1, 0)
    assert main([*few, "--preset", "paper", "--net", net]) == 0
    refiner, _ = load_refiner(tmp_path / "out" / "seed-0" / "checkpoint.safetensors")
    assert count(refiner) == {"gaze": 296_129, "hand": 4_018_625}[net]


def test_checkpoints_that_do_not_fit_are_refused(domains, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    Trainer(domains, QUICK).save(path)
    with pytest.raises(CheckpointError, match=r"batch 6 → 7"):
        train(domains, replace(QUICK, batch=7), folder=tmp_path, resume=True)
    other = replace(domains, synthetic=domains.synthetic[:70])
    with pytest.raises(CheckpointError, match="other images"):
        train(other, QUICK, folder=tmp_path, resume=True)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        train(domains, QUICK, folder=tmp_path, resume=True)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_refiner(path)


def test_settings_that_make_no_sense_are_refused():
    for field, value in (("net", "face"), ("batch", 0), ("lr", 0.0), ("reg_scale", -1.0), ("average", 1.0)):
        with pytest.raises(ValueError, match=field):
            replace(QUICK, **{field: value})


# ----------------------------------------------------------------------------------------------- renderers


def test_drawn_digits_are_what_their_labels_say():
    generator = torch.Generator().manual_seed(3)
    labels = digits.balanced_labels(300, 10, generator)
    assert labels.bincount().tolist() == [30] * 10
    for draw in (digits.pen_strokes, digits.font_digits):
        x = draw(labels, torch.Generator().manual_seed(1))
        assert x.shape == (300, 1, 28, 28) and x.dtype == torch.uint8
        assert torch.equal(x, draw(labels, torch.Generator().manual_seed(1)))
        # Nearest class mean, of blurred images, on other drawings of the same classes.
        soft = torch.nn.functional.avg_pool2d(x.float(), 5, 2).flatten(1)
        soft = torch.nn.functional.normalize(soft, dim=1)
        means = torch.stack([soft[:150][labels[:150] == c].mean(0) for c in range(10)])
        right = (torch.cdist(soft[150:], means).argmin(1) == labels[150:]).float().mean()
        assert right > 0.7, draw.__name__
    for side in (1, 2):  # of what was drawn last, fonts
        centre = x[:, 0].float().sum(side) @ (torch.arange(28) + 0.5) / x.float().sum((1, 2, 3))
        assert (centre - 14).abs().max() < 0.5


def test_drawn_eyes_look_where_their_gaze_says():
    x, gaze = eyes.render(400, torch.Generator().manual_seed(2))
    assert x.shape == (400, 1, 35, 55) and x.dtype == torch.uint8
    torch.testing.assert_close(gaze.norm(dim=1), torch.ones(400))
    again, _ = eyes.render(20, torch.Generator().manual_seed(2))
    assert not torch.equal(again, x[:20])  # 20 images draw other numbers than 400
    assert torch.equal(again, eyes.render(20, torch.Generator().manual_seed(2))[0])
    # Where the iris goes it gets dark, where it comes from light: x is columns, y is rows.
    right, left = (x[side, 0].float().mean(0) for side in (gaze[:, 0] > 0.2, gaze[:, 0] < -0.2))
    change = (right - left)[16:22]
    assert change[:, 32:38].mean() < -20 and change[:, 17:23].mean() > 20
    down, up = (x[side, 0].float().mean(0) for side in (gaze[:, 1] > 0.25, gaze[:, 1] < 0.0))
    assert (down - up)[12:16, 25:32].mean() > 8  # lid instead of iris
    assert (down - up)[20:25, 24:31].mean() < -20  # iris instead of white


def test_eyes_taken_again_are_the_same_eyes():
    x, _ = eyes.render(40, torch.Generator().manual_seed(2))
    again = eyes.retaken(x, torch.Generator().manual_seed(3))
    assert again.shape == x.shape and again.dtype == x.dtype and not torch.equal(again, x)
    assert torch.equal(again, eyes.retaken(x, torch.Generator().manual_seed(3)))
    soft, soft_again = (torch.nn.functional.avg_pool2d(i.float(), 5).flatten(1) for i in (x, again))
    assert (torch.cdist(soft_again, soft).argmin(1) == torch.arange(40)).float().mean() > 0.7


def test_gaze_angles_are_mpiigazes():
    pitch, yaw = torch.tensor([0.3, -0.2]), torch.tensor([-0.4, 0.1])
    gaze = eyes.gaze_vector(pitch, yaw)
    torch.testing.assert_close(eyes.angles(gaze), torch.stack([pitch, yaw], 1))
    assert gaze[0, 0] > 0 and gaze[0, 1] < 0 and gaze[0, 2] < 0  # to the right, up, towards the camera
    straight = torch.tensor([[0.0, 0.0, -1.0]])
    assert eyes.angle_between(straight, 2 * eyes.gaze_vector(torch.tensor([0.5]), torch.tensor([0.0]))) == (
        pytest.approx(np.degrees(0.5), abs=1e-3)
    )


def test_equalised_images_use_all_greys_evenly():
    x = (torch.rand(3, 1, 35, 55) * 60 + 90).to(torch.uint8)
    equal = eyes.equalise(x)
    assert equal.amin() == 0 and equal.amax() == 255
    assert (equal.float().mean((1, 2, 3)) - 127.5).abs().max() < 5
    assert torch.equal(x.flatten(1).argmax(1), equal.flatten(1).argmax(1))
    flat = torch.full((1, 1, 4, 4), 7, dtype=torch.uint8)
    assert eyes.equalise(flat).unique().numel() == 1


# ------------------------------------------------------------------------------------------------- files


def write(path, height=35, width=55, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, np.uint8), mode).save(path)


def test_syntheyes_names_carry_the_gaze(tmp_path):
    write(tmp_path / "f01_122_-0.3927_0.1963.png", 80, 120, "RGBA")
    x, gaze = eyes.read_labelled(tmp_path)
    assert x.shape == (1, 1, 35, 55)
    torch.testing.assert_close(eyes.angles(gaze), torch.tensor([[-0.3927, 0.1963]]))
    write(tmp_path / "f01_123.png")
    with pytest.raises(DataError, match=r"f01_123\.png: not labelled"):
        eyes.read_labelled(tmp_path)


def unity_label(look="(0.1000, -0.2000, -0.9700, 0.0000)"):
    points = [f"({x}.0, {y}.0, 9.5)" for x, y in ((120, 140), (200, 160), (200, 120), (280, 130))]
    return {"interior_margin_2d": points, "eye_details": {"look_vec": look}}


def test_unityeyes_images_are_cut_by_their_labels(tmp_path):
    write(tmp_path / "1.jpg", 300, 400)
    (tmp_path / "1.json").write_text(json.dumps(unity_label()))
    x, gaze = eyes.read_labelled(tmp_path)
    assert x.shape == (1, 1, 35, 55)
    expected = torch.nn.functional.normalize(torch.tensor([[0.1, 0.2, -0.97]]))  # y points downwards here
    torch.testing.assert_close(gaze, expected)
    write(tmp_path / "2.jpg", 300, 400)
    with pytest.raises(DataError, match=r"2\.jpg: not labelled: 2\.json"):
        eyes.read_labelled(tmp_path)
    for broken, message in (
        ("{", "not a label of UnityEyes"),
        (json.dumps({"eye_details": {}}), "interior_margin_2d"),
        (json.dumps(unity_label("(1, 2)")), "incomplete"),
    ):
        (tmp_path / "2.json").write_text(broken)
        with pytest.raises(DataError, match=message):
            eyes.read_labelled(tmp_path)
    (tmp_path / "2.json").write_text(json.dumps(unity_label()))
    write(tmp_path / "2.jpg", 100, 100)
    with pytest.raises(DataError, match="place the eye at"):
        eyes.read_labelled(tmp_path)


def test_mpiigaze_files(tmp_path):
    savemat = pytest.importorskip("scipy.io", reason="scipy is not installed").savemat
    for person in range(5):
        sides = {}
        for side in ("left", "right"):
            image = np.random.default_rng(person).integers(0, 255, (3, 36, 60), np.uint8)
            gaze = np.tile([0.0, 0.6, -0.8], (3, 1))
            sides[side] = {"image": image, "gaze": gaze, "pose": np.zeros((3, 3))}
        path = tmp_path / f"p{person:02}" / "day01.mat"
        path.parent.mkdir()
        savemat(path, {"data": sides})
    (x, gaze), groups = eyes.read_real(tmp_path)
    assert x.shape == (30, 1, 35, 55) and groups.bincount().tolist() == [6] * 5
    torch.testing.assert_close(gaze, torch.tensor([[0.0, 0.6, -0.8]]).expand(30, 3))
    pair = data.eyes_to_real(tmp_path, count=20)
    assert len(pair.real_test) == 12 and len(pair.real) == 2 * 18 and pair.real_test.y is not None
    (tmp_path / "p00" / "day02.mat").write_bytes(b"MATLAB 5.0 MAT-file" * 10)
    with pytest.raises(DataError, match=r"day02\.mat: not a normalised MPIIGaze file"):
        eyes.read_real(tmp_path)


def test_any_two_folders(tmp_path):
    for name in "ab":
        for i in range(6):
            write(tmp_path / "synthetic" / name / f"{i}.png", 20, 24)
            write(tmp_path / "real" / f"{name}{i}.png", 20, 24)
    pair = data.folders(tmp_path / "synthetic", tmp_path / "real")
    assert pair.task == "class" and pair.classes == ("a", "b") and pair.real_test.y is None
    assert (
        len(pair.synthetic) == 10
        and len(pair.synthetic_test) == 2
        and pair.synthetic.x.shape[1:] == (1, 20, 24)
    )
    assert data.folders(tmp_path / "synthetic", tmp_path / "real", (12, 16), True).real.x.shape[1:] == (
        3,
        12,
        16,
    )
    write(tmp_path / "real" / "z.png", 21, 24)
    with pytest.raises(DataError, match=r"z\.png: 24×21, but a0\.png is 24×20; --size"):
        data.folders(tmp_path / "synthetic", tmp_path / "real")
    (tmp_path / "real" / "z.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"z\.png: not an image"):
        data.folders(tmp_path / "synthetic", tmp_path / "real")
    with pytest.raises(DataError, match="no such folder"):
        data.folders(tmp_path / "nowhere", tmp_path / "real")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        data.folders(tmp_path / "synthetic", tmp_path / "empty")
    for i in range(6):
        write(tmp_path / "larger" / f"{i}.png", 30, 24)
    with pytest.raises(DataError, match=r"24×20 with 1 channel, larger of 24×30"):
        data.folders(tmp_path / "synthetic", tmp_path / "larger")


# ------------------------------------------------------------------------------- measures, refining, drawing


def test_the_two_sample_test_finds_a_difference_and_only_one_that_is_there(domains):
    generator = torch.Generator().manual_seed(5)
    labels = digits.balanced_labels(300, 10, generator)
    a, b, c = (digits.pen_strokes(labels, generator, width) for width in (1.0, 1.0, 3.0))
    same_kind = evaluate.two_sample(a[:200], b[:200], a[200:], b[200:], 0, 30)
    other_kind = evaluate.two_sample(a[:200], c[:200], a[200:], c[200:], 0, 30)
    assert other_kind > 0.95 and 0.35 < same_kind < 0.65


def test_measures_of_a_refiner_that_thickens(domains):
    def thickened(x):
        return (torch.nn.functional.max_pool2d(x.float(), 3, 1, padding=1) * 4).clamp(max=255).to(torch.uint8)

    result = evaluate.evaluate(domains, thickened, steps=15, judge_steps=15, judges=1)
    assert result["accuracy"].keys() == {"raw", "refined", "raw + refined"}
    assert result["two_sample"].keys() == {"raw", "refined"} and result["two_sample"]["raw"] > 0.9


def test_images_survive_the_way_to_floats_and_back():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_float(x)), x)
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_the_grid_shows_four_rows(domains):
    synthetic, real = report.shown(domains)
    lighter = synthetic.clone().clamp(max=200) + 40
    picture = report.grid(synthetic, lighter, real)
    n = report.columns(domains)
    assert picture.shape == (4 * (28 * 2 + 2), 74 + n * (28 * 2 + 2), 3)
    change = report.difference(lighter, synthetic)
    assert (change >= 128 - 28).all() and (change[synthetic < 150] > 140).all()


def test_refine_keeps_names_labels_and_folders(domains, tmp_path, capsys):
    trained = tmp_path / "checkpoint.safetensors"
    Trainer(domains, QUICK).save(trained)
    write(tmp_path / "in" / "3" / "x.png", 28, 28)
    write(tmp_path / "in" / "5" / "y.png", 28, 28)
    (tmp_path / "in" / "5" / "y.json").write_text('{"label": 5}')
    (tmp_path / "in" / "labels.csv").write_text("file,label\n3/x.png,3\n")
    command = ["refine", str(trained), str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert found == ["3/x.png", "5/y.json", "5/y.png", "labels.csv"]
    assert (tmp_path / "out" / "5" / "y.json").read_text() == '{"label": 5}'
    net, _ = load_refiner(trained)
    x = data.read_image(tmp_path / "in" / "3" / "x.png", None, False)
    written = data.read_image(tmp_path / "out" / "3" / "x.png", None, False)
    with torch.no_grad():
        assert torch.equal(written[None], to_uint8(net(to_float(x[None]))))
    write(tmp_path / "in" / "z.png", 30, 28)
    assert main(command) == 2
    assert "z.png: 28×30, but the refiner was trained on 28×28; --resize" in capsys.readouterr().err
    assert main([*command, "--resize"]) == 0
    assert main([*command[:3], "--out", str(tmp_path / "in" / "out")]) == 2
    assert "must lie outside" in capsys.readouterr().err
    assert main(["refine", str(tmp_path / "none"), *command[2:]]) == 2


def test_drawn_folders_can_be_read_again(tmp_path):
    assert main(["draw", "eyes", "--count", "6", "--out", str(tmp_path / "eyes")]) == 0
    x, gaze = eyes.read_labelled(tmp_path / "eyes")
    drawn, known = eyes.render(6, torch.Generator().manual_seed(0))
    order = [int(p.name.split("_")[0]) for p in sorted((tmp_path / "eyes").glob("*.png"))]
    torch.testing.assert_close(gaze, known[order], rtol=0, atol=2e-4)
    assert (x.int() - drawn[order].int()).abs().max() <= 1  # equalised once more
    assert main(["draw", "fonts", "--count", "20", "--out", str(tmp_path / "digits")]) == 0
    assert sorted(p.name for p in (tmp_path / "digits").iterdir()) == list("0123456789")


def test_wrong_commands_say_what_is_wrong(tmp_path, capsys):
    assert main(["train", "--data", "eyes", "--real", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert "neither MPIIGaze's .mat files nor images" in capsys.readouterr().err
    assert main(["train", "--batch", "0", "--out", str(tmp_path / "o")]) == 2
    assert "batch must be at least 1" in capsys.readouterr().err
    for command in (["train", "--data", "eyes"], ["train", "--data", "folders"], ["train", "--jobs", "0"]):
        with pytest.raises(SystemExit):
            main(command)
