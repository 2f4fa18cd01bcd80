"""The rows of gradient reversal."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastda.registry.row import BF16, F16, F32, F64, LINEAR, Operator, Tolerance, Workload


def _grad_reverse_backward(grad: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(grad)


OPERATORS = (
    Operator(
        "grad_reverse",
        tensors=lambda options, *size: {"x": size},
        sizes=((1,), (7, 3), (0, 4), (129, 33), (3, 5, 7, 2)),
        tolerances={
            "value": {d: Tolerance(0.0, 0.0) for d in (F32, F64, BF16, F16)},
            "grad": {
                F64: Tolerance(1e-15, 1e-14),
                F32: Tolerance(1e-7, 1e-6),
                BF16: Tolerance(4e-3, 3e-2),
                F16: Tolerance(5e-4, 4e-3),
            },
        },
        raw={"grad_reverse_backward": _grad_reverse_backward},
        options=[
            {},
            {"scale": 0.7},
            {"scale": lambda draw, *size: draw()},
            {"scale": lambda draw, *size: draw(size[0])},
        ],
        large=((128, 768), (64, 32, 24, 24)),
        large_options={"scale": 0.7},
    ),
    Operator(
        "grad_reverse_linear",
        tensors=lambda options, n, i, o: {
            "x": (n, i),
            "weight": (o, i),
            **({"bias": (o,)} if options["bias"] else {}),
        },
        sizes=((1, 1, 1), (5, 7, 3), (37, 129, 65)),
        tolerances=LINEAR,
        options=[
            {"bias": None},
            {"bias": True, "scale": 0.7},
            {"bias": True, "scale": lambda draw, *size: draw()},
            {"bias": True, "scale": lambda draw, *size: draw(size[0])},
        ],
        large=((128, 768, 100), (128, 1024, 1024)),
        large_options={"bias": True, "scale": 0.7},
    ),
)


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.neg() * ctx.scale, None


def reverse(x: Tensor, scale: float) -> Tensor:
    """The layer that most DANN code carries a copy of."""
    return _Reverse.apply(x, scale)


def _reversed_linear(x: Tensor, weight: Tensor, bias: Tensor, scale: float) -> Tensor:
    return F.linear(reverse(x, scale), weight, bias)


WORKLOADS = (
    Workload(
        "grad_reverse",
        "grad_reverse",
        ((128, 768), (128, 1024), (8, 64, 55, 35), (64, 512, 7, 7)),
        "the identity whose backward turns the gradient round: shape of the features",
        {"scale": 0.7},
        {"eager": reverse},
        around=lambda reverse: lambda x, scale: 2 * reverse(x, scale),
        floor=lambda x, scale: x,
        added=True,
    ),
    Workload(
        "grad_reverse",
        "grad_reverse_linear",
        ((128, 768, 100), (128, 320, 100), (128, 1024, 1024)),
        "reversal and the next linear layer in one: batch × inputs → outputs",
        {"bias": True, "scale": 0.7},
        {"eager": _reversed_linear},
        floor=lambda x, weight, bias, scale: F.linear(x, weight, bias),
        flops=lambda n, i, o: 2.0 * n * i * o,
        shown="{}×{}→{}",
    ),
)
