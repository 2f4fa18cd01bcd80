"""Refiner convolutions as implicit matrix products: pixels × (taps · input channels) × output channels.

    out[m, k] = Σ_r x[pixel m moved by the tap of r, channel of r] · filter[r, k],  r = tap · C + channel

Bias, residual, ReLU and the gates of ReLU's backward are applied while tiles are loaded and stored. The data
gradient is the same product with the taps in reverse order. The weight gradient sums over pixels, cut into a
number of pieces that depends on the shapes alone; a second kernel adds the pieces in order.

A gate keeps a value where its own is positive or NaN, else gives 0: ReLU's backward, read off ReLU's output.
A SLOPE above 0 makes every ReLU leaky: a value is kept where its own is positive, and multiplied by SLOPE
where it is not, NaN included.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastda import _torch
from fastda.triton.common import INTERPRETED, launch, operator, platform, wide_dtype, wide_tl


@triton.jit
def gated(value, output, SLOPE: tl.constexpr, WIDE: tl.constexpr):
    if SLOPE == 0:
        kept = tl.where(output <= 0, 0.0, value)
    else:
        kept = tl.where(output > 0, value.to(WIDE), value.to(WIDE) * SLOPE)
    return kept


@triton.jit(do_not_specialize=["plane"])
def conv_kernel(
    x,  # image, channel and pixel strides below
    x_gate,  # like x, or None
    filter,  # [taps, C, K]
    bias,  # [K] or None
    residual,  # like out, or None
    residual_gate,  # like out, or None
    out_gate,  # like out, or None
    out,  # image, channel and pixel strides below
    pixels,  # of all images
    plane,  # pixels of one: height · width
    height,
    width,
    in_channels,
    out_channels,
    x_image,
    x_channel,
    x_pixel,
    out_image,
    out_channel,
    out_pixel,
    KERNEL: tl.constexpr,
    FLIP: tl.constexpr,
    RELU: tl.constexpr,
    SLOPE: tl.constexpr,
    ONE_TAP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Program (i, j) makes the BLOCK_M pixels from i · BLOCK_M, BLOCK_N output channels from j · BLOCK_N.

    ONE_TAP: in_channels is a multiple of BLOCK_R, so that a step of the sum stays within one tap.
    """
    columns = tl.cdiv(out_channels, BLOCK_N)
    begin = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_M
    k = (tl.program_id(0) % columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = begin + tl.arange(0, BLOCK_M) < pixels
    # One division in 64 bits, the others within an image.
    image = begin // plane
    pixel = (begin - image * plane).to(plane.dtype) + tl.arange(0, BLOCK_M)
    image += pixel // plane
    pixel %= plane
    row = pixel // width
    column = pixel - row * width
    place = image * x_image + pixel.to(tl.int64) * x_pixel
    reduced = KERNEL * KERNEL * in_channels
    known = k < out_channels
    lane = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_N), WIDE)
    for start in range(0, reduced, BLOCK_R):
        r = start + lane
        if ONE_TAP:
            tap = start // in_channels
            down = tap // KERNEL - KERNEL // 2
            across = tap % KERNEL - KERNEL // 2
            v = row + down
            u = column + across
            held = inside & (v >= 0) & (v < height) & (u >= 0) & (u < width)
            moved = place + (down * width + across).to(tl.int64) * x_pixel
            at = moved[:, None] + (r - tap * in_channels)[None, :].to(tl.int64) * x_channel
            mask = held[:, None] & (r < reduced)[None, :]
        else:
            tap = r // in_channels
            down = tap // KERNEL - KERNEL // 2
            across = tap % KERNEL - KERNEL // 2
            v = row[:, None] + down[None, :]
            u = column[:, None] + across[None, :]
            mask = (
                (inside[:, None] & (r < reduced)[None, :]) & (v >= 0) & (v < height) & (u >= 0) & (u < width)
            )
            move = (down * width + across).to(tl.int64) * x_pixel
            at = place[:, None] + (move + (r - tap * in_channels).to(tl.int64) * x_channel)[None, :]
        a = tl.load(x + at, mask=mask, other=0.0)
        if x_gate is not None:
            gate = tl.load(x_gate + at, mask=mask, other=0.0)
            a = gated(a, gate, SLOPE, WIDE).to(x.dtype.element_ty)
        entry = r
        if FLIP:
            entry = (KERNEL * KERNEL - 1 - tap) * in_channels + (r - tap * in_channels)
        b = tl.load(
            filter + entry[:, None].to(tl.int64) * out_channels + k[None, :],
            mask=(r < reduced)[:, None] & known[None, :],
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=WIDE)
    at = (image * out_image + pixel.to(tl.int64) * out_pixel)[:, None] + k[None, :].to(tl.int64) * out_channel
    mask = inside[:, None] & known[None, :]
    if bias is not None:
        acc += tl.load(bias + k, mask=known, other=0.0).to(WIDE)[None, :]
    if residual is not None:
        side = tl.load(residual + at, mask=mask, other=0.0).to(WIDE)
        if residual_gate is not None:
            side = gated(side, tl.load(residual_gate + at, mask=mask, other=0.0), SLOPE, WIDE)
        acc += side
    if RELU:
        acc = gated(acc, acc, SLOPE, WIDE)
    if out_gate is not None:
        acc = gated(acc, tl.load(out_gate + at, mask=mask, other=0.0), SLOPE, WIDE)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["plane"])
