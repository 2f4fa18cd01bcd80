"""ReLU and max-pooling in one pass, with indices of a byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from fastda import _torch, backend, reference
from fastda.ops.common import is_symbolic, recordable
from fastda.registry.pool import extent

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NO_INDEX = 255  # csrc/common/pool.h
Pair = tuple[int, int]


def _pair(name: str, value: Any, least: int) -> Pair:
    given = value if isinstance(value, (tuple, list)) else (value,)
    plain = all(isinstance(v, (int, torch.SymInt)) and not isinstance(v, bool) for v in given)
    if len(given) not in (1, 2) or not plain:
        raise TypeError(f"relu_max_pool: {name} must be an int or a pair of ints, got {value!r}")
    if any(v < least for v in given):
        raise ValueError(f"relu_max_pool: {name} must be at least {least}, got {value!r}")
    return given[0], given[-1]


def _check(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool) -> None:
    if x.dim() not in (3, 4) or 0 in x.shape[-3:]:
        raise ValueError(
            f"relu_max_pool: x must be (N, C, H, W) or (C, H, W), only N may be 0, got {tuple(x.shape)}"
        )
    if x.dtype not in _DTYPES:
        raise TypeError(f"relu_max_pool: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        raise ValueError(
            f"relu_max_pool: padding must be at most half of kernel_size, got {padding} for {kernel}"
        )
    out = [
        extent(size, k, s, p, ceil_mode, d)
        for size, k, s, p, d in zip(x.shape[-2:], kernel, stride, padding, dilation, strict=True)
    ]
    if any(e < 1 for e in out):
        raise ValueError(
            f"relu_max_pool: x must be large enough for a window, got {tuple(x.shape)} for kernel_size "
            f"{kernel}, padding {padding}, dilation {dilation}"
        )


def spread_winners(
    grad: Tensor,
    indices: Tensor,
    size: Sequence[int],
    channels_last: bool,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
) -> Tensor:
    """The gradient of x from torch's own operators, differentiable in `grad`."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    rows, columns = (torch.arange(n, device=grad.device) for n in grad.shape[2:])
    place = indices.long()
    row = rows[:, None] * stride[0] - padding[0] + place // kernel[1]
    column = columns * stride[1] - padding[1] + place % kernel[1]
    none = place == NO_INDEX
    flat = (row * size[1] + column).masked_fill(none, 0).flatten(2)
    zeros = grad.new_zeros((*grad.shape[:2], size[0] * size[1]))
    d_x = zeros.scatter_add(2, flat, grad.masked_fill(none, 0).flatten(2)).unflatten(2, tuple(size))
    return d_x.contiguous(memory_format=memory_format)


class _ReLUMaxPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel: Pair,
        stride: Pair,
        padding: Pair,
        ceil_mode: bool,
        relu: bool,
        serving: str,
    ) -> Tensor:
        y, indices = backend.kernels(serving).relu_max_pool(x, kernel, stride, padding, ceil_mode, relu, True)
        ctx.serving = serving
        channels_last = _torch.memory_format(x) == torch.channels_last
        ctx.geometry = x.shape[2:], channels_last, kernel, stride, padding
        # Which element won says everything: x and y may go.
        ctx.save_for_backward(indices)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        served = backend.kernels(ctx.serving).relu_max_pool_backward
        d_x = (spread_winners if torch.is_grad_enabled() else served)(grad, indices, *ctx.geometry)
        return d_x, None, None, None, None, None, None


def relu_max_pool(
    x: Tensor,
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] | None = None,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    ceil_mode: bool = False,
    *,
    relu: bool = True,
) -> Tensor:
    """`F.max_pool2d(F.relu(x), …)` in one pass; without `relu`, `F.max_pool2d(x, …)`.

    `F.relu(F.max_pool2d(x, …))`, the order of most networks for digits, is the same function with the same
    gradient. Shapes: x (N, C, H, W) or (C, H, W); kernel_size, stride (default: kernel_size), padding and
    dilation are an int or (vertical, horizontal), as for `F.max_pool2d`; the result is in the memory format
    of x. Dtypes: float32, float64, bfloat16, float16; autocast leaves them as they are. Of equal entries the
    first has the gradient, and of several NaN the last, as in PyTorch.

    Saved for backward: a byte for every output, neither x nor the result. Double backward works; torch.func
    transforms, windows of more than 255 entries and dilation take the reference.

    Raises ValueError for sizes that do not fit, TypeError for dtypes.
    Source: the networks for digits of DANN, arXiv 1505.07818, appendix.
    """
    if is_symbolic(x):
        return handle_torch_function(
            relu_max_pool, (x,), x, kernel_size, stride, padding, dilation, ceil_mode, relu=relu
        )
    if not isinstance(x, Tensor):
        raise TypeError(f"relu_max_pool: x must be a tensor, got {type(x).__name__}")
    kernel = _pair("kernel_size", kernel_size, 1)
    # An empty tuple is torch's own default.
    steps = kernel if stride is None or stride == () else _pair("stride", stride, 1)
    pads, spread = _pair("padding", padding, 0), _pair("dilation", dilation, 1)
    _check(x, kernel, steps, pads, spread, ceil_mode)
    serving = backend.select(x)
    if serving == "reference" or kernel[0] * kernel[1] > NO_INDEX or spread != (1, 1):
        return reference.relu_max_pool(x, kernel, steps, pads, spread, ceil_mode, relu=relu)
    image = x if x.dim() == 4 else x.unsqueeze(0)
    if torch.is_grad_enabled() and x.requires_grad:
        y = _ReLUMaxPool.apply(*recordable(image), kernel, steps, pads, ceil_mode, relu, serving)
    else:
        y = backend.kernels(serving).relu_max_pool(image, kernel, steps, pads, ceil_mode, relu, False)[0]
    return y if x.dim() == 4 else y.squeeze(0)
