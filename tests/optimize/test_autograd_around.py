"""What autograd and a compiler are asked around a served convolution."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastda
from tests.optimize.checking import served
from tests.optimize.tools import close, image


def both(call):
    """What `call` gives, or the kind of error, of a convolution and of the served one."""
    torch.manual_seed(0)
    original = nn.Conv2d(4, 4, 3, padding=1)
    model = copy.deepcopy(original)
    report = fastda.optimize(model)
    model(image())
    assert served(report) > 0
    results = []
    for each in (original, model):
        try:
            results.append(call(each))
        except RuntimeError as error:
            results.append(type(error).__name__)
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:
        close(results[1], results[0])
    return results[0]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("what", ["input", "weight", "bias"])
def test_a_change_in_place_between_forward_and_backward(what, frozen, autocast):
    def call(model):
        model.requires_grad_(not frozen)
        leaf = image().requires_grad_()
        x = leaf * 1.0
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        with torch.no_grad():
            {"input": x, "weight": model.weight, "bias": model.bias}[what].mul_(2.0)
        wanted = [leaf, *(p for p in model.parameters() if p.requires_grad)]
        return [
            g / (1 + g.abs().max()) if autocast else g for g in torch.autograd.grad(y.float().sum(), wanted)
        ]

    assert isinstance(both(call), str) == (what != "bias" and not autocast)


def test_batched_gradients():
    def call(model):
        x = image().requires_grad_()
        y = model(x)
        grads = torch.arange(3 * y.numel(), dtype=y.dtype).view(3, *y.shape) / y.numel()
        return torch.autograd.grad(y, [x, *model.parameters()], grads, is_grads_batched=True)

    assert not isinstance(both(call), str)


@pytest.mark.parametrize("counted", ["forward", "backward"])
def test_a_checkpoint_of_which_one_half_is_counted(counted):
    """One half is served and the other is not: what they save is of the same form."""

    def call(model):
        x = image().requires_grad_()
        if counted == "forward":
            with FlopCounterMode(display=False):
                y = checkpoint(model, x, use_reentrant=False).square().sum()
            y.backward()
        else:
            y = checkpoint(model, x, use_reentrant=False).square().sum()
            with FlopCounterMode(display=False):
                y.backward()
        return x.grad

    assert not isinstance(both(call), str)


@pytest.mark.isa_independent
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("padding", (0, 0)),
        ("stride", (2, 2)),
        ("dilation", (2, 2)),
        ("padding_mode", "circular"),
        ("bias", None),
    ],
)
def test_a_setting_that_changes_behind_a_compiler(name, value):
    def call(model):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        before = compiled(image())
        setattr(model, name, value)
        return before, compiled(image())

    assert not isinstance(both(call), str)
    torch._dynamo.reset()