def weight_grad_kernel(
    x,  # image, channel and pixel strides below
    grad,  # image, channel and pixel strides below
    gate,  # like grad, or None
    sums,  # [pieces, K, taps · C]
    bias_sums,  # [pieces, K] or None
    pixels,
    plane,
    height,
    width,
    in_channels,
    out_channels,
    x_image,
    x_channel,
    x_pixel,
    grad_image,
    grad_channel,
    grad_pixel,
    piece,  # pixels of one piece, a multiple of BLOCK_P
    KERNEL: tl.constexpr,
    SLOPE: tl.constexpr,
    ONE_TAP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Program (i, j) sums piece j for BLOCK_K output channels × BLOCK_N entries r of the filter.

    ONE_TAP: in_channels is a multiple of BLOCK_N, so that the entries of a program share one tap.
    """
    columns = tl.cdiv(KERNEL * KERNEL * in_channels, BLOCK_N)
    k = (tl.program_id(0) // columns) * BLOCK_K + tl.arange(0, BLOCK_K)
    start = (tl.program_id(0) % columns) * BLOCK_N
    r = start + tl.arange(0, BLOCK_N)
    known = k < out_channels
    wanted = r < KERNEL * KERNEL * in_channels
    tap = start // in_channels if ONE_TAP else r // in_channels
    down = tap // KERNEL - KERNEL // 2
    across = tap % KERNEL - KERNEL // 2
    move = (down * width + across).to(tl.int64) * x_pixel + (r - tap * in_channels).to(tl.int64) * x_channel
    acc = tl.zeros((BLOCK_K, BLOCK_N), WIDE)
    bias_acc = tl.zeros((BLOCK_K,), WIDE)
    first = tl.program_id(1).to(tl.int64) * piece
    for step in range(0, piece, BLOCK_P):
        begin = first + step
        inside = begin + tl.arange(0, BLOCK_P) < pixels
        image = begin // plane
        pixel = (begin - image * plane).to(plane.dtype) + tl.arange(0, BLOCK_P)
        image += pixel // plane
        pixel %= plane
        row = pixel // width
        column = pixel - row * width
        at = (image * grad_image + pixel.to(tl.int64) * grad_pixel)[None, :] + k[:, None].to(
            tl.int64
        ) * grad_channel
        mask = inside[None, :] & known[:, None]
        a = tl.load(grad + at, mask=mask, other=0.0)
        if gate is not None:
            held = tl.load(gate + at, mask=mask, other=0.0)
            a = gated(a, held, SLOPE, WIDE).to(grad.dtype.element_ty)
        if bias_sums is not None:
            bias_acc += tl.sum(a.to(WIDE), 1)
        if ONE_TAP:
            v = row + down
            u = column + across
            held = inside & (v >= 0) & (v < height) & (u >= 0) & (u < width)
            mask = held[:, None] & wanted[None, :]
        else:
            v = row[:, None] + down[None, :]
            u = column[:, None] + across[None, :]
            mask = (inside[:, None] & wanted[None, :]) & (v >= 0) & (v < height) & (u >= 0) & (u < width)
        at = (image * x_image + pixel.to(tl.int64) * x_pixel)[:, None] + move[None, :]
        b = tl.load(x + at, mask=mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=WIDE)
    line = tl.program_id(1).to(tl.int64) * out_channels + k
    at = line[:, None] * (KERNEL * KERNEL * in_channels) + r[None, :]
    tl.store(sums + at, acc, mask=known[:, None] & wanted[None, :])
    if bias_sums is not None:  # noqa: SIM102 (settled when compiled, unlike the next)
        if start == 0:
            tl.store(bias_sums + line, bias_acc, mask=known)


@triton.jit
def add_pieces_kernel(
    sums,  # [pieces, count]
    out,  # [count], where entry (k, tap, c) goes to (k, c, tap)
    pieces,
    count,
    taps,
    channels,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], WIDE)
    for piece in range(pieces):
        total += tl.load(sums + tl.cast(piece, tl.int64) * count + i, mask=i < count, other=0.0)
    c = i % channels
    tap = i // channels % taps
    k = i // channels // taps
    tl.store(out + (k * channels + c) * taps + tap, total.to(out.dtype.element_ty), mask=i < count)


# (BLOCK_M, BLOCK_N at most, BLOCK_R at most, num_warps, num_stages) by arithmetic. "gather" is for channels
# not side by side in memory: each entry of a tile takes an address, two registers, so tiles are smaller.
Config = tuple[int, int, int, int, int]
CONV_CONFIGS: dict[str, Config] = {
    "half": (128, 64, 64, 8, 3),
    "half gather": (64, 64, 32, 8, 2),
    "tf32": (128, 64, 32, 8, 3),
    "tf32 gather": (64, 64, 16, 4, 2),
    "ieee": (64, 64, 16, 8, 2),
    "ieee gather": (64, 64, 16, 8, 2),
    "double": (32, 32, 16, 4, 2),
    "double gather": (32, 32, 16, 4, 2),
    "interpreter": (128, 64, 128, 1, 1),  # few steps: each costs a millisecond, whatever its size
}
# The same for the weight gradient: (BLOCK_K at most, BLOCK_N at most, BLOCK_P, num_warps, num_stages).
WEIGHT_CONFIGS: dict[str, Config] = {
    "half": (64, 64, 64, 4, 3),
    "half gather": (64, 64, 32, 8, 2),
    "tf32": (64, 64, 32, 4, 3),
    "tf32 gather": (64, 64, 16, 4, 2),
    "ieee": (64, 64, 16, 8, 2),
    "ieee gather": (64, 64, 16, 8, 2),
    "double": (32, 32, 16, 4, 2),
    "double gather": (32, 32, 16, 4, 2),
    "interpreter": (64, 256, 128, 1, 1),
}
PIECES_BLOCK = 256
PROGRAMS = 512  # what a weight gradient is cut into, roughly


def arithmetic(x: Tensor, tf32: bool) -> str:
    """How the products of `x` are computed: `double`, `half`, or for float32 `tf32` or `ieee`."""
    if x.dtype == torch.float64:
        return "double"
    if x.dtype != torch.float32:
        return "half"
    return "tf32" if tf32 and platform(x) == "cuda" else "ieee"


def configuration(
    x: Tensor, tf32: bool, table: dict[str, Config], memory_format: torch.memory_format
) -> tuple[str, Config]:
    """The row of a table that serves `x`, and its name."""
    row = "interpreter" if INTERPRETED else arithmetic(x, tf32)
    if not INTERPRETED and (memory_format == torch.contiguous_format or x.shape[1] % 16):
        row += " gather"
    *blocks, warps, stages = table[row]
    if platform(x) == "hip":  # 64 KiB of shared memory
        stages = min(stages, 2)
    return row, (*blocks, warps, stages)  # type: ignore[return-value]


def _block(size: int, most: int) -> int:
    """The power of two that covers `size`, between 16 (the least of tl.dot) and `most`."""
    return min(most, max(16, triton.next_power_of_2(size)))


def _divide(channels: int, block: int, row: str) -> int:
    """A block of the filter's entries that lies within one tap, where that needs no tiny blocks."""
    while row != "interpreter" and channels % block and block > 16 and channels % 16 == 0:
        block //= 2
    return block


def _flags(x: Tensor, tf32: bool) -> dict[str, Any]:
    return {
        "PRECISION": "tf32" if arithmetic(x, tf32) == "tf32" else "ieee",
        "WIDE": wide_tl(x),
    }


def _strides(x: Tensor, memory_format: torch.memory_format) -> tuple[int, int, int]:
    """Of image, channel, pixel, for `x` (N, C, H, W) dense in that format; PyTorch's are free at size 1."""
    _, c, h, w = x.shape
    return (c * h * w, 1, c) if memory_format == torch.channels_last else (c * h * w, h * w, 1)


class How(NamedTuple):
    """Of all products of a call: the layout, whether float32 may be TF32, the slope of its ReLUs."""

    memory_format: torch.memory_format
    tf32: bool
    slope: float


def _conv(
    x: Tensor,
    weight: Tensor,
    *,
    rotated: bool = False,
    x_gate: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_gate: Tensor | None = None,
    relu: bool = False,
    out_gate: Tensor | None = None,
    how: How,
) -> Tensor:
    """gate(out_gate, relu(conv(gate(x_gate, x)) + bias + gate(residual_gate, residual))).

    `weight` is (K, C, k, k). Rotated: the transposed convolution, from K channels to C.
    """
    memory_format, tf32, slope = how
    kernel = weight.shape[2]
    # [taps, channels of x, channels of out]
    filter = (weight.permute(2, 3, 0, 1) if rotated else weight.permute(2, 3, 1, 0)).contiguous()
    n, c, h, w = x.shape
    out_channels = filter.shape[3]
    out = torch.empty((n, out_channels, h, w), dtype=x.dtype, device=x.device, memory_format=memory_format)
    if out.numel() == 0:
        return out

    def dense(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.contiguous(memory_format=memory_format)

    x = x.contiguous(memory_format=memory_format)
    row, (block_m, most_n, most_r, warps, stages) = configuration(x, tf32, CONV_CONFIGS, memory_format)
    block_n, block_r = _block(out_channels, most_n), _divide(c, _block(kernel * kernel * c, most_r), row)
    launch(
        conv_kernel,
        (triton.cdiv(n * h * w, block_m) * triton.cdiv(out_channels, block_n),),
        *(x, dense(x_gate), filter, None if bias is None else bias.contiguous()),
        *(dense(residual), dense(residual_gate), dense(out_gate), out),
        *(n * h * w, h * w, h, w, c, out_channels),
        *_strides(x, memory_format),
        *_strides(out, memory_format),
        KERNEL=kernel,
        FLIP=rotated,
        RELU=relu,
        SLOPE=slope,
        ONE_TAP=c % block_r == 0,
        **_flags(x, tf32),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=block_r,
        num_warps=warps,
        num_stages=stages,
    )
    return out


def _filter_grads(
    x: Tensor,
    grad: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    need_weight: bool,
    need_bias: bool,
    how: How,
) -> tuple[Tensor, Tensor]:
    """Gradients of `weight` and bias, empty if not needed; `grad`, gated, is that of what `x` led to."""
    memory_format, tf32, slope = how
    if not need_weight:
        if not need_bias:
            return x.new_empty(0), x.new_empty(0)
        if gate is not None:
            grad = torch.where(gate > 0, grad, grad * slope) if slope else torch.where(gate <= 0, 0, grad)
        return x.new_empty(0), grad.sum((0, 2, 3), dtype=wide_dtype(x)).to(x.dtype)
    n, c, h, w = x.shape
    out_channels, kernel = weight.shape[0], weight.shape[2]
    d_weight = x.new_empty(weight.shape)
    d_bias = x.new_empty(out_channels if need_bias else 0)
    if n * h * w * weight.numel() == 0:
        return d_weight.zero_(), d_bias.zero_() if n * h * w == 0 else torch.sum(grad, (0, 2, 3))
    x, grad = x.contiguous(memory_format=memory_format), grad.contiguous(memory_format=memory_format)
    if gate is not None:
        gate = gate.contiguous(memory_format=memory_format)
    entries = kernel * kernel * c
    row, (most_k, most_n, block_p, warps, stages) = configuration(x, tf32, WEIGHT_CONFIGS, memory_format)
    block_k, block_n = _block(out_channels, most_k), _divide(c, _block(entries, most_n), row)
    tiles = triton.cdiv(out_channels, block_k) * triton.cdiv(entries, block_n)
    pixels = n * h * w
    pieces = max(1, min(triton.cdiv(PROGRAMS, tiles), triton.cdiv(pixels, 4 * block_p)))
    piece = triton.cdiv(triton.cdiv(pixels, pieces), block_p) * block_p
    wide = wide_dtype(x)
    sums = x.new_empty((pieces, out_channels, entries), dtype=wide)
    bias_sums = x.new_empty((pieces, out_channels), dtype=wide) if need_bias else None
    launch(
        weight_grad_kernel,
        (tiles, pieces),
        *(x, grad, gate, sums, bias_sums, pixels, h * w, h, w, c, out_channels),
        *_strides(x, memory_format),
        *_strides(grad, memory_format),
        piece,
        KERNEL=kernel,
        SLOPE=slope,
        ONE_TAP=c % block_n == 0,
        **_flags(x, tf32),
        BLOCK_K=block_k,
        BLOCK_N=block_n,
        BLOCK_P=block_p,
        num_warps=warps,
        num_stages=stages,
    )
    for total, out, taps, channels in ((sums, d_weight, kernel * kernel, c), (bias_sums, d_bias, 1, 1)):
        if total is not None:
            launch(
                add_pieces_kernel,
                (triton.cdiv(out.numel(), PIECES_BLOCK),),
                *(total, out, pieces, out.numel(), taps, channels),
                WIDE=wide_tl(x),
                BLOCK=PIECES_BLOCK,
            )
    return d_weight, d_bias


@operator
def conv_same(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    tf32: bool = False,
    negative_slope: float = 0.0,
) -> Tensor:
    """relu?(conv(x, weight) + bias + residual) in the memory format of x."""
    how = How(_torch.memory_format(x), tf32, negative_slope)
    return _conv(x, weight, bias=bias, residual=residual, relu=relu, how=how)


@operator
def conv_same_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    output: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    tf32: bool = False,
    negative_slope: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, empty where not needed; `output` is that of a forward with relu."""
    how = How(_torch.memory_format(x), tf32, negative_slope)
    d_x = x.new_empty(0)
    if need_x:
        d_x = _conv(grad, weight, rotated=True, x_gate=output, how=how)
    return d_x, *_filter_grads(x, grad, output, weight, need_weight, need_bias, how)


@operator
def refiner_block(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    keep_inner: bool,
    tf32: bool = False,
    negative_slope: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """relu(x + conv(relu(conv(x, weight1) + bias1), weight2) + bias2), and the inner activation or none."""
    how = How(_torch.memory_format(x), tf32, negative_slope)
    inner = _conv(x, weight1, bias=bias1, relu=True, how=how)
    out = _conv(inner, weight2, bias=bias2, residual=x, relu=True, how=how)
    return out, inner if keep_inner else x.new_empty(0)


@operator
def refiner_block_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight1, bias1, weight2, bias2, empty if not needed. No `inner`: recomputed."""
    memory_format = _torch.memory_format(x)
    how = How(memory_format, tf32, negative_slope)
    # Gates and both uses of grad want one format; convert once.
    grad, output = (
        grad.contiguous(memory_format=memory_format),
        output.contiguous(memory_format=memory_format),
    )
    if inner is None:
        inner = _conv(x, weight1, bias=bias1, relu=True, how=how)
    d_weight2, d_bias2 = _filter_grads(inner, grad, output, weight2, need_weight2, need_bias2, how)
    d_x = d_weight1 = d_bias1 = None
    if need_x or need_weight1 or need_bias1:
        d_inner = _conv(grad, weight2, rotated=True, x_gate=output, out_gate=inner, how=how)
        d_weight1, d_bias1 = _filter_grads(x, d_inner, None, weight1, need_weight1, need_bias1, how)
        if need_x:
            d_x = _conv(d_inner, weight1, rotated=True, residual=grad, residual_gate=output, how=how)

    def some(t: Tensor | None) -> Tensor:
        return x.new_empty(0) if t is None else t

    return some(d_x), some(d_weight1), some(d_bias1), d_weight2, d_bias2
