"""The rows of the refiner's convolutions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastda import _torch, reference
from fastda.registry.row import (
    F16,
    F32,
    F64,
    LINEAR,
    Operator,
    Options,
    Sizes,
    Tolerance,
    Workload,
    clear_of_zero,
    grid,
)

# Winograd's transforms cost what docs/performance.md derives. A weight's gradient is a sum over all pixels,
# of which PyTorch's own loses as much.
TOLERANCES = {
    "value": {**LINEAR["value"], F64: Tolerance(3e-15, 3e-14), F32: Tolerance(1.5e-6, 3e-5)},
    # PyTorch's own float16 gradients are off by 1.04e-3 on CPUs that have no float16 arithmetic.
    "grad": {
        **LINEAR["grad"],
        F64: Tolerance(3e-15, 3e-14),
        F32: Tolerance(2e-6, 4e-5),
        F16: Tolerance(2e-3, 2e-2),
    },
}
for _name in ("weight", "weight1", "weight2"):
    TOLERANCES[_name] = {**TOLERANCES["grad"], F32: Tolerance(1e-5, 1e-4)}


def _image(x: Tensor, channels: Any, more: int = 0) -> Tensor:
    """An empty (N, channels, H + more, W + more) in the memory format of x."""
    shape = (x.shape[0], channels, x.shape[2] + more, x.shape[3] + more)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_torch.memory_format(x))


def _conv_same(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    tf32: bool = False,
    negative_slope: float = 0.0,
    reflect: bool = False,
) -> Tensor:
    return _image(x, weight.shape[0])


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    padding: int,
    relu: bool,
    negative_slope: float = 0.0,
) -> Tensor:
    more = 2 * padding + 1 - weight.shape[2]
    return _image(x, weight.shape[0], more)


def _conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    output: Tensor | None,
    padding: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    negative_slope: float = 0.0,
) -> tuple[Tensor, ...]:
    return _conv_same_backward(grad, x, weight, output, need_x, need_weight, need_bias)


def _conv2d_max_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: int,
    size: int,
    relu: bool,
    keep_indices: bool,
) -> tuple[Tensor, Tensor]:
    height, width = ((n + 2 * padding + 1 - weight.shape[2]) // size for n in x.shape[2:])
    shape = (x.shape[0], weight.shape[0], height, width)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_torch.memory_format(x))
    if not keep_indices:
        return y, x.new_empty(0, dtype=torch.uint8)
    return y, torch.empty_like(y, dtype=torch.uint8, memory_format=torch.channels_last)


def _conv2d_max_pool_backward(
    grad: Tensor,
    indices: Tensor,
    x: Tensor,
    weight: Tensor,
    padding: int,
    size: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    return _conv_same_backward(grad, x, weight, None, need_x, need_weight, need_bias)


def _conv2d_stride2(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    height, width = ((size + 2 * padding) // 2 - 1 for size in x.shape[2:])
    shape = (x.shape[0], weight.shape[0], height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_torch.memory_format(x))


def _conv2d_stride2_backward(
    grad: Tensor, x: Tensor, weight: Tensor, padding: int, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, ...]:
    return _conv_same_backward(grad, x, weight, None, need_x, need_weight, need_bias)


def _conv_same_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    output: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    tf32: bool = False,
    negative_slope: float = 0.0,
    reflect: bool = False,
) -> tuple[Tensor, ...]:
    return (
        _image(x, x.shape[1]) if need_x else x.new_empty(0),
        x.new_empty(weight.shape if need_weight else 0),
        x.new_empty(weight.shape[0] if need_bias else 0),
    )


def _refiner_block(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    keep_inner: bool,
    tf32: bool = False,
    negative_slope: float = 0.0,
) -> tuple[Tensor, Tensor]:
    inner = _image(x, weight1.shape[0])
    if x.device.type == "cpu":
        inner = inner.contiguous(memory_format=torch.channels_last)  # whatever x is
    return _image(x, x.shape[1]), inner if keep_inner else x.new_empty(0)


def _refiner_block_backward(
    grad: Tensor,
    x: Tensor,
    inner: Tensor | None,
    output: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    need_x: bool,
    need_weight1: bool,
    need_bias1: bool,
    need_weight2: bool,
    need_bias2: bool,
    tf32: bool = False,
    negative_slope: float = 0.0,
) -> tuple[Tensor, ...]:
    return (
        _image(x, x.shape[1]) if need_x else x.new_empty(0),
        x.new_empty(weight1.shape if need_weight1 else 0),
        x.new_empty(weight1.shape[0] if need_bias1 else 0),
        x.new_empty(weight2.shape if need_weight2 else 0),
        x.new_empty(weight2.shape[0] if need_bias2 else 0),
    )


def _conv_shapes(options: Options, n: int, c: int, k: int, size: int, h: int, w: int) -> dict[str, Sizes]:
    if options.get("padding_mode") == "reflect":  # of fewer pixels than there are
        h, w = max(h, size // 2 + 1), max(w, size // 2 + 1)
    shapes: dict[str, Sizes] = {"x": (n, c, h, w), "weight": (k, c, size, size)}
    if options.get("bias", True):
        shapes["bias"] = (k,)
    if options.get("residual"):
        more, stride = 2 * options.get("padding", size // 2) - size, options.get("stride", 1)
        shapes["residual"] = (n, k, (h + more) // stride + 1, (w + more) // stride + 1)
    return shapes


def _block_shapes(options: Options, n: int, c: int, size: int, h: int, w: int) -> dict[str, Sizes]:
    weight: Sizes = (c, c, size, size)
    bias: Sizes = (c,)
    return {"x": (n, c, h, w), "weight1": weight, "bias1": bias, "weight2": weight, "bias2": bias}


def _settle_conv(a: dict[str, Any], margin: float) -> None:
    if a.get("relu") or a.get("negative_slope") is not None:
        convolve = reference.conv2d if "padding" in a else reference.conv_same
        a["bias"] += clear_of_zero(convolve(**{**a, "relu": False, "negative_slope": None}), margin)


def _settle_pool(a: dict[str, Any], margin: float) -> None:
    """Pixels of x are shifted until no two entries of a window are so close that rounding may turn them."""
    size, padding, k = a["kernel_size"], a["padding"], a["weight"].shape[2]
    generator = torch.Generator().manual_seed(0)
    while True:
        y = F.conv2d(a["x"], a["weight"], a["bias"], padding=padding)
        windows = y.unfold(2, size, size).unfold(3, size, size).flatten(4)
        first = windows.topk(min(2, windows.shape[4]), dim=4).values
        close = (first[..., 0] - first[..., -1] < margin / 10).any(1) & (size > 1)
        if not close.any():
            break
        n, h, w = close.nonzero().T
        height, width = a["x"].shape[2:]
        h = (h * size + k // 2 - padding).clamp(0, height - 1)
        w = (w * size + k // 2 - padding).clamp(0, width - 1)
        shift = torch.randn((len(n), a["x"].shape[1]), dtype=y.dtype, generator=generator)
        a["x"][n, :, h, w] += shift.to(y.device)
    if a.get("relu", True):
        a["bias"] += clear_of_zero(F.max_pool2d(y, size), margin)


def _settle_block(a: dict[str, Any], margin: float) -> None:
    a["bias1"] += clear_of_zero(reference.conv_same(a["x"], a["weight1"], a["bias1"]), margin)
    slope = a.get("negative_slope", 0.0)
    hidden = reference.conv_same(a["x"], a["weight1"], a["bias1"], negative_slope=slope)
    a["bias2"] += clear_of_zero(
        reference.conv_same(hidden, a["weight2"], a["bias2"], residual=a["x"]), margin
    )


def _unit_terms(options: Options, *sizes: int) -> dict[str, float]:
    return dict.fromkeys(("value", "x", "weight", "weight1", "bias1", "weight2", "bias2"), 1.0)


OPERATORS = (
    Operator(
        "conv_same",
        tensors=_conv_shapes,
        sizes=(
            *((1, 1, 1, 1, 1, 1), (2, 3, 5, 1, 7, 9), (1, 7, 4, 5, 3, 2)),
            *((2, 17, 33, 3, 11, 13), (1, 64, 64, 3, 19, 21), (2, 16, 16, 7, 13, 17)),
        ),
        tolerances=TOLERANCES,
        raw={"conv_same": _conv_same, "conv_same_backward": _conv_same_backward},
        options=[
            {"bias": None},
            *grid(residual=(None, True), relu=(False, True)),
            *grid(residual=(None, True), negative_slope=(0.2,)),
            {"padding_mode": "reflect"},
            {"padding_mode": "reflect", "residual": True, "relu": True},
        ],
        large=((8, 64, 64, 3, 35, 55), (2, 64, 64, 7, 56, 56)),
        large_options={"relu": True},
        settle=_settle_conv,
        magnitudes=_unit_terms,
    ),
    Operator(
        "conv2d",
        tensors=_conv_shapes,
        sizes=(
            *((1, 1, 1, 4, 4, 4), (2, 3, 5, 3, 7, 9), (1, 7, 4, 2, 5, 3)),
            *((2, 17, 33, 5, 11, 13), (1, 16, 20, 5, 37, 6), (1, 20, 16, 7, 12, 9), (2, 17, 20, 4, 19, 22)),
        ),
        tolerances=TOLERANCES,
        raw={
            "conv2d": _conv2d,
            "conv2d_backward": _conv2d_backward,
            "conv2d_stride2": _conv2d_stride2,
            "conv2d_stride2_backward": _conv2d_stride2_backward,
        },
        options=[
            {"bias": None},
            *({"padding": 1, "relu": True}, {"residual": True, "padding": 0}),
            {"residual": True, "relu": True, "padding": 1},
            {"residual": True, "negative_slope": 0.2, "padding": 1},
            {"padding": 1, "padding_mode": "reflect"},
            {"dilation": 2, "padding": 2, "relu": True},
            {"stride": 2, "padding": 1},
            {"stride": 2, "padding": 1, "residual": True, "negative_slope": 0.2},
        ],
        large=((16, 32, 48, 5, 18, 18), (1, 64, 64, 5, 56, 56)),
        large_options={"relu": True},
        settle=_settle_conv,
        magnitudes=_unit_terms,
    ),
    Operator(
        "conv2d_max_pool",
        tensors=_conv_shapes,
        sizes=(
            *((1, 1, 1, 4, 5, 5), (2, 3, 5, 3, 7, 9), (1, 7, 4, 2, 5, 3), (2, 3, 33, 5, 17, 14)),
            *((2, 17, 33, 5, 11, 13), (1, 16, 20, 5, 37, 8), (1, 20, 16, 3, 12, 9)),
        ),
        tolerances=TOLERANCES,
        raw={"conv2d_max_pool": _conv2d_max_pool, "conv2d_max_pool_backward": _conv2d_max_pool_backward},
        # Where rounding is coarser, it picks the winners.
        dtypes=(F32, F64),
        options=(
            *({"padding": 0, "kernel_size": 2}, {"padding": 1, "kernel_size": 2, "relu": False}),
            {"padding": 1, "kernel_size": 3},
            {"bias": None, "padding": 0, "kernel_size": 1, "relu": False},
        ),
        large=((16, 3, 32, 5, 28, 28), (16, 32, 48, 5, 14, 14), (2, 64, 64, 3, 35, 55)),
        large_options={"padding": 1, "kernel_size": 2},
        settle=_settle_pool,
        magnitudes=_unit_terms,
    ),
    Operator(
        "refiner_block",
        tensors=_block_shapes,
        sizes=((1, 1, 3, 1, 1), (2, 5, 3, 7, 9), (1, 64, 3, 19, 21), (2, 16, 7, 13, 17)),
        tolerances=TOLERANCES,
        raw={"refiner_block": _refiner_block, "refiner_block_backward": _refiner_block_backward},
        options=({}, {"negative_slope": 0.2}),
        large=((8, 64, 3, 35, 55), (2, 64, 7, 56, 56)),
        settle=_settle_block,
        magnitudes=_unit_terms,
    ),
)


def _conv(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    return F.relu(F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2), inplace=True)


def block(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    pad = weight1.shape[-1] // 2
    y = F.relu(F.conv2d(x, weight1, bias1, padding=pad), inplace=True)
    return F.conv2d(y, weight2, bias2, padding=pad).add_(x).relu_()


def convolution_flops(n: int, c: int, k: int, size: int, h: int, w: int) -> float:
    return 2.0 * n * c * k * size * size * h * w


def _conv2d_workload(variant: str, sizes: tuple[Sizes, ...], what: str, **options: int) -> Workload:
    return Workload(
        "convolution",
        "conv2d",
        sizes,
        f"{what}: images × channels × height × width → channels, filters' height × width",
        options=options,
        variant=variant,
        formulas={"eager": F.conv2d},
        modes=("forward", "backward"),
        flops=lambda n, c, k, size, h, w: convolution_flops(
            *(n, c, k, size),
            *(
                (s + 2 * options["padding"] - options["dilation"] * (size - 1) - 1) // options["stride"] + 1
                for s in (h, w)
            ),
        ),
        shown="{0}×{1}×{4}×{5} → {2}, {3}×{3}",
    )


BLOCKS = ((3, 64, 3, 37, 53), (32, 64, 3, 35, 55), (2, 64, 3, 224, 224), (1, 64, 3, 35, 55))
WORKLOADS = (
    Workload(
        "refiner",
        "refiner_block",
        (*BLOCKS, (2, 64, 7, 112, 112)),
        "residual block of two convolutions: images × channels × height × width, filters' height × width",
        formulas={"eager": block},
        modes=("forward", "backward"),
        two_threads=BLOCKS[1:2],
        flops=lambda n, c, size, h, w: 2 * convolution_flops(n, c, c, size, h, w),
        shown="{0}×{1}×{3}×{4}, {2}×{2}",
    ),
    _conv2d_workload(
        "valid",
        (
            *((128, 32, 48, 5, 14, 14), (128, 96, 144, 5, 18, 18), (1, 64, 64, 5, 256, 256)),
            *((1, 256, 256, 3, 66, 66), (2, 64, 64, 7, 118, 118)),
        ),
        "convolution without padding",
        stride=1,
        padding=0,
        dilation=1,
    ),
    _conv2d_workload(
        "dilated",
        ((1, 256, 256, 3, 45, 80), (1, 64, 64, 3, 128, 128)),
        "convolution of every other pixel",
        stride=1,
        padding=2,
        dilation=2,
    ),
    _conv2d_workload(
        "strided",
        ((1, 64, 128, 4, 128, 128), (32, 64, 128, 4, 64, 64), (1, 128, 256, 4, 64, 64)),
        "convolution with a stride of 2",
        stride=2,
        padding=1,
        dilation=1,
    ),
)
