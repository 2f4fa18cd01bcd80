"""Results of a model, and how far a model of several layers may be off another one."""

import copy

import torch
from torch import nn

import fastda
from fastda.testing import Tolerance, error

BOUNDS = {torch.float64: (1e-13, 1e-12), torch.float32: (1e-5, 1e-4)}


def results(model, *inputs):
    """Output and the gradients of the floating inputs and the parameters, under a fixed output gradient."""
    leaves = [
        i.detach().clone().requires_grad_() if isinstance(i, torch.Tensor) and i.is_floating_point() else i
        for i in inputs
    ]
    y = model(*leaves)
    wanted = [*(i for i in leaves if isinstance(i, torch.Tensor) and i.requires_grad), *model.parameters()]
    weight = torch.arange(1, y.numel() + 1, dtype=y.dtype).view(y.shape) / y.numel()
    return y.detach(), torch.autograd.grad(y, wanted, weight, allow_unused=True, materialize_grads=True)


def assert_same(model, original, *inputs):
    """Values and gradients of the two agree as far as several layers can."""
    (y, grads), (expected, expected_grads) = results(model, *inputs), results(original, *inputs)
    for actual, right in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert error(actual, right).within(Tolerance(*BOUNDS[y.dtype]))
    assert y.stride() == expected.stride()


def served(report):
    """How many calls were served in all."""
    return sum(calls.served for calls in report.calls().values())


def outcome(call):
    """What a call returns, or the type and text of what it raises."""
    try:
        return call()
    except Exception as problem:
        return type(problem), str(problem)


def pair(*layers, dtype=torch.float64):
    """A Sequential as it is, the same optimized, and the report."""
    original = nn.Sequential(*layers).to(dtype)
    model = copy.deepcopy(original)
    return model, original, fastda.optimize(model)


def image(*shape, dtype=torch.float64):
    return torch.randn(*(shape or (2, 8, 9, 7)), dtype=dtype)
