"""Normalisation, a residual and (leaky) ReLU: two passes over the images forward, two back.

A program has pixels of some channels: of up to 64 where images are channels_last, and of as many planes as
fill it where they are contiguous. Sums over the pixels that it has at once are in the dtype that is computed
in; they are put together in float64, in their order, and so is all that is made of them for a channel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastda import _torch
from fastda.triton.common import INTERPRETED, launch, operator, pieces, wide_dtype, wide_tl

# Entries that a program has at once: of the interpreter as many as there are, since it takes as long for one.
BLOCK = 1 << 16 if INTERPRETED else 2048
CHANNELS = 64
BLOCK_S, BLOCK_P = 16, 32  # statistics, and their pieces, that are put together at once


@triton.jit
def share_of(program, channels, parts, BLOCK_C: tl.constexpr):
    """The group, channels and part of the rows that are this program's."""
    blocks = tl.cdiv(channels, BLOCK_C)
    part = program % parts
    block = program // parts % blocks
    group = program // parts // blocks
    return group.to(tl.int64), block * BLOCK_C + tl.arange(0, BLOCK_C), part.to(tl.int64)


@triton.jit
def offsets_of(begin, image, c, channels, pixels, LAST: tl.constexpr, BLOCK_R: tl.constexpr):
    """Where BLOCK_R pixels of channels c lie, from pixel `begin` of those of `image` and the next ones."""
    r = tl.arange(0, BLOCK_R)
    if LAST:
        row = image * pixels + begin + r
        return row[:, None] * channels + c[None, :]
    # One division in 64 bits, the others within an image.
    pixel = (begin % pixels).to(pixels.dtype) + r
    image = image + begin // pixels + pixel // pixels
    pixel = (pixel % pixels).to(tl.int64)
    return (image[:, None] * channels + c[None, :]) * pixels + pixel[:, None]


