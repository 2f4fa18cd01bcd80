"""ReLU and max-pooling. A program has a run of the result: outputs forward, inputs backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastda import _torch
from fastda.registry.pool import extent
from fastda.triton.common import launch, operator, wide_tl

BLOCK = 512
NO_INDEX = tl.constexpr(255)  # csrc/common/pool.h


@triton.jit
def place_of(i, channels, height, width, other, LAST: tl.constexpr):
    """Row and column of entry i, and where its channel starts in images of `other` pixels."""
    channel = 0
    if LAST:
        channel = i % channels
        i = i // channels
    column = i % width
    row = i // width % height
    plane = i // width // height
    if LAST:
        return row, column, plane * other * channels + channel
    return row, column, plane * other


@triton.jit
def pool_kernel(
    x,
    y,
    indices,  # or None
    total,
    channels,
    height,
    width,
    out_height,
    out_width,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    RELU: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest entries of the windows and their places; the first of equal ones, the last NaN."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < total
    row, column, plane = place_of(i, channels, out_height, out_width, height * width, LAST)
    top = row * STRIDE_H - PAD_H
    left = column * STRIDE_W - PAD_W
    step = channels if LAST else 1
    if RELU:
        largest = tl.zeros([BLOCK], WIDE)
        index = tl.full([BLOCK], NO_INDEX, tl.int32)
    else:
        largest = tl.full([BLOCK], float("-inf"), WIDE)
        first = tl.where(top < 0, -top, 0) * KERNEL_W + tl.where(left < 0, -left, 0)
        index = first.to(tl.int32)
    for place in range(KERNEL_H * KERNEL_W):
        r = top + place // KERNEL_W
        c = left + place % KERNEL_W
        within = inside & (r >= 0) & (r < height) & (c >= 0) & (c < width)
        v = tl.load(x + plane + (r * width + c) * step, mask=within, other=0.0).to(WIDE)
        wins = within & ((v > largest) | (v != v))
        largest = tl.where(wins, v, largest)
        index = tl.where(wins, place, index)
    tl.store(y + i, largest.to(y.dtype.element_ty), mask=inside)
    if indices is not None:
        tl.store(indices + i, index.to(tl.uint8), mask=inside)


@triton.jit
def pool_backward_kernel(
    grad,
    indices,
    out,
    total,
    channels,
    height,
    width,
    out_height,
    out_width,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What every input won, over the windows that it is in, in their order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < total
    row, column, plane = place_of(i, channels, height, width, out_height * out_width, LAST)
    step = channels if LAST else 1
    above = row + PAD_H - KERNEL_H
    before = column + PAD_W - KERNEL_W
    first_row = tl.where(above < 0, 0, above // STRIDE_H + 1)
    first_column = tl.where(before < 0, 0, before // STRIDE_W + 1)
    ACROSS: tl.constexpr = (KERNEL_W + STRIDE_W - 1) // STRIDE_W
    DOWN: tl.constexpr = (KERNEL_H + STRIDE_H - 1) // STRIDE_H
    total_won = tl.zeros([BLOCK], WIDE)
    for window in range(DOWN * ACROSS):
        r = first_row + window // ACROSS
        c = first_column + window % ACROSS
        down = row + PAD_H - r * STRIDE_H
        across = column + PAD_W - c * STRIDE_W
        within = inside & (r < out_height) & (c < out_width) & (down >= 0) & (across >= 0)
        at = plane + (r * out_width + c) * step
        index = tl.load(indices + at, mask=within, other=255).to(tl.int64)
        g = tl.load(grad + at, mask=within, other=0.0).to(WIDE)
        total_won += tl.where(within & (index == down * KERNEL_W + across), g, 0.0)
    tl.store(out + i, total_won.to(out.dtype.element_ty), mask=inside)


def _sizes(x: Tensor, y: Tensor) -> tuple[int, ...]:
    return x.shape[1], x.shape[2], x.shape[3], y.shape[2], y.shape[3]


def _laid_out(x: Tensor, memory_format: torch.memory_format, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format)


@operator
def relu_max_pool(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    relu: bool,
    keep_indices: bool,
) -> tuple[Tensor, Tensor]:
    """The largest entries and, if they are to be kept, their places in their windows as uint8."""
    layout = _torch.memory_format(x)
    x = x.contiguous(memory_format=layout)
    size = [extent(x.shape[2 + d], kernel_size[d], stride[d], padding[d], ceil_mode) for d in range(2)]
    y = _laid_out(x, layout, *x.shape[:2], *size, dtype=x.dtype)
    indices = (
        _laid_out(x, layout, *x.shape[:2], *size, dtype=torch.uint8)
        if keep_indices
        else torch.empty(0, dtype=torch.uint8, device=x.device)
    )
    if y.numel() > 0:
        launch(
            pool_kernel,
            (triton.cdiv(y.numel(), BLOCK),),
            *(x, y, indices if keep_indices else None, y.numel(), *_sizes(x, y)),
            *(*kernel_size, *stride, *padding),
            RELU=relu,
            LAST=layout == torch.channels_last,
            WIDE=wide_tl(x),
            BLOCK=BLOCK,
        )
    return y, indices


@operator
def relu_max_pool_backward(
    grad: Tensor,
    indices: Tensor,
    size: Sequence[int],
    channels_last: bool,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """The gradient of an input of `size` in the given layout."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    grad, indices = (t.contiguous(memory_format=layout) for t in (grad, indices))
    out = _laid_out(grad, layout, *grad.shape[:2], *size, dtype=grad.dtype)
    if out.numel() > 0:
        launch(
            pool_backward_kernel,
            (triton.cdiv(out.numel(), BLOCK),),
            *(grad, indices, out, out.numel(), *_sizes(out, grad)),
            *(*kernel_size, *stride, *padding),
            LAST=channels_last,
            WIDE=wide_tl(grad),
            BLOCK=BLOCK,
        )
    return out
