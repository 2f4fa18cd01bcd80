"""Where the trainings write, and what they say when something is wrong: in a line, before the work."""

import errno
import json
import os
import re
import resource
from dataclasses import replace

import pytest
import torch

from fastda import files
from fastda.recipes.common import checkpoint, command, page
from fastda.recipes.dann import cli as dann
from fastda.recipes.dann import data as dann_data
from fastda.recipes.simgan import cli as simgan
from fastda.recipes.simgan import data, report
from fastda.recipes.simgan.train import Trainer
from tests.recipes.common import QUICK_SIMGAN

pytestmark = pytest.mark.isa_independent


@pytest.fixture(params=["dann", "simgan"])
def quick(request, trees, two_folders):
    """A command's main, the arguments of a training of seconds, and the name of its folder."""
    if request.param == "simgan":
        return simgan.main, [*two_folders, "--save-every", "1", "--sample-every", "100"], "seed-0"
    words = ["--source", trees[0], "--target", trees[1], "--size", 16, "--batch", 16, "--epochs", 2]
    words += ["--methods", "dann", "--seeds", 0, "--jobs", 1]
    return dann.main, [str(word) for word in words], "dann-0"


def said(capsys):
    """The one line on standard error that a log would show, beside the trainings' ends."""
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("training ")]
    assert len(lines) == 1, lines
    return lines[0]


def forbid_training(monkeypatch):
    for module in (dann, simgan):
        monkeypatch.setattr(module, "train", lambda *_, **__: pytest.fail("has begun"))


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/out"])
def test_places_that_take_no_results_are_found_before_the_training(
    quick, tmp_path, capsys, monkeypatch, place
):
    main, arguments, _ = quick
    forbid_training(monkeypatch)
    (tmp_path / "file").write_text("")
    assert main([*arguments, "--out", str(tmp_path / place)]) == 1
    assert str(tmp_path / place) in said(capsys)


def test_a_full_disk_is_found_before_the_training(quick, tmp_path, capsys, monkeypatch):
    main, arguments, _ = quick
    forbid_training(monkeypatch)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert said(capsys).endswith("out: cannot be written to: No space left on device")


def test_a_disk_that_fills_up_is_a_line_and_leaves_the_last_checkpoint_whole(
    quick, tmp_path, capsys, monkeypatch
):
    main, arguments, name = quick
    written, fsync = [], os.fsync

    def fills_up(handle):
        written.append(handle)
        if len(written) > 2:  # the trial, one checkpoint
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", fills_up)
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    path = tmp_path / "out" / name / "checkpoint.safetensors"
    assert said(capsys).endswith(f"{path}: cannot be written: No space left on device")
    assert checkpoint.load(path)[2]["step"] > 0
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == [path]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--resume"]) == 0


def test_a_limit_of_the_system_is_a_line_too(quick, tmp_path, capsys):
    """The writer of checkpoints meets it itself, not Python."""
    main, arguments, name = quick
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search(rf"{name}/checkpoint\.safetensors: cannot be written: .*File too large", said(capsys))
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


def test_results_are_kept_unless_told_and_hold_no_path_of_this_machine(quick, tmp_path, capsys, monkeypatch):
    main, arguments, name = quick
    out = tmp_path / "out"
    (out / name).mkdir(parents=True)
    (out / name / f".checkpoint.safetensors.abc{files.UNFINISHED}").write_text("of a killed run")
    assert main([*arguments, "--out", str(out)]) == 0
    streams = capsys.readouterr()
    assert "\r" not in streams.err and len(streams.err.splitlines()) == 1  # no bars in a log
    text = (out / "results.json").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert str(tmp_path) not in text and str(tmp_path) not in (out / "report.html").read_text()
    assert not [p for p in out.rglob(".*")]

    path = out / name / "checkpoint.safetensors"
    before = path.read_bytes(), text
    with monkeypatch.context() as patched:
        forbid_training(patched)
        assert main([*arguments, "--out", str(out)]) == 2
        assert "holds the results of a run" in said(capsys)
        with files.claimed(out):
            assert main([*arguments, "--out", str(out), "--resume"]) == 2
        assert "another run" in said(capsys)
    assert (path.read_bytes(), (out / "results.json").read_text()) == before
    (out / name / "grid-000001.png").write_text("of another run")
    other = arguments.copy()
    other[other.index("--batch") + 1] = "6"
    assert main([*other, "--out", str(out), "--overwrite"]) == 0
    assert path.read_bytes() != before[0] and not (out / name / "grid-000001.png").exists()


