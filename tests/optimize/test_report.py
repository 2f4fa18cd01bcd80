"""The report: what it says, what it counts and measures, and that it takes everything back."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import Function

import fastda
from fastda import timing
from fastda.optimize import Calls, Measurement
from tests.optimize.helpers import assert_same

pytestmark = pytest.mark.isa_independent


class GradientReverse(Function):
    @staticmethod
    def forward(ctx, input, coeff=1.0):
        ctx.coeff = coeff
        return input * 1.0

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output.neg() * ctx.coeff, None


class GradientReverseLayer(nn.Module):
    def forward(self, *input):
        return GradientReverse.apply(*input)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))

    def forward(self, x):
        return torch.relu(self.convs(x) + x)


class Refiner(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(), Block())
        self.last = nn.Conv2d(8, 1, 1)
        self.grl = GradientReverseLayer()

    def forward(self, x):
        return self.grl(self.last(self.blocks(self.down(self.first(x)))))


@pytest.fixture
def served_refiner():
    model = Refiner()
    report = fastda.optimize(model)
    yield model, report
    report.undo()


def test_it_reads_well_and_no_range_spans_what_it_does_not_hold(served_refiner):
    _, report = served_refiner
    assert (
        str(report)
        == """\
fastda.optimize(Refiner): 7 replaced, 1 left
replaced
  first.0                      Conv2d                convolution → conv_same
  blocks.0.convs.0 … last (5)  Conv2d                convolution → conv_same
  grl                          GradientReverseLayer  gradient reversal GradientReverse → one pass over the \