@triton.jit(do_not_specialize=["rows", "count", "steps"])
def moments_kernel(
    x,
    sums,  # [2, pieces, statistics]: means, squares about them
    channels,
    pixels,
    images,  # of a group
    rows,  # of a group: its pixels
    count,  # pieces
    steps,  # blocks that one program walks
    statistics,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    group, c, piece = share_of(tl.program_id(0), channels, count, BLOCK_C)
    mean = tl.zeros([BLOCK_C], tl.float64)
    squares = tl.zeros([BLOCK_C], tl.float64)
    first = piece * steps * BLOCK_R
    for step in range(steps):
        begin = first + step * BLOCK_R
        if begin < rows:
            left = tl.minimum(rows - begin, BLOCK_R)
            inside = (tl.arange(0, BLOCK_R) < left)[:, None] & (c < channels)[None, :]
            at = offsets_of(begin, group * images, c, channels, pixels, LAST, BLOCK_R)
            v = tl.load(x + at, mask=inside, other=0.0).to(WIDE)
            n = left.to(tl.float64)
            pivot = tl.sum(v, 0) / left.to(WIDE)
            d = tl.where(inside, v - pivot[None, :], 0.0)
            off = tl.sum(d, 0).to(tl.float64)
            square = tl.sum(d * d, 0).to(tl.float64)
            its_mean = pivot.to(tl.float64) + off / n
            its_squares = tl.maximum(square - off * off / n, 0.0)
            # Squares that overflow, and what is not finite, again in float64.
            exact = square - square != 0
            if tl.max(exact.to(tl.int32), 0) > 0:
                wide = v.to(tl.float64)
                again = tl.sum(wide, 0) / n
                d64 = tl.where(inside, wide - again[None, :], 0.0)
                its_mean = tl.where(exact, again, its_mean)
                its_squares = tl.where(exact, tl.sum(d64 * d64, 0), its_squares)
            if step == 0:
                mean = its_mean
                squares = its_squares
            else:
                # Chan, Golub and LeVeque 1979. Weighted means: two infinite ones stay infinite.
                before = (begin - first).to(tl.float64)
                share = n / (before + n)
                difference = its_mean - mean
                mean = (1 - share) * mean + share * its_mean
                squares += its_squares + difference * difference * (before * share)
    out = sums + piece * statistics + group * channels + c
    tl.store(out, mean, mask=c < channels)
    tl.store(out + count.to(tl.int64) * statistics, squares, mask=c < channels)


@triton.jit
def constants_of(mean, variance, w, EPS: tl.constexpr, WIDE: tl.constexpr):
    """1 / √(variance + eps), that times w, the centre of x, and what rounding it leaves of the mean."""
    root = tl.sqrt(variance + EPS)
    center = mean.to(WIDE)
    rest = tl.where(center - center == 0, mean - center.to(tl.float64), 0.0)
    return 1.0 / root, w / root, center, rest


@triton.jit
def per_channel(t, c, inside, NOTHING: tl.constexpr):
    if t is None:
        return tl.full(c.shape, NOTHING, tl.float64)
    else:
        return tl.load(t + c, mask=inside, other=NOTHING).to(tl.float64)


@triton.jit(do_not_specialize=["rows", "count", "piece_rows"])
def statistics_kernel(
    sums,  # of moments_kernel, or None: they are given
    given_mean,  # [statistics], or None
    given_variance,
    mean,  # [statistics]
    variance,
    weight,  # [channels], or None
    bias,
    constants,  # [3, statistics]: center, scale, shift of (x - center) scale + shift
    channels,
    rows,
    count,  # pieces
    piece_rows,
    statistics,
    EPS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    there = s < statistics
    if sums is None:
        m = tl.load(given_mean + s, mask=there, other=0.0).to(tl.float64)
        v = tl.load(given_variance + s, mask=there, other=1.0).to(tl.float64)
    else:
        m = tl.zeros([BLOCK_S], tl.float64)
        v = tl.zeros([BLOCK_S], tl.float64)
        for start in range(0, count, BLOCK_P):
            piece = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
            inside = (piece < count)[:, None] & there[None, :]
            n = tl.minimum(rows - piece * piece_rows, piece_rows).to(tl.float64)
            part = tl.load(sums + piece[:, None] * statistics + s[None, :], mask=inside, other=0.0)
            m += tl.sum(tl.where(inside, part * (n / rows.to(tl.float64))[:, None], 0.0), 0)
        for start in range(0, count, BLOCK_P):
            piece = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
            inside = (piece < count)[:, None] & there[None, :]
            n = tl.minimum(rows - piece * piece_rows, piece_rows).to(tl.float64)
            at = sums + piece[:, None] * statistics + s[None, :]
            part = tl.load(at, mask=inside, other=0.0)
            squares = tl.load(at + count.to(tl.int64) * statistics, mask=inside, other=0.0)
            d = part - m[None, :]
            v += tl.sum(tl.where(inside, squares + d * d * n[:, None], 0.0), 0)
        v = v / rows.to(tl.float64)
    if mean is not None:
        tl.store(mean + s, m, mask=there)
        tl.store(variance + s, v, mask=there)
    w = per_channel(weight, s % channels, there, 1.0)
    b = per_channel(bias, s % channels, there, 0.0)
    _, scale, center, rest = constants_of(m, v, w, EPS, WIDE)
    tl.store(constants + s, center, mask=there)
    tl.store(constants + statistics + s, scale.to(WIDE), mask=there)
    tl.store(constants + 2 * statistics + s, tl.where(rest == 0, b, b - rest * scale).to(WIDE), mask=there)


@triton.jit(do_not_specialize=["rows", "blocks"])
def normalize_kernel(
    x,
    residual,  # or None
    y,
    constants,
    channels,
    pixels,
    images,
    rows,
    blocks,  # of a group's rows
    statistics,
    SLOPE: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    group, c, block = share_of(tl.program_id(0), channels, blocks, BLOCK_C)
    begin = block * BLOCK_R
    inside = (begin + tl.arange(0, BLOCK_R) < rows)[:, None] & (c < channels)[None, :]
    at = offsets_of(begin, group * images, c, channels, pixels, LAST, BLOCK_R)
    its = constants + group * channels + c
    center = tl.load(its, mask=c < channels, other=0.0)[None, :]
    scale = tl.load(its + statistics, mask=c < channels, other=0.0)[None, :]
    shift = tl.load(its + 2 * statistics, mask=c < channels, other=0.0)[None, :]
    v = normalized(tl.load(x + at, mask=inside, other=0.0).to(WIDE) - center, scale, shift)
    if residual is not None:
        v += tl.load(residual + at, mask=inside, other=0.0).to(WIDE)
    if SLOPE is not None:
        v = passed_by(v, v, SLOPE)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def normalized(centered, scale, shift):
    """In one rounding, whatever a compiler would make of it: its sign is asked for again in backward."""
    return tl.fma(centered, tl.broadcast_to(scale, centered.shape), tl.broadcast_to(shift, centered.shape))


@triton.jit
def passed_by(g, v, SLOPE: tl.constexpr):
    """g through the activation of v. NaN passes ReLU, and is below for leaky ReLU, as PyTorch has it."""
    if SLOPE == 0:
        return tl.where(v <= 0, 0.0, g)
    else:
        return tl.where(v > 0, g, g * SLOPE)


@triton.jit
def passed(grad, output, centered, scale, shift, at, inside, SLOPE: tl.constexpr, WIDE: tl.constexpr):
    """What of grad passes the activation, by the sign of its result, which is read or computed again."""
    g = tl.load(grad + at, mask=inside, other=0.0).to(WIDE)
    if SLOPE is not None:
        if output is not None:
            v = tl.load(output + at, mask=inside, other=0.0).to(WIDE)
        else:
            v = normalized(centered, scale, shift)
        g = passed_by(g, v, SLOPE)
    return g


@triton.jit(do_not_specialize=["rows", "count", "steps"])
def gradient_sums_kernel(
    grad,
    x,
    output,  # or None
    d_residual,  # or None
    sums,  # [2, pieces, statistics]: of what passes of grad, and of that times (x - center)
    constants,
    channels,
    pixels,
    images,
    rows,
    count,
    steps,
    statistics,
    SLOPE: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    group, c, piece = share_of(tl.program_id(0), channels, count, BLOCK_C)
    its = constants + group * channels + c
    center = tl.load(its, mask=c < channels, other=0.0)[None, :]
    scale = tl.load(its + statistics, mask=c < channels, other=0.0)[None, :]
    shift = tl.load(its + 2 * statistics, mask=c < channels, other=0.0)[None, :]
    grads = tl.zeros([BLOCK_C], tl.float64)
    products = tl.zeros([BLOCK_C], tl.float64)
    for step in range(steps):
        begin = (piece * steps + step) * BLOCK_R
        inside = (begin + tl.arange(0, BLOCK_R) < rows)[:, None] & (c < channels)[None, :]
        at = offsets_of(begin, group * images, c, channels, pixels, LAST, BLOCK_R)
        centered = tl.load(x + at, mask=inside, other=0.0).to(WIDE) - center
        g = passed(grad, output, centered, scale, shift, at, inside, SLOPE, WIDE)
        if d_residual is not None:
            tl.store(d_residual + at, g.to(d_residual.dtype.element_ty), mask=inside)
        grads += tl.sum(g, 0).to(tl.float64)
        products += tl.sum(tl.where(inside, g * centered, 0.0), 0).to(tl.float64)
    out = sums + piece * statistics + group * channels + c
    tl.store(out, grads, mask=c < channels)
    tl.store(out + count.to(tl.int64) * statistics, products, mask=c < channels)


@triton.jit(do_not_specialize=["rows", "count"])
def gradient_statistics_kernel(
    sums,
    mean,
    variance,
    weight,
    d_weight,  # [statistics], or None
    d_bias,
    slopes,  # [2, statistics]: slope, offset of d_x = scale grad + slope (x - center) + offset
    channels,
    rows,
    count,
    statistics,
    EPS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    there = s < statistics
    by_bias = tl.zeros([BLOCK_S], tl.float64)
    products = tl.zeros([BLOCK_S], tl.float64)
    for start in range(0, count, BLOCK_P):
        piece = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        inside = (piece < count)[:, None] & there[None, :]
        at = sums + piece[:, None] * statistics + s[None, :]
        by_bias += tl.sum(tl.load(at, mask=inside, other=0.0), 0)
        products += tl.sum(tl.load(at + count.to(tl.int64) * statistics, mask=inside, other=0.0), 0)
    m = tl.load(mean + s, mask=there, other=0.0)
    v = tl.load(variance + s, mask=there, other=1.0)
    w = per_channel(weight, s % channels, there, 1.0)
    inverse, _, _, rest = constants_of(m, v, w, EPS, WIDE)
    by_weight = (products - rest * by_bias) * inverse
    if d_weight is not None:
        tl.store(d_weight + s, by_weight.to(d_weight.dtype.element_ty), mask=there)
    if d_bias is not None:
        tl.store(d_bias + s, by_bias.to(d_bias.dtype.element_ty), mask=there)
    n = rows.to(tl.float64)
    factor = w * inverse
    tilt = -factor * (by_weight / n) * inverse
    tl.store(slopes + s, tilt.to(WIDE), mask=there)
    tl.store(slopes + statistics + s, (-factor * (by_bias / n) - tilt * rest).to(WIDE), mask=there)


@triton.jit(do_not_specialize=["rows", "blocks"])
def input_gradient_kernel(
    grad,
    x,
    output,  # or None
    d_x,
    constants,
    slopes,  # or None: the statistics do not depend on x
    channels,
    pixels,
    images,
    rows,
    blocks,
    statistics,
    SLOPE: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    group, c, block = share_of(tl.program_id(0), channels, blocks, BLOCK_C)
    begin = block * BLOCK_R
    inside = (begin + tl.arange(0, BLOCK_R) < rows)[:, None] & (c < channels)[None, :]
    at = offsets_of(begin, group * images, c, channels, pixels, LAST, BLOCK_R)
    first = group * channels + c
    its = constants + first
    center = tl.load(its, mask=c < channels, other=0.0)[None, :]
    scale = tl.load(its + statistics, mask=c < channels, other=0.0)[None, :]
    shift = tl.load(its + 2 * statistics, mask=c < channels, other=0.0)[None, :]
    centered = tl.load(x + at, mask=inside, other=0.0).to(WIDE) - center
    d = passed(grad, output, centered, scale, shift, at, inside, SLOPE, WIDE) * scale
    if slopes is not None:
        slope = tl.load(slopes + first, mask=c < channels, other=0.0)[None, :]
        offset = tl.load(slopes + statistics + first, mask=c < channels, other=0.0)[None, :]
        d = centered * slope + (d + offset)
    tl.store(d_x + at, d.to(d_x.dtype.element_ty), mask=inside)


class _Plan(NamedTuple):
    """How statistics lie in images, and what a program has of them."""

    layout: torch.memory_format
    last: bool
    groups: int  # an image's own statistics make one of every image
    images: int
    channels: int
    pixels: int
    block_c: int
    block_r: int

    @property
    def rows(self) -> int:
        return self.images * self.pixels

    @property
    def statistics(self) -> int:
        return self.groups * self.channels

    @property
    def columns(self) -> int:
        return self.groups * triton.cdiv(self.channels, self.block_c)

    @property
    def pieces(self) -> tuple[int, int]:
        return pieces(self.rows, self.block_r, max(1, 1024 // self.columns))

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.channels, self.pixels, self.images, self.rows

    def blocks(self, x: Tensor) -> dict[str, object]:
        return {"LAST": self.last, "WIDE": wide_tl(x), "BLOCK_R": self.block_r, "BLOCK_C": self.block_c}


def _plan(x: Tensor, per_image: bool) -> _Plan:
    layout = _torch.memory_format(x)
    n, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    # Of one pixel or one channel both formats are the same, and rows are read as they lie.
    last = layout == torch.channels_last or pixels == 1 or channels == 1
    images = 1 if per_image else n
    block_c = min(CHANNELS, triton.next_power_of_2(channels))
    block_r = triton.next_power_of_2(images * pixels)
    if last:
        block_r = min(BLOCK // block_c, max(16, block_r))
    else:
        block_r = min(BLOCK, max(16, block_r))
        block_c = min(BLOCK // block_r, block_c)
    return _Plan(layout, last, n if per_image else 1, images, channels, pixels, block_c, block_r)


def _constants(
    x: Tensor,
    plan: _Plan,
    sums: Tensor | None,
    given: tuple[Tensor | None, Tensor | None],
    results: tuple[Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    constants = x.new_empty(3, plan.statistics, dtype=wide_dtype(x))
    count, steps = plan.pieces
    launch(
        statistics_kernel,
        (triton.cdiv(plan.statistics, BLOCK_S),),
        *(sums, *given, *results, weight, bias, constants),
        *(plan.channels, plan.rows, count, steps * plan.block_r, plan.statistics),
        EPS=eps,
        WIDE=wide_tl(x),
        BLOCK_P=BLOCK_P,
        BLOCK_S=BLOCK_S,
    )
    return constants


def _like(x: Tensor, plan: _Plan) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=plan.layout)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


@operator
def norm_act(
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
    """The result, and mean and variance of every statistic as float64."""
    plan = _plan(x, per_image)
    x = x.contiguous(memory_format=plan.layout)
    if residual is not None:
        residual = residual.contiguous(memory_format=plan.layout)
    y = _like(x, plan)
    mean, variance = (x.new_zeros(plan.statistics, dtype=torch.float64) for _ in range(2))
    given = _contiguous(running_mean), _contiguous(running_var)
    if x.numel() == 0:
        for own, stored in zip((mean, variance), given, strict=True):
            if stored is not None:
                own.copy_(stored)
        return y, mean, variance
    sums = None
    if running_mean is None:
        count, steps = plan.pieces
        sums = x.new_empty(2, count, plan.statistics, dtype=torch.float64)
        launch(
            moments_kernel,
            (plan.columns * count,),
            *(x, sums, *plan.sizes, count, steps, plan.statistics),
            **plan.blocks(x),
        )
    constants = _constants(
        x, plan, sums, given, (mean, variance), _contiguous(weight), _contiguous(bias), eps
    )
    blocks = triton.cdiv(plan.rows, plan.block_r)
    launch(
        normalize_kernel,
        (plan.columns * blocks,),
        *(x, residual, y, constants, *plan.sizes, blocks, plan.statistics),
        SLOPE=negative_slope,
        **plan.blocks(x),
    )
    return y, mean, variance


@operator
def norm_act_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and residual; empty where they are not needed."""
    plan = _plan(x, per_image)
    x, grad = (t.contiguous(memory_format=plan.layout) for t in (x, grad))
    if output is not None:
        output = output.contiguous(memory_format=plan.layout)
    weight, bias = _contiguous(weight), _contiguous(bias)
    nothing = x.new_empty(0)
    d_x = _like(x, plan) if need_x else nothing
    d_residual = _like(x, plan) if need_residual else x.new_empty(0)
    # The gradients of groups are added up in float64.
    kept = wide_dtype(x) if plan.groups == 1 else torch.float64
    d_weight, d_bias = (
        x.new_zeros(plan.statistics if need else 0, dtype=kept) for need in (need_weight, need_bias)
    )
    if x.numel() > 0:
        constants = _constants(
            x, plan, None, (mean.contiguous(), variance.contiguous()), (None, None), weight, bias, eps
        )
        slopes = None
        if need_weight or need_bias or need_residual or (need_x and through_statistics):
            count, steps = plan.pieces
            sums = x.new_empty(2, count, plan.statistics, dtype=torch.float64)
            launch(
                gradient_sums_kernel,
                (plan.columns * count,),
                *(grad, x, output, d_residual if need_residual else None, sums, constants),
                *(*plan.sizes, count, steps, plan.statistics),
                SLOPE=negative_slope,
                **plan.blocks(x),
            )
            slopes = x.new_empty(2, plan.statistics, dtype=wide_dtype(x))
            launch(
                gradient_statistics_kernel,
                (triton.cdiv(plan.statistics, BLOCK_S),),
                *(sums, mean.contiguous(), variance.contiguous(), weight),
                *(d_weight if need_weight else None, d_bias if need_bias else None, slopes),
                *(plan.channels, plan.rows, count, plan.statistics),
                EPS=eps,
                WIDE=wide_tl(x),
                BLOCK_P=BLOCK_P,
                BLOCK_S=BLOCK_S,
            )
        if need_residual:  # has passed the activation
            grad, output, negative_slope = d_residual, None, None
        if need_x:
            blocks = triton.cdiv(plan.rows, plan.block_r)
            launch(
                input_gradient_kernel,
                (plan.columns * blocks,),
                *(grad, x, output, d_x, constants, slopes if through_statistics else None),
                *(*plan.sizes, blocks, plan.statistics),
                SLOPE=negative_slope,
                **plan.blocks(x),
            )
    if plan.groups != 1:
        d_weight, d_bias = (
            t.view(plan.groups, plan.channels).sum(0).to(wide_dtype(x)) if need else t.to(wide_dtype(x))
            for t, need in ((d_weight, need_weight), (d_bias, need_bias))
        )
    return d_x, d_weight, d_bias, d_residual
