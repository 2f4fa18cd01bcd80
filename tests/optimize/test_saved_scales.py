"""Reversals that keep their input beside the scale, as their authors' codes have it."""

import pytest
import torch
from torch import nn
from torch.autograd import Function

import fastda


class _Kept(Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        _, scale = ctx.saved_tensors
        return -grad * scale, None


class _Reversal(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return _Kept.apply(x, self.scale)


@pytest.mark.parametrize("entries", [1, 5])
def test_of_two_saved_tensors_the_last_is_the_scale(entries):
    layer, x = _Reversal(torch.tensor(0.3)), torch.randn(entries, requires_grad=True)
    report = fastda.optimize(layer)
    (gradient,) = torch.autograd.grad(layer(x), x, torch.ones(entries))
    assert torch.equal(gradient, torch.full((entries,), -0.3))
    assert len(report.replaced) == 1
    report.undo()
