"""The refiner's convolutions: bias, residual and ReLU in the same pass, and a fused backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function

from fastda import _torch, backend, reference
from fastda.ops.common import (
    activation_gradient,
    autocast,
    check_slope,
    composite_backward,
    is_symbolic,
    laid_out_as,
    recordable,
)
from fastda.ops.pool import relu_max_pool, spread_winners

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _check_tensor(op: str, name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")


def _check(op: str, x: Tensor, name: str, weight: Tensor, odd: bool = True) -> None:
    _check_tensor(op, name, weight)
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be (N, C, H, W), got {tuple(x.shape)}")
    square = weight.dim() == 4 and weight.shape[2] == weight.shape[3] > 0
    if not square or (odd and weight.shape[2] % 2 == 0):
        wanted = "(K, C, k, k) with odd k" if odd else "(K, C, k, k)"
        raise ValueError(f"{op}: {name} must be {wanted}, got {tuple(weight.shape)}")
    if weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{op}: {name} must take the {x.shape[1]} channels of x, got {weight.shape[1]} "
            f"({tuple(weight.shape)})"
        )
    if x.dtype not in _DTYPES:
        raise TypeError(f"{op}: x must be float32, float64, bfloat16 or float16, got {x.dtype}")


def _check_like(op: str, x: Tensor, name: str, t: Tensor | None, shape: tuple[int, ...] | None) -> None:
    """`t` must have the dtype and device of x, and `shape` if one is given."""
    if t is None:
        return
    _check_tensor(op, name, t)
    if shape is not None and t.shape != shape:
        raise ValueError(f"{op}: {name} must be {tuple(shape)}, got {tuple(t.shape)}")
    if t.dtype != x.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of x, {x.dtype}, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} must be on the device of x, {x.device}, got {t.device}")


def _slope(op: str, relu: bool, negative_slope: float | None) -> float | None:
    """Of the activation: None where there is none, 0 for ReLU."""
    if negative_slope is None:
        return 0.0 if relu else None
    check_slope(op, negative_slope)
    if relu:
        raise ValueError(
            f"{op}: relu and negative_slope={negative_slope!r} both name the activation; give one"
        )
    return float(negative_slope)


def _tf32(x: Tensor, serving: str) -> bool:
    """Whether the kernels may round the operands of products to TF32; asked where they could."""
    return serving != "cpp" and x.dtype == torch.float32 and _torch.convolution_tf32()


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        padding: int,
        dilation: int,
        slope: float | None,
        serving: str,
    ) -> Tensor:
        y = _forward(serving, x, weight, bias, residual, padding, dilation, slope)
        ctx.serving = serving
        ctx.padding, ctx.dilation = padding, dilation
        # A compiler that traces backward lets nobody ask there.
        ctx.last = dilation > 1 and _torch.memory_format(x) is torch.channels_last
        ctx.slope = slope
        # For second derivatives alone bias and residual matter: through the sign of what ReLU sees, which y
        # has.
        ctx.save_for_backward(x, weight, None if slope is None else y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            grad = grad if y is None else activation_gradient(grad, y, ctx.slope)
            convolve = functools.partial(reference.conv2d, padding=ctx.padding, dilation=ctx.dilation)
            grads = composite_backward(convolve, (x, weight), needs[:2], grad)
            d_bias = grad.sum((0, 2, 3)) if needs[2] else None
            return (*grads, d_bias, grad if needs[3] else None, *[None] * 4)
        if needs[3] and y is not None:
            grad, y = activation_gradient(grad, y, ctx.slope), None
        raw, slope, step = backend.kernels(ctx.serving), ctx.slope or 0.0, ctx.dilation
        g, image, out = (t if t is None or step == 1 else _every(t, step, ctx.last) for t in (grad, x, y))
        d_x, d_weight, d_bias = (
            raw.conv_same_backward(g, image, weight, out, *needs[:3], _tf32(x, ctx.serving), slope)
            if _is_same(weight, ctx.padding, step)
            else raw.conv2d_backward(grad, x, weight, y, ctx.padding, *needs[:3], slope)
        )
        if needs[0] and step > 1:
            d_x = _together(d_x, x.shape, step, ctx.last)
        return (
            d_x if needs[0] else None,
            laid_out_as(weight, d_weight) if needs[1] else None,
            d_bias if needs[2] else None,
            grad if needs[3] else None,
            *[None] * 4,
        )


class _Conv2dMaxPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        padding: int,
        size: int,
        relu: bool,
        serving: str,
    ) -> Tensor:
        raw = backend.kernels(serving)
        y, indices = raw.conv2d_max_pool(x, weight, bias, padding, size, relu, True)
        ctx.padding, ctx.size, ctx.serving = padding, size, serving
        ctx.save_for_backward(x, weight, indices)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, indices = ctx.saved_tensors
        needs, size = ctx.needs_input_grad, ctx.size
        if torch.is_grad_enabled():
            pooled = [n + 2 * ctx.padding + 1 - weight.shape[2] for n in x.shape[2:]]
            spread = spread_winners(grad, indices, pooled, False, (size, size), (size, size), (0, 0))
            convolve = functools.partial(reference.conv2d, padding=ctx.padding)
            grads = composite_backward(convolve, (x, weight), needs[:2], spread)
            return (*grads, spread.sum((0, 2, 3)) if needs[2] else None, *[None] * 4)
        raw = backend.kernels(ctx.serving)
        given = (grad, indices, x, weight, ctx.padding, size, *needs[:3])
        d_x, d_weight, d_bias = raw.conv2d_max_pool_backward(*given)
        return (
            d_x if needs[0] else None,
            laid_out_as(weight, d_weight) if needs[1] else None,
            d_bias if needs[2] else None,
            *[None] * 4,
        )


class _Stride2(torch.autograd.Function):
    """4x4 filters with a stride of 2, in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, serving: str
    ) -> Tensor:
        ctx.serving, ctx.padding = serving, padding
        ctx.save_for_backward(x, weight)
        return backend.kernels(serving).conv2d_stride2(x, weight, bias, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            convolve = functools.partial(reference.conv2d, stride=2, padding=ctx.padding)
            grads = composite_backward(convolve, (x, weight), needs[:2], grad)
            return (*grads, grad.sum((0, 2, 3)) if needs[2] else None, None, None)
        raw = backend.kernels(ctx.serving)
        d_x, d_weight, d_bias = raw.conv2d_stride2_backward(grad, x, weight, ctx.padding, *needs[:3])
        return (
            d_x if needs[0] else None,
            laid_out_as(weight, d_weight) if needs[1] else None,
            d_bias if needs[2] else None,
            None,
            None,
        )


class _Reflected(torch.autograd.Function):
    """`conv_same` with the padding that mirrors x: the kernels read it where it lies."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        slope: float | None,
        serving: str,
    ) -> Tensor:
        y = _forward_reflected(serving, x, weight, bias, residual, slope)
        ctx.serving, ctx.slope = serving, slope
        ctx.save_for_backward(x, weight, None if slope is None else y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if y is not None:
            grad = activation_gradient(grad, y, ctx.slope)
        d_x = d_weight = d_bias = None
        if torch.is_grad_enabled():
            convolve = functools.partial(reference.conv_same, padding_mode="reflect")
            d_x, d_weight = composite_backward(convolve, (x, weight), needs[:2], grad)
            d_bias = grad.sum((0, 2, 3)) if needs[2] else None
        else:
            raw = backend.kernels(ctx.serving)
            if needs[0]:
                d_x = raw.conv_same_backward(grad, x, weight, None, True, False, False)[0]
                _fold_border(raw, d_x, grad, weight)
            if needs[1] or needs[2]:
                wanted = (False, needs[1], needs[2], False, 0.0, True)
                _, d_weight, d_bias = raw.conv_same_backward(grad, x, weight, None, *wanted)
        return (
            d_x,
            laid_out_as(weight, d_weight) if needs[1] else None,  # type: ignore[arg-type]
            d_bias if needs[2] else None,
            grad if needs[3] else None,
            None,
            None,
        )


def _forward_reflected(
    serving: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, slope: float | None
) -> Tensor:
    raw, act = backend.kernels(serving), slope is not None
    return raw.conv_same(x, weight, bias, residual, act, False, slope or 0.0, True)


def _fold_border(raw: Any, d_x: Tensor, grad: Tensor, weight: Tensor) -> None:
    """Adds to `d_x`, what the pixels of x get without a border, what they get by way of its mirrored ones."""
    _fold_rows(raw, d_x, grad, weight, corners=True)
    _fold_rows(raw, d_x.mT, grad.mT, weight.mT, corners=False)


def _fold_rows(raw: Any, d_x: Tensor, grad: Tensor, weight: Tensor, corners: bool) -> None:
    """The rows above and below x: that at a distance r > 0 got the sum over t of the products of row t of the
    filter with row p - r - t of `grad`, both counted from that edge, and goes to row r of x.
    """
    (n, c, _, w), k = d_x.shape, weight.shape[2]
    p = k // 2
    for edge in (1, -1):
        strip, taps = (t[:, :, :p] if edge > 0 else t[:, :, -p:].flip(2) for t in (grad, weight))
        taps = taps.permute(2, 3, 1, 0).reshape(p * k * c, -1, 1, 1)
        products = raw.conv_same(strip, taps, None, None, False).unflatten(1, (p, k, c))
        for distance in range(1, p + 1):
            row = d_x.new_zeros(n, c, w + 2 * p)
            for t in range(p - distance + 1):
                for j in range(k):
                    row[..., j : j + w] += products[:, t, j, :, p - distance - t]
            if corners:
                row[..., p + 1 : 2 * p + 1] += row[..., :p].flip(-1)
                row[..., w - 1 : w + p - 1] += row[..., w + p :].flip(-1)
            d_x[:, :, distance if edge > 0 else -1 - distance] += row[..., p : p + w]


def _is_same(weight: Tensor, padding: int, dilation: int = 1) -> bool:
    """Whether the result has the height and width of x: every backend has kernels for that."""
    return dilation * (weight.shape[2] - 1) == 2 * padding


def _forward(
    serving: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    padding: int,
    dilation: int,
    slope: float | None,
) -> Tensor:
    raw, act = backend.kernels(serving), slope is not None
    if dilation > 1:
        last = _torch.memory_format(x) is torch.channels_last
        parts = [None if image is None else _every(image, dilation, last) for image in (x, residual)]
        y = raw.conv_same(parts[0], weight, bias, parts[1], act, _tf32(x, serving), slope or 0.0)
        return _together(y, x.shape, dilation, last)
    if _is_same(weight, padding):
        return raw.conv_same(x, weight, bias, residual, act, _tf32(x, serving), slope or 0.0)
    return raw.conv2d(x, weight, bias, residual, padding, act, slope or 0.0)


class _RefinerBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        recompute: bool,
        slope: float,
        serving: str,
    ) -> Tensor:
        ctx.serving = serving
        ctx.slope = slope
        y, inner = backend.kernels(serving).refiner_block(
            x, weight1, bias1, weight2, bias2, not recompute, _tf32(x, serving), slope
        )
        ctx.save_for_backward(x, weight1, bias1, weight2, None if recompute else inner, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, bias1, weight2, inner, y = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            # The last ReLU's mask comes from y, so that bias2 need not be kept: it matters for nothing else.
            grad = activation_gradient(grad, y, ctx.slope)

            def before_relu(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor) -> Tensor:
                inner = reference.conv_same(x, weight1, bias1, negative_slope=ctx.slope)
                return reference.conv_same(inner, weight2, residual=x)

            grads = composite_backward(before_relu, (x, weight1, bias1, weight2), needs[:4], grad)
            return (*grads, grad.sum((0, 2, 3)) if needs[4] else None, None, None, None)
        grads = backend.kernels(ctx.serving).refiner_block_backward(
            grad, x, inner, y, weight1, bias1, weight2, *needs[:5], _tf32(x, ctx.serving), ctx.slope
        )
        d_x, d_weight1, d_bias1, d_weight2, d_bias2 = (
            g if need else None for g, need in zip(grads, needs, strict=False)
        )
        if d_weight1 is not None:
            d_weight1 = laid_out_as(weight1, d_weight1)
        if d_weight2 is not None:
            d_weight2 = laid_out_as(weight2, d_weight2)
        return d_x, d_weight1, d_bias1, d_weight2, d_bias2, None, None, None


def conv_same(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding_mode: str = "zeros",
    residual: Tensor | None = None,
    relu: bool = False,
    negative_slope: float | None = None,
) -> Tensor:
    """Convolution with stride 1 and padding k // 2, then `+ bias`, `+ residual`, (leaky) ReLU.

    All in one pass. negative_slope: of a leaky ReLU, 0 or more, in place of `relu`, which is a slope of 0.
    padding_mode: "zeros", or "reflect" for the pixels of x mirrored at its first and last ones, as
    `F.pad(mode="reflect")` has them; the CPU's kernels read them where they lie.

    Shapes: x (N, C, H, W); weight (K, C, k, k) with odd k; bias (K,); residual and the result (N, K, H, W),
    the result in the memory format of x. Dtypes: float32, float64, bfloat16, float16, the same for every
    argument; the last two compute in float32. Under autocast every argument is cast, as `F.conv2d` casts its
    own.

    On the CPU a large value costs the results that do not see it 8 of float32's 24 bits at most, forward and
    backward; docs/ops/refiner_conv.md has the bound.

    Saved for backward: x, weight and, with an activation, the result. Double backward works; torch.func
    transforms take the reference.

    Raises ValueError for shapes, devices and a slope that do not fit, TypeError for dtypes.
    Source: the refiner of SimGAN, arXiv 1612.07828, section 2.3; Winograd convolution, arXiv 1509.09308.
    """
    if is_symbolic(x):
        options: Any = dict(
            padding_mode=padding_mode, residual=residual, relu=relu, negative_slope=negative_slope
        )
        return handle_torch_function(conv_same, (x,), x, weight, bias, **options)
    _check_tensor("conv_same", "x", x)
    x, weight, bias, residual = autocast(x, weight, bias, residual)
    _check("conv_same", x, "weight", weight)
    slope = _slope("conv_same", relu, negative_slope)
    padding = weight.shape[2] // 2
    return _convolve("conv_same", x, weight, bias, residual, padding, padding_mode, 1, slope)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    padding_mode: str = "zeros",
    dilation: int = 1,
    residual: Tensor | None = None,
    relu: bool = False,
    negative_slope: float | None = None,
) -> Tensor:
    """Convolution with stride and padding, then `+ bias`, `+ residual`, (leaky) ReLU, in one pass.

    Shapes: x (N, C, H, W); weight (K, C, k, k); bias (K,); residual and the result (N, K, H', W') with
    H' = (H + 2 padding - dilation (k - 1) - 1) // stride + 1, the result in the memory format of x. Dtypes as
    for `conv_same`, which is this with odd k, padding k // 2, stride and dilation 1; negative_slope and
    padding_mode too. padding: on each side, less than the filter is wide, dilation (k - 1) + 1.

    The kernels are the CPU's, where 5x5 filters of 16 channels and more take Winograd F(3x3, 5x5); on other
    devices PyTorch's own convolutions serve, but for what `conv_same` serves. With a dilation d and a padding
    of d (k // 2), k odd, d * d images of every d-th pixel go through `conv_same`; all else is PyTorch's. Of
    large values the kernels promise what those of `conv_same` do.

    With a stride of 2, filters of 4x4 and 16 channels or more take Winograd F(4x4, 2x2) in float32, forward
    and backward; residual and activation follow in passes of their own. All other strides are PyTorch's.

    Saved for backward: x, weight and, with an activation, the result. Double backward works; torch.func
    transforms take the reference.

    Raises ValueError for shapes, devices, a padding and a slope that do not fit, TypeError for dtypes.
    Source: Winograd convolution, arXiv 1509.09308.
    """
    if is_symbolic(x):
        options: Any = dict(
            stride=stride,
            padding=padding,
            padding_mode=padding_mode,
            dilation=dilation,
            residual=residual,
            relu=relu,
            negative_slope=negative_slope,
        )
        return handle_torch_function(conv2d, (x,), x, weight, bias, **options)
    _check_tensor("conv2d", "x", x)
    x, weight, bias, residual = autocast(x, weight, bias, residual)
    _check("conv2d", x, "weight", weight, odd=False)
    for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"conv2d: {name} must be an int, got {value!r}")
    for name, value in (("stride", stride), ("dilation", dilation)):
        if value < 1:
            raise ValueError(f"conv2d: {name} must be at least 1, got {value}")
    reach = dilation * (weight.shape[2] - 1)
    if not 0 <= padding <= reach:
        raise ValueError(f"conv2d: padding must be from 0 to {reach} for this weight, got {padding}")
    if min(x.shape[2:]) + 2 * padding <= reach:
        raise ValueError(
            f"conv2d: x must be at least as large as the filter with its padding, {reach + 1} by {reach + 1} "
            f"and {padding}, got {tuple(x.shape)}"
        )
    slope = _slope("conv2d", relu, negative_slope)
    return _convolve("conv2d", x, weight, bias, residual, padding, padding_mode, dilation, slope, stride)


def conv2d_max_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int = 0,
    kernel_size: int = 2,
    relu: bool = True,
) -> Tensor:
    """`F.max_pool2d(F.relu(F.conv2d(x, weight, bias, padding=padding)), kernel_size)` in one pass.

    Without the ReLU where `relu` is False; behind the pool it would be the same. What lies between never
    reaches memory: images are pooled while they are in the cache, and in backward the gradient of what was
    pooled is read off the result's.

    Shapes: x (N, C, H, W); weight (K, C, k, k); bias (K,); the result (N, K, H' // kernel_size,
    W' // kernel_size) with H' = H + 2 padding - k + 1, in the memory format of x. padding: less than the
    filter is wide. kernel_size: 1 to 15, of windows side by side. Dtypes as for `conv_same`; float32 and
    float64 go in one pass, the others by `conv2d` and `relu_max_pool`. Ties and NaN as in `relu_max_pool`,
    large values as in `conv_same`.

    Saved for backward: x, weight and a byte for every entry of the result. Double backward works; torch.func
    transforms and other devices take PyTorch's operators.

    Raises ValueError for shapes, devices and a padding that do not fit, TypeError for dtypes.
    Source: the networks for digits of DANN, arXiv 1505.07818, appendix.
    """
    if is_symbolic(x):
        options: Any = dict(padding=padding, kernel_size=kernel_size, relu=relu)
        return handle_torch_function(conv2d_max_pool, (x,), x, weight, bias, **options)
    op = "conv2d_max_pool"
    _check_tensor(op, "x", x)
    x, weight, bias = autocast(x, weight, bias)
    _check(op, x, "weight", weight, odd=False)
    _check_like(op, x, "weight", weight, None)
    _check_like(op, x, "bias", bias, (weight.shape[0],))
    for name, value in (("padding", padding), ("kernel_size", kernel_size)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{op}: {name} must be an int, got {value!r}")
    reach = weight.shape[2] - 1
    if not 0 <= padding <= reach:
        raise ValueError(f"{op}: padding must be from 0 to {reach} for this weight, got {padding}")
    if not 1 <= kernel_size <= 15:
        raise ValueError(f"{op}: kernel_size must be from 1 to 15, got {kernel_size}")
    if min(x.shape[2:]) + 2 * padding < reach + kernel_size:
        raise ValueError(f"{op}: x must be large enough for a window, got {tuple(x.shape)}")
    serving = backend.select(x, op)
    if serving == "reference":
        options = dict(padding=padding, kernel_size=kernel_size, relu=relu)
        return reference.conv2d_max_pool(x, weight, bias, **options)
    if x.dtype not in (torch.float32, torch.float64):
        return relu_max_pool(conv2d(x, weight, bias, padding=padding), kernel_size, relu=relu)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Conv2dMaxPool.apply(*recordable(x, weight, bias), padding, kernel_size, relu, serving)
    raw = backend.kernels(serving)
    return raw.conv2d_max_pool(x, weight, bias, padding, kernel_size, relu, False)[0]


def _convolve(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    padding: int,
    padding_mode: str,
    dilation: int,
    slope: float | None,
    stride: int = 1,
) -> Tensor:
    if padding_mode not in ("zeros", "reflect"):
        raise ValueError(f"{op}: padding_mode must be 'zeros' or 'reflect', got {padding_mode!r}")
    reflect = padding_mode == "reflect" and padding > 0
    if reflect and min(x.shape[2:]) <= padding:
        raise ValueError(
            f"{op}: x must be larger than its reflected padding, {padding}, got {tuple(x.shape)}"
        )
    out_channels, more = weight.shape[0], 2 * padding - dilation * (weight.shape[2] - 1)
    _check_like(op, x, "weight", weight, None)
    _check_like(op, x, "bias", bias, (out_channels,))
    height, width = ((size + more - 1) // stride + 1 for size in x.shape[2:])
    _check_like(op, x, "residual", residual, (x.shape[0], out_channels, height, width))
    same = more == 0 and dilation == stride == 1
    served = "conv_same with padding_mode='reflect'" if reflect else "conv_same"
    serving = backend.select(x, served if same else "conv2d")
    of_pytorch = dilation > 1 and (more or reflect)
    if stride > 1:
        of_pytorch = (stride, weight.shape[2], dilation, x.dtype) != (2, 4, 1, torch.float32)
    if serving == "reference" or of_pytorch:
        options: Any = dict(stride=stride, padding_mode=padding_mode, dilation=dilation, negative_slope=slope)
        return reference.conv2d(x, weight, bias, padding=padding, residual=residual, **options)
    if reflect and not same:
        x, padding = F.pad(x, (padding,) * 4, mode="reflect"), 0
    recorded = torch.is_grad_enabled() and (
        x.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
    if stride > 1:
        if recorded:
            y = _Stride2.apply(*recordable(x, weight, bias), padding, serving)
        else:
            y = backend.kernels(serving).conv2d_stride2(x, weight, bias, padding)
        return reference.common.act(y, residual, slope)
    if reflect and same:
        if recorded:
            return _Reflected.apply(*recordable(x, weight, bias, residual), slope, serving)
        return _forward_reflected(serving, x, weight, bias, residual, slope)
    if recorded:
        return _Conv2d.apply(*recordable(x, weight, bias, residual), padding, dilation, slope, serving)
    return _forward(serving, x, weight, bias, residual, padding, dilation, slope)


def _every(x: Tensor, step: int, last: bool) -> Tensor:
    """(N, C, H, W) -> (N * step * step, C, H / step, W / step), rounded up: every `step`-th pixel of rows and
    columns, with zeros below and on the right; in channels_last where `last`, else contiguous.
    """
    n, c, h, w = x.shape
    rows, columns = -(-h // step), -(-w // step)
    if last:
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, -w % step, 0, -h % step))
        x = x.unflatten(2, (columns, step)).unflatten(1, (rows, step)).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(n * step * step, rows, columns, c).permute(0, 3, 1, 2)
    x = F.pad(x, (0, -w % step, 0, -h % step))
    x = x.unflatten(3, (columns, step)).unflatten(2, (rows, step)).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n * step * step, c, rows, columns)


def _together(parts: Tensor, shape: tuple[int, ...], step: int, last: bool) -> Tensor:
    """What `_every` took apart of images of a shape, whatever the number of channels."""
    n, _, h, w = shape
    _, k, rows, columns = parts.shape
    if last:
        y = parts.permute(0, 2, 3, 1).unflatten(0, (n, step, step)).permute(0, 3, 1, 4, 2, 5)
        y = y.reshape(n, rows * step, columns * step, k).permute(0, 3, 1, 2)
    else:
        y = parts.unflatten(0, (n, step, step)).permute(0, 3, 4, 1, 5, 2)
        y = y.reshape(n, k, rows * step, columns * step)
    y = y[..., :h, :w]
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def refiner_block(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    negative_slope: float = 0.0,
) -> Tensor:
    """SimGAN's residual block, relu(x + conv(relu(conv(x, weight1) + bias1), weight2) + bias2).

    negative_slope: of both ReLUs, 0 or more; above 0 they are leaky.

    Shapes: x and the result (N, C, H, W), in the same memory format; weight1 (M, C, k, k), bias1 (M,),
    weight2 (C, M, l, l), bias2 (C,) with odd k and l (C = M = 64 and k = l in SimGAN). Dtypes as for
    `conv_same`.

    Saved for backward: x, the activation between the convolutions, the result and the weights. Without
    gradients nothing but the result outlives the call.

    Raises ValueError for shapes and devices that do not fit, TypeError for dtypes.
    Source: arXiv 1612.07828, section 2.3.
    """
    return checked_refiner_block(
        x, weight1, bias1, weight2, bias2, recompute=False, negative_slope=negative_slope
    )


def checked_refiner_block(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    recompute: bool,
    negative_slope: float = 0.0,
) -> Tensor:
    """`refiner_block` with a choice: `recompute` the inner activation in backward instead of keeping it."""
    if is_symbolic(x):
        inputs = (x, weight1, bias1, weight2, bias2)
        return handle_torch_function(
            checked_refiner_block, (x,), *inputs, recompute=recompute, negative_slope=negative_slope
        )
    _check_tensor("refiner_block", "x", x)
    x, weight1, bias1, weight2, bias2 = autocast(x, weight1, bias1, weight2, bias2)
    _check("refiner_block", x, "weight1", weight1)
    _check_tensor("refiner_block", "weight2", weight2)
    shape2 = (x.shape[1], weight1.shape[0])
    if (
        weight2.dim() != 4
        or weight2.shape[:2] != shape2
        or weight2.shape[2] != weight2.shape[3]
        or weight2.shape[2] % 2 == 0
    ):
        raise ValueError(
            f"refiner_block: weight2 must be ({shape2[0]}, {shape2[1]}, k, k) with odd k, "
            f"got {tuple(weight2.shape)}"
        )
    _check_like("refiner_block", x, "weight1", weight1, None)
    _check_like("refiner_block", x, "weight2", weight2, None)
    _check_like("refiner_block", x, "bias1", bias1, (weight1.shape[0],))
    _check_like("refiner_block", x, "bias2", bias2, (x.shape[1],))
    check_slope("refiner_block", negative_slope, "a number of 0 or more")
    slope = float(negative_slope)
    serving = backend.select(x)
    if serving == "reference":
        return reference.refiner_block(x, weight1, bias1, weight2, bias2, negative_slope=slope)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or weight1.requires_grad
        or weight2.requires_grad
        or (bias1 is not None and bias1.requires_grad)
        or (bias2 is not None and bias2.requires_grad)
    ):
        return _RefinerBlock.apply(*recordable(x, weight1, bias1, weight2, bias2), recompute, slope, serving)
    inputs = (x, weight1, bias1, weight2, bias2)
    return backend.kernels(serving).refiner_block(*inputs, False, _tf32(x, serving), slope)[0]