gradient, where it made two
left as it was
  down  Conv2d  stride (2, 2)"""
    )


def test_calls_are_counted(served_refiner):
    model, report = served_refiner
    for _ in range(3):
        model(torch.randn(1, 1, 8, 6)).sum().backward()
    model.first[0](torch.randn(1, 8, 6))  # unbatched, as torch understands it: one image too many dims short
    calls = report.calls()
    assert calls.pop("first.0") == Calls(3, 4)
    assert set(calls.values()) == {Calls(3, 3)}
    assert str(calls["grl"]) == "served 3 of 3 calls"


def test_parameters_and_state_stay_what_they_were(served_refiner):
    model, _ = served_refiner
    assert list(model.state_dict()) == list(Refiner().state_dict())
    Refiner().load_state_dict(model.state_dict())
    model.load_state_dict(Refiner().state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in Refiner().modules()]


def test_undo_leaves_nothing_behind():
    model = Refiner()
    before = [dict(vars(m)) for m in model.modules()]
    report = fastda.optimize(model)
    report.undo()
    assert [dict(vars(m)) for m in model.modules()] == before
    assert not report.replaced
    assert not report.calls()
    assert str(report).startswith("fastda.optimize(Refiner): 0 replaced, 1 left\nleft as it was\n  down")
    report.undo()


def test_twice_changes_no_layer_more_and_each_undoes_its_own():
    model = Refiner()
    first, second = fastda.optimize(model), fastda.optimize(model)
    assert [e.path for e in second.replaced] == ["grl"]  # its Function is for all who use it
    second.undo()
    assert "_conv_forward" in vars(model.last)
    assert hasattr(GradientReverse.backward, "reversal")
    first.undo()
    assert "_conv_forward" not in vars(model.last)
    assert not hasattr(GradientReverse.backward, "reversal")


def test_a_copy_leaves_the_model_alone():
    model = Refiner()
    report = fastda.optimize(model, inplace=False)
    assert report.model is not model
    assert "_conv_forward" not in vars(model.last)
    assert "_conv_forward" in vars(report.model.last)
    assert_same(report.model, model, torch.randn(1, 1, 8, 6))
    report.undo()


def test_undo_refuses_what_was_changed_since_and_then_changes_nothing():
    model = Refiner()
    report = fastda.optimize(model)
    patch = model.last._conv_forward = lambda *args: None
    with pytest.raises(
        RuntimeError, match=r"undo: last: _conv_forward was changed after fastda\.optimize, to "
    ):
        report.undo()
    assert vars(model.last)["_conv_forward"] is patch
    assert "_conv_forward" in vars(model.first[0])
    del model.last._conv_forward
    model.last.__dict__["_conv_forward"] = report._changes[-2][1]
    report.undo()


def test_modules_in_two_places_exchanged_ones_and_scripted_ones():
    block = Block()
    scripted = torch.jit.script(nn.Conv2d(3, 3, 3, padding=1))
    model = nn.ModuleDict({"a": nn.ModuleList([block, block]), "b": nn.Sequential(block, scripted)})
    report = fastda.optimize(model)
    assert [e.path for e in report.replaced] == ["a.0.convs.0", "a.0.convs.2"]
    model["a"] = model["b"] = block.convs[2] = nn.Identity()
    assert report.calls()["a.0.convs.2"] == (0, 0)  # that layer is gone
    report.undo()
    assert "_conv_forward" not in vars(block.convs[0])


def test_a_module_that_takes_no_attributes_is_served_and_restored():
    class Strict(nn.Conv2d):
        def __setattr__(self, name, value):
            if "weight" in vars(self).get("_parameters", ()):
                raise AttributeError(name)
            super().__setattr__(name, value)

    model = nn.Sequential(Strict(3, 3, 3, bias=False))
    before = dict(vars(model[0]))
    report = fastda.optimize(model)
    assert [e.path for e in report.replaced] == ["0"]
    report.undo()
    assert vars(model[0]) == before


def test_a_module_that_cannot_be_looked_at_is_left_and_the_rest_is_served():
    class Broken(nn.Conv2d):
        @property
        def out_channels(self):
            raise ValueError("no channels")

        @out_channels.setter
        def out_channels(self, value):
            pass

    conv = Broken.__new__(Broken)
    nn.Module.__init__(conv)
    model = nn.Sequential(conv, nn.Conv2d(3, 3, 3))
    report = fastda.optimize(model)
    assert [e.path for e in report.replaced] == ["1"]
    assert report.left[0].what.startswith("could not be looked at: ")


def test_nothing_is_tried_out():
    class Counts(nn.Module):
        calls = 0

        def forward(self, x):
            Counts.calls += 1
            return x

    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))
    hooked = nn.Conv2d(8, 8, 3)
    hooked.register_forward_hook(lambda *args: 1 / 0)
    model = nn.Sequential(Counts(), conv, hooked, torch.nn.utils.spectral_norm(nn.Conv2d(8, 8, 3))).double()
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = fastda.optimize(model)
    assert len(report.replaced) == 3
    assert Counts.calls == 0
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(a, state[name]) for name, a in model.state_dict().items())


@pytest.mark.parametrize(
    "surroundings",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_what_surrounds_the_call_does_not_matter(surroundings):
    model = Refiner()
    with surroundings():
        report = fastda.optimize(model)
    again = fastda.optimize(Refiner())
    assert report.replaced == again.replaced
    report.undo(), again.undo()


def test_only_modules_are_accepted():
    with pytest.raises(TypeError, match=r"optimize: model must be a torch.nn.Module, got function"):
        fastda.optimize(lambda x: x)


def test_measure_compares_with_what_was_before(served_refiner):
    model, report = served_refiner
    x = torch.randn(2, 1, 16, 12)
    state, before = copy.deepcopy(model.state_dict()), report.calls()
    measured = report.measure(x, rounds=2)
    low, high = measured.forward_interval
    assert 0 < low <= measured.forward <= high
    low, high = measured.step_interval
    assert 0 < low <= measured.step <= high
    assert measured.value_error < 1e-5
    assert measured.gradient_error < 1e-4
    assert "× (" in str(measured) and "forward + backward; values differ by" in str(measured)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    # The layers are copies; a Function is the same for both, and its calls are counted.
    assert {**report.calls(), "grl": before["grl"]} == before
    model.requires_grad_(False)
    assert report.measure(x, rounds=1).step is None


def test_measure_repeats_short_calls_and_says_where_nothing_is_gained(monkeypatch):
    model = nn.Conv2d(8, 8, 3)
    report = fastda.optimize(model)
    repeats = []
    timed = timing.timed

    def spy(call):
        sample = timed(call)
        return lambda n: repeats.append(n) or sample(n)

    monkeypatch.setattr(timing, "timed", spy)
    report.measure(torch.randn(1, 8, 4, 4), rounds=1)
    assert max(repeats) > 10
    gained = Measurement(1.5, 0.99, 0.0, 0.0, (1.4, 1.6), (0.9, 1.1))
    assert str(gained) == (
        "1.50× (1.40 … 1.60) forward, 0.99× (0.90 … 1.10, nothing gained) forward + backward; "
        "values differ by 0.0e+00, gradients by 0.0e+00"
    )
