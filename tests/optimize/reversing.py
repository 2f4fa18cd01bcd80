"""Functions that reverse a gradient, as somebody may have written them."""

import torch
from torch import nn
from torch.autograd import Function


def function(backward, forward=None):
    """A Function with this backward, whose forward keeps its scale in every place."""

    def keep(ctx, x, s=0.7):
        ctx.s = s
        ctx.save_for_backward(s if isinstance(s, torch.Tensor) else torch.tensor(s, dtype=torch.float64))
        return x.view_as(x)

    methods = {"forward": staticmethod(forward or keep), "backward": staticmethod(backward)}
    return type("Reverse", (Function,), methods)


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function.apply(*inputs)


def gradient(layer, *scale, shape=(3, 4), dtype=torch.float32):
    torch.manual_seed(1)
    x, grad = torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(shape, dtype=dtype)
    y = layer(x, *scale)
    return torch.autograd.grad(y, x, grad)[0]


def neg_times(ctx, grad):
    return grad.neg() * ctx.s, None


def saved(ctx, grad):
    (s,) = ctx.saved_tensors
    return (grad * s).neg(), None
