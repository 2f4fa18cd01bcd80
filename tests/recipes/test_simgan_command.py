"""`fastda simgan`: checkpoints, measures, refining, drawing, errors."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from fastda.recipes.common import checkpoint
from fastda.recipes.common.checkpoint import CheckpointError
from fastda.recipes.common.images import open_image
from fastda.recipes.simgan import data, digits, evaluate, eyes, report
from fastda.recipes.simgan.cli import arguments, main, settings_of
from fastda.recipes.simgan.train import (
    Settings,
    Trainer,
    load_refiner,
    to_float,
    to_pixels,
    train,
)
from tests.recipes.common import QUICK_SIMGAN as QUICK
from tests.recipes.common import ROOT, count
from tests.recipes.common import write_image as write

pytestmark = pytest.mark.isa_independent


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


def test_a_killed_training_goes_on_where_it_was(two_folders, tmp_path):
    # A process that is killed from outside, at a moment of no one's choosing.
    command = [
        sys.executable,
        "-m",
        "fastda",
        "simgan",
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
        "measures.json",
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
    # Its step size is for minibatches of 512; sums over a pair of images diverge with it.
    small = ["--lr", "1e-6", "--discriminator-lr", "1e-6"]
    assert main([*few, "--preset", "paper", "--net", net, *small]) == 0
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
    assert torch.equal(to_pixels(to_float(x)), x)
    assert to_pixels(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


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
    x, written = (
        torch.from_numpy(open_image(tmp_path / folder / "3" / "x.png", grey=True)) for folder in ("in", "out")
    )
    with torch.no_grad():
        assert torch.equal(written[None, None], to_pixels(net(to_float(x[None, None]))))
    write(tmp_path / "in" / "z.png", 30, 28)
    command += ["--overwrite"]
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
    assert "holds no images" in capsys.readouterr().err
    assert main(["train", "--batch", "0", "--out", str(tmp_path / "o")]) == 2
    assert "batch must be at least 1" in capsys.readouterr().err
    for command in (["train", "--data", "eyes"], ["train", "--data", "folders"], ["train", "--jobs", "0"]):
        with pytest.raises(SystemExit):
            main(command)
