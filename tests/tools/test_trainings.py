"""The public trainings of `python -m benchmarks.trainings`, at their smallest."""

import importlib

import pytest
import torch

import fastda
from benchmarks.trainings import TRAININGS, measure, page
from benchmarks.trainings.__main__ import main

pytestmark = [pytest.mark.isa_independent, pytest.mark.gain]
# The others' code views features as rows, which channels_last images are not.
FREE = ("simgan-hands", "simgan-gaze", "cut", "cyclegan", "pixelda", "dann-resnet18", "dann-resnet50")


@pytest.fixture
def float64(monkeypatch):
    """Exact, and small images are served."""
    monkeypatch.setattr(importlib.import_module("fastda.optimize.convolution"), "LEAST_PIXELS", 0)
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("layout", measure.LAYOUTS)
@pytest.mark.parametrize("name", [t.name for t in TRAININGS])
def test_a_step_with_one_line_more_is_the_published_one(name, layout, float64):
    case = measure.Case(name, tiny=True)
    plain, ours = measure.built(case, layout), measure.built(case, layout)
    report = fastda.optimize(ours)
    if layout == "channels_last" and name not in (*FREE, "adaptsegnet"):
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            measure.differences(plain, ours)
        return
    measure.check(measure.differences(plain, ours), float64)
    assert report.replaced


def test_a_step_that_is_another_one_is_not_measured():
    case = measure.Case("dann-resnet18", tiny=True)
    plain, ours = (measure.built(case, "contiguous") for _ in range(2))
    with torch.no_grad():
        ours.head.weight.mul_(1.5)
    with pytest.raises(AssertionError, match="the optimized step's loss differs"):
        measure.check(measure.differences(plain, ours))
    with pytest.raises(AssertionError, match="grad differs by nan"):
        measure.check({"loss": 0.0, "grad": float("nan")})


def test_a_layer_that_takes_no_part_any_more_is_seen():
    case = measure.Case("dann-digits-small", tiny=True)
    plain, ours = (measure.built(case, "contiguous") for _ in range(2))
    ours.classifier[0].bias.requires_grad_(False)
    with pytest.raises(AssertionError, match=r"gradients of other parameters: \['classifier.0.bias'\]"):
        measure.differences(plain, ours)


def test_a_training_is_measured_in_both_layouts_and_becomes_a_line():
    row = measure.measure(measure.Case("simgan-hands", tiny=True), rounds=2)
    assert set(row["contenders"]) == {
        label + at for label in ("eager", "fastda") for at in ("", " channels_last")
    }
    assert row["contenders"]["fastda"]["over fastda"]["ratio"] == 1
    assert 0.5 < sum(row["spent"].values()) <= 1
    assert any(name.startswith("fastda::conv_same_backward") for name in row["spent"])
    row["memory"] = dict.fromkeys(row["contenders"], 100) | {"fastda": 101}
    row["contenders"]["eager"]["over fastda"] = {"ratio": 0.9, "low": 0.8, "high": 0.95}
    name, _, gain, *_, wanted, memory = page.cells(row)
    assert (name, gain, wanted, memory) == (
        "simgan-hands", "**0.90 [0.80–0.95]**", "2.5", "**1.01 / 1.00**"
    )  # fmt: skip


def test_the_memory_of_a_step_is_read_in_a_process_of_its_own():
    case = measure.Case("dann-signs", tiny=True)
    found = measure.peak_memory(case, {"contenders": {"fastda": {}, "torch.compile": {}}})
    images = 4 * 3 * 40 * 40 * 4
    assert found.keys() == {"fastda"} and images < found["fastda"] < 2**28


def test_an_unknown_training_is_an_error(capsys):
    assert main(["--only", "cut,cute"]) == 2
    assert "--only must be one of simgan-hands, simgan-gaze" in capsys.readouterr().err