def test_a_trained_refiner_is_measured_again(two_folders, tmp_path, capsys):
    assert simgan.main([*two_folders, "--out", str(tmp_path / "out")]) == 0
    trained = str(tmp_path / "out" / "seed-0" / "checkpoint.safetensors")
    folders = two_folders[two_folders.index("--data") : two_folders.index("--steps")]
    capsys.readouterr()
    words = ["evaluate", trained, *folders, "--eval-steps", "1", "--seeds", "0", "1"]
    assert simgan.main([*words, "--json", str(tmp_path / "measures.json")]) == 0
    assert "seed 1" in capsys.readouterr().out
    measures = json.loads((tmp_path / "measures.json").read_text())
    of_training = json.loads((tmp_path / "out" / "results.json").read_text())
    assert measures["trainings"][0]["measures"] == of_training["trainings"][0]["measures"]
    assert refused(simgan.main, capsys, *words, "--size", "14x14").endswith("(1, 14, 14), no labels")


@pytest.mark.parametrize(
    ("main", "more"),
    [
        (dann.main, ["--lr", "1e9"]),
        (simgan.main, ["--lr", "1e30", "--discriminator-lr", "1e30"]),
    ],
)
def test_trainings_that_diverge_say_so(request, main, more, trees, two_folders, tmp_path, capsys):
    quick_dann = ["--source", str(trees[0]), "--target", str(trees[1]), "--size", "16", "--batch", "16",
                  "--epochs", "2", "--methods", "source", "dann", "--seeds", "0", "--jobs", "1"]  # fmt: skip
    arguments = quick_dann if main is dann.main else two_folders
    assert main([*arguments, *more, "--out", str(tmp_path / "out")]) == 1
    line = said(capsys)
    assert re.search(r"diverged, [\w ]+ is (nan|inf) at (epoch|step) \d+; try a smaller --lr", line)
    text = (tmp_path / "out" / "results.json").read_text()
    results = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert all("diverged" in r for r in results["trainings"])
    assert "diverged" in (tmp_path / "out" / "report.html").read_text()


