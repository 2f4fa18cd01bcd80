"""`fastda dann`: checkpoints, processes, results, report."""

import json
import random
import re
import signal
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastda.recipes.common.checkpoint import CheckpointError, digest
from fastda.recipes.dann import cli
from fastda.recipes.dann.train import Trainer, train
from tests.recipes.common import QUICK_DANN as QUICK
from tests.recipes.common import launch, shapes_pair

pytestmark = pytest.mark.isa_independent


def weights(result):
    return digest(dict(result.net.state_dict()))


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


def command(trees, out, *more):
    return [
        sys.executable, "-m", "fastda", "dann", "--source", trees[0], "--target", trees[1], "--size", 16,
        "--batch", 16, "--epochs", 60, "--methods", "dann", "--seeds", 0, "--jobs", 1, "--out", out, *more,
    ]  # fmt: skip


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
        assert cli.main([str(a) for a in argv[4:]]) == 0
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
from tests.recipes.common import QUICK_DANN as QUICK, shapes_pair
from fastda.recipes.dann.train import train, rank_and_world
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


def test_tensorboard_holds_the_history_of_every_epoch_also_after_resuming(trees, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = [str(a) for a in command(trees, tmp_path, "--tensorboard", "--resume")[4:]]
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
         "--epochs", "1", "--methods", "source", "dann", "related", "target", "--seeds", "3",
         "--jobs", "1", "--compare-reference", "--out", str(out)]
    )  # fmt: skip
    assert status == 0
    results = json.loads((out / "results.json").read_text())
    assert {t["method"] for t in results["trainings"]} == {"source", "dann", "related", "target"}
    assert results["summary"]["reference"]["agreement"] > 0.9
    assert results["summary"]["reference"]["step_ratio"] > 0
    page = (out / "report.html").read_text()
    for name in ("Source only", "DANN", "Related weights", "Train on target"):
        assert name in page
    assert "a step with the reference takes" in " ".join(capsys.readouterr().out.split())


def test_lightning_goes_on_with_the_schedule_of_its_checkpoint(pair, tmp_path):
    pytest.importorskip("lightning", reason="lightning is not installed")
    from examples.dann_lightning import fit

    started = fit(pair, 2, tmp_path)
    before = {name: value.clone() for name, value in started.net.named_parameters()}
    resumed = fit(pair, 4, tmp_path / "more", resume=tmp_path / "last.ckpt")
    assert (int(started.net.reverse.steps), int(resumed.net.reverse.steps)) == (2, 4)
    assert float(resumed.net.reverse.scale) == pytest.approx(2 / (1 + np.exp(-10)) - 1)
    assert all(not torch.equal(value, before[name]) for name, value in resumed.net.named_parameters())
