"""The row of ReLU with max-pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastda import _torch
from fastda.registry.row import BF16, F16, F32, F64, Operator, Options, Sizes, Tolerance, Workload


def extent(size: int, kernel: int, stride: int, pad: int, ceil_mode: bool, dilation: int = 1) -> int:
    """Windows along one dimension; every one starts within the image or the padding before it."""
    spare = size + 2 * pad - dilation * (kernel - 1) - 1
    out = (spare + (stride - 1 if ceil_mode else 0)) // stride + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= size + pad else out


def _relu_max_pool(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    relu: bool,
    keep_indices: bool,
) -> tuple[Tensor, Tensor]:
    size = (
        extent(*numbers, ceil_mode) for numbers in zip(x.shape[2:], kernel_size, stride, padding, strict=True)
    )
    y = x.new_empty((*x.shape[:2], *size)).contiguous(memory_format=_torch.memory_format(x))
    return y, torch.empty_like(y, dtype=torch.uint8) if keep_indices else y.new_empty(0, dtype=torch.uint8)


def _relu_max_pool_backward(
    grad: Tensor,
    indices: Tensor,
    size: Sequence[int],
    channels_last: bool,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (*grad.shape[:2], *size)
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)


def _image(options: Options, n: int, c: int, h: int, w: int) -> dict[str, Sizes]:
    return {"x": (n, c, h, w)}


# Nothing is computed but sums of the gradients of overlapping windows.
EXACT = {d: Tolerance(0.0, 0.0) for d in (F32, F64, BF16, F16)}
OPERATORS = (
    Operator(
        "relu_max_pool",
        tensors=_image,
        sizes=((1, 1, 3, 2), (2, 3, 9, 14), (2, 33, 12, 37), (1, 7, 24, 24)),
        tolerances={
            "value": EXACT,
            "grad": {
                F64: Tolerance(1e-15, 1e-14),
                F32: Tolerance(2e-7, 2e-6),
                BF16: Tolerance(5e-3, 6e-2),
                F16: Tolerance(6e-4, 8e-3),
            },
        },
        raw={"relu_max_pool": _relu_max_pool, "relu_max_pool_backward": _relu_max_pool_backward},
        options=[
            {"kernel_size": 2},
            {"kernel_size": 2, "relu": False},
            {"kernel_size": 3, "stride": 2, "padding": 1},
            {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True, "relu": False},
            {"kernel_size": (3, 2), "stride": (1, 3), "padding": (0, 1), "ceil_mode": True},
            {"kernel_size": (2, 4), "stride": 1, "padding": (1, 2), "relu": False},
            {"kernel_size": 2, "padding": 1, "dilation": 2},
        ],
        large=((16, 32, 24, 24), (2, 64, 57, 112)),
        large_options={"kernel_size": 3, "stride": 2, "padding": 1},
    ),
)


def relu_then_pool(x: Tensor, kernel_size: int, stride: int | None = None, padding: int = 0) -> Tensor:
    """As most networks write it."""
    return F.max_pool2d(F.relu(x), kernel_size, stride, padding)


def pool_then_relu(x: Tensor, kernel_size: int, stride: int | None = None, padding: int = 0) -> Tensor:
    """The same function of fewer operations."""
    return F.relu(F.max_pool2d(x, kernel_size, stride, padding))


_FORMULAS = {"eager": pool_then_relu, "ReLU first": relu_then_pool}
WORKLOADS = (
    Workload(
        "pool",
        "relu_max_pool",
        ((128, 32, 24, 24), (128, 64, 24, 24)),
        "ReLU and max-pool 2×2 with stride 2: images × channels × height × width",
        {"kernel_size": 2},
        _FORMULAS,
    ),
    Workload(
        "pool",
        "relu_max_pool",
        ((8, 64, 112, 112),),
        "ReLU and max-pool 3×3 with stride 2 and padding 1: images × channels × height × width",
        {"kernel_size": 3, "stride": 2, "padding": 1},
        _FORMULAS,
    ),
)