def test_one_training_of_two_diverges(trees, tmp_path, capsys, monkeypatch):
    train = dann.train

    def one(pair, settings, **options):
        return train(pair, replace(settings, lr=1e9) if settings.method == "dann" else settings, **options)

    monkeypatch.setattr(dann, "train", one)
    words = ["--source", trees[0], "--target", trees[1], "--size", 16, "--batch", 16, "--epochs", 1,
             "--methods", "source", "dann", "target", "--seeds", 0, "--jobs", 1,
             "--out", tmp_path / "out"]  # fmt: skip
    assert dann.main([str(word) for word in words]) == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["summary"]["accuracy"].keys() == {"source", "target"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Source only" in page and "diverged" in page
    assert "diverged" in capsys.readouterr().out


def test_batches_of_one_image_a_domain_end_with_a_report_or_a_line(trees, tmp_path, capsys):
    """They diverge or not; neither is a traceback."""
    words = ["--source", trees[0], "--target", trees[1], "--size", 16, "--batch", 2, "--epochs", 1,
             "--methods", "dann", "--seeds", 0, "--jobs", 1, "--out", tmp_path / "out"]  # fmt: skip
    assert dann.main([str(word) for word in words]) == 2
    assert "batch: normalising a map of 1x1 takes at least 2 images of a domain" in said(capsys)
    words[words.index(16)] = 20
    assert dann.main([str(word) for word in words]) in (0, 1)
    assert (tmp_path / "out" / "report.html").exists()


# ---------------------------------------------------------------------------------------- arguments


def refused(main, capsys, *words):
    """The line that arguments are refused with."""
    try:
        assert main([str(word) for word in words]) == 2
    except SystemExit as stop:
        assert stop.code == 2
    return said(capsys)


FOLDERS = ("--synthetic", "a", "--real", "b")
SIMGAN = [
    (["train", *FOLDERS], "--real goes with --data eyes or folders, not with strokes"),
    (["train", "--data", "fonts", "--size", "20x20"], "--size goes with --data folders, not with fonts"),
    (["train", "--data", "eyes", "--real", "x", "--mnist", "x"], "--mnist goes with --data strokes or fonts"),
    (
        ["train", "--data", "folders", *FOLDERS, "--count", "20"],
        "--count goes with --data strokes or fonts or eyes",
    ),
    (["train", "--data", "strokes", "--colour"], "--colour goes with --data folders"),
    (["train", "--data", "strokes", "--span", "1:2"], "--span goes with --data folders"),
    (["train", "--data", "folders", *FOLDERS, "--span", "2:1"], "expected two greys of 0 to 65535"),
    (["train", "--data", "folders", *FOLDERS, "--size", "0x20"], "expected height x width"),
    (
        ["train", "--data", "eyes", "--real", "x", "--synthetic", "y", "--count", "20"],
        "with --synthetic none is",
    ),
    (["train", "--data", "eyes"], "--data eyes needs --real"),
    (["train", "--data", "folders", "--real", "b"], "--data folders needs --synthetic and --real"),
    (["train", "--jobs", "0"], "--jobs must be at least 1, got 0"),
    (["train", "--count", "3"], "--count must be at least 10, got 3"),
    (["train", "--seeds", "1", "1"], "--seeds: each once"),
    (["train", "--lr", "-1"], "lr must be positive, got -1"),
    (["train", "--lr", "nan"], "lr must be positive, got nan"),
    (["train", "--reg-scale", "inf"], "reg_scale must be a number from 0 on"),
    (["train", "--batch", "0"], "batch must be at least 1"),
    (["train", "--net", "face"], "invalid choice: 'face'"),
    (["draw", "eyes", "--count", "0", "--out", "x"], "--count must be at least 1, got 0"),
    (["draw", "eyes", "--fonts", "x", "--out", "x"], "--fonts goes with fonts, not with eyes"),
    (["refine", "nothing.safetensors", "x", "--out", "y"], "nothing.safetensors: no such file"),
    (["evaluate", "nothing.safetensors"], "nothing.safetensors: no such file"),
    (["train", "--data", "folders", "--synthetic", "none", "--real", "none"], "none: no such folder"),
    (
        ["train", "--data", "folders", "--synthetic", __file__, "--real", "x"],
        "is a file, and a folder is wanted",
    ),
    (["train", "--mnist", __file__], "is a file, and a folder is wanted"),
]
DANN = [
    (["--source", "a"], "--source and --target go together"),
    (
        ["--source", "a", "--target", "b", "--pair", "mnist-mnistm"],
        "--pair does not go with --source and --target",
    ),
    (["--source", "a", "--target", "b", "--photos", "c"], "--photos does not go with --source and --target"),
    (["--source", "a", "--target", "b", "--mnist", "c"], "--mnist does not go with --source and --target"),
    (["--pair", "digits-mnist", "--photos", "c"], "--photos does not go with --pair digits-mnist"),
    (["--pair", "digits-mnist", "--redraw"], "--redraw does not go with --pair digits-mnist"),
    (["--size", "20"], "--size does not go with --pair mnist-mnistm"),
    (["--source", "a", "--target", "b", "--size", "0"], "size: images of 0x0 are too small"),
    (["--jobs", "0"], "--jobs must be at least 1, got 0"),
    (["--seeds", "1", "1"], "--seeds: each once"),
    (["--lr", "-1"], "lr must be positive, got -1"),
    (["--ceiling", "nan"], "ceiling must be a number from 0 on"),
    (["--clip", "-1"], "clip must be a number from 0 on, got -1"),
    (["--average", "1"], "average must be in [0, 1), got 1"),
    (["--batch", "7"], "batch must be even"),
]


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [(simgan.main, *case) for case in SIMGAN] + [(dann.main, *case) for case in DANN],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_one_line(capsys, tmp_path, monkeypatch, main, words, message):
    monkeypatch.chdir(tmp_path)
    forbid_training(monkeypatch)
    monkeypatch.setattr(dann_data, "mnist_to_mnistm", lambda *_: pytest.fail("has begun to read"))
    line = refused(main, capsys, *words)
    assert message in line and line.startswith("fastda ")


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        ({"mirror": 50}, 28, "mirror must be less than the sides of the images, got 50 for images of 28×28"),
        ({"match": 1000}, 28, "match must not exceed the images' sides, got 1000 for images of 28×28"),
        ({}, 1, "images of 1×1 are too small, 12×12 is the least"),
        ({}, 3, "images of 3×3 are too small"),
    ],
)
def test_settings_that_do_not_fit_the_images_are_named(domains, change, size, message):
    parts = {
        name: data.Images(getattr(domains, name).x[..., :size, :size], getattr(domains, name).y)
        for name in ("synthetic", "synthetic_test", "real", "real_test")
    }
    with pytest.raises(command.SettingsError, match=re.escape(message)):
        Trainer(replace(domains, **parts), replace(QUICK_SIMGAN, **change))


# ---------------------------------------------------------------------------------------- what is shown


def test_pictures_are_taken_from_everywhere(domains):
    for count, wanted in ((1000, 400), (801, 400), (400, 400), (7, 400), (1, 5)):
        picked = page.spread(count, wanted)
        assert len(picked) == min(count, wanted) == len(set(picked.tolist()))
        assert picked[0] == 0 and picked[-1] == count - 1
    labels = torch.arange(10).repeat_interleave(100)
    assert labels[page.spread(1000, 400)].bincount().min() >= 39
    # Real images without labels, dark ones first, as they lie in a folder.
    x = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    _, real = report.shown(replace(domains, task="", real_test=data.Images(x)))
    assert real.float().amax() > 150 and 60 < real.float().mean() < 140


def test_a_report_says_in_words_that_refining_did_not_help():
    def result(raw, refined, **more):
        return {"measures": {"two_sample": {"raw": raw, "refined": refined}, **more}}

    accuracy = {"raw": 0.5, "refined": 0.4, "raw + refined": 0.5}
    assert report.words([result(1.0, 0.7)]) == []
    assert "did not make" in report.words([result(1.0, 1.0)])[0]
    assert "no better" in report.words([result(1.0, 0.7, accuracy=accuracy)])[0]
    assert report.words([result(1.0, 0.7, accuracy={**accuracy, "refined": 0.6})]) == []
