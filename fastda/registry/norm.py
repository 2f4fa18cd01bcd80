"""The rows of normalisation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastda import _torch, reference
from fastda.registry.row import (
    BF16,
    F16,
    F32,
    F64,
    LINEAR,
    Draw,
    Operator,
    Options,
    Sizes,
    Tolerance,
    Workload,
    clear_of_zero,
    grid,
)

# What PyTorch's own normalisation, addition and activation lose, each of which rounds 16-bit values; from the
# gradient of x a mean is taken, and that of weight is a sum of values of both signs.
TOLERANCES = {
    "value": {
        F64: Tolerance(3e-15, 3e-14),
        F32: Tolerance(6e-7, 8e-6),
        BF16: Tolerance(1.6e-2, 1.6e-1),
        F16: Tolerance(2e-3, 2e-2),
    },
    "grad": LINEAR["grad"],
    "x": {
        F64: Tolerance(3e-15, 3e-14),
        F32: Tolerance(1.2e-6, 1.5e-5),
        BF16: Tolerance(2e-2, 2e-1),
        F16: Tolerance(4e-3, 4e-2),
    },
    "weight": {
        F64: Tolerance(6e-15, 3e-14),
        F32: Tolerance(2.5e-6, 1.2e-5),
        BF16: Tolerance(5e-2, 1.5e-1),
        F16: Tolerance(6e-3, 2e-2),
    },
}


def _image(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_torch.memory_format(x))


def _norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    per_image: bool,
    eps: float,
    negative_slope: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    count = x.shape[1] * (x.shape[0] if per_image else 1)
    mean, variance = (x.new_empty(count, dtype=torch.float64) for _ in range(2))
    return _image(x), mean, variance


def _norm_act_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    output: Tensor | None,
    per_image: bool,
    through_statistics: bool,
    eps: float,
    negative_slope: float | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_residual: bool,
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(x.dtype, torch.float32)
    channels = (x.new_empty(x.shape[1] if need else 0, dtype=wide) for need in (need_weight, need_bias))
    images = (_image(x) if need else x.new_empty(0) for need in (need_x, need_residual))
    d_x, d_residual = images
    return d_x, *channels, d_residual


def _shapes(options: Options, n: int, c: int, h: int, w: int) -> dict[str, Sizes]:
    shapes: dict[str, Sizes] = {"x": (n, c, h, w)}
    if options.get("weight", True):
        shapes |= {"weight": (c,), "bias": (c,)}
    if options.get("residual"):
        shapes["residual"] = (n, c, h, w)
    return shapes


def _mean(draw: Draw, *sizes: int) -> Tensor:
    return draw(sizes[1])


def _variance(draw: Draw, *sizes: int) -> Tensor:
    return draw(sizes[1]).abs() + 0.5


def _settle_with(name: str) -> Any:
    def settle(a: dict[str, Any], margin: float) -> None:
        if a.get("negative_slope") is not None:
            a["bias"] += clear_of_zero(getattr(reference, name)(**{**a, "negative_slope": None}), margin)

    return settle


def _terms(options: Options, n: int, c: int, h: int, w: int) -> dict[str, float]:
    # Gradients of about one, from which their mean is taken; sums of them times values of both signs.
    return {"x": 1.0, "weight": (n * h * w) ** 0.5}


_STORED = {"training": False, "running_mean": _mean, "running_var": _variance}
_OPTIONS = [
    *grid(residual=(None, True), negative_slope=(0.0, None, 0.01)),
    {"weight": None, "bias": None},
    {"weight": None, "bias": None, "residual": True, "eps": 0.1},
    {"negative_slope": 0.0, "momentum": 0.3, **_STORED},
    {"residual": True, "negative_slope": 0.2, **_STORED},
]
OPERATORS = tuple(
    Operator(
        name,
        tensors=_shapes,
        sizes=((1, 1, 3, 4), (2, 5, 7, 9), (3, 4, 1, 11), (1, 65, 5, 7), (2, 16, 13, 17), (3, 24, 23, 29)),
        tolerances=TOLERANCES,
        raw={"norm_act": _norm_act, "norm_act_backward": _norm_act_backward},
        options=_OPTIONS,
        large=((4, 64, 35, 55), (2, 48, 40, 41)),
        large_options={"residual": True, "negative_slope": 0.01},
        settle=_settle_with(name),
        magnitudes=_terms,
    )
    for name in ("batch_norm_act", "instance_norm_act")
)


def _batch(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, negative_slope: float) -> Tensor:
    y = F.batch_norm(x, None, None, weight, bias, True).add_(residual)
    return F.leaky_relu(y, negative_slope, inplace=True)


def _instance(x: Tensor, weight: Tensor, bias: Tensor, negative_slope: float) -> Tensor:
    return F.relu(F.instance_norm(x, weight=weight, bias=bias), inplace=True)


WORKLOADS = (
    Workload(
        "norm",
        "batch_norm_act",
        ((32, 64, 35, 55), (16, 64, 56, 56)),
        "batch normalisation, addition and leaky ReLU in one: images × channels × height × width",
        {"residual": True, "negative_slope": 0.01},
        {"eager": _batch},
    ),
    Workload(
        "norm",
        "instance_norm_act",
        ((1, 256, 64, 64), (1, 64, 256, 256)),
        "instance normalisation and ReLU in one: images × channels × height × width",
        {"negative_slope": 0.0},
        {"eager": _instance},
    ),
)
