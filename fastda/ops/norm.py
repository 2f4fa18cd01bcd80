"""Normalisation, addition of a residual and (leaky) ReLU in one operator, and a fused backward."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function

from fastda import backend, reference
from fastda.ops.common import activation_gradient, check_slope, composite_backward, is_symbolic, recordable

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        per_image: bool,
        eps: float,
        negative_slope: float | None,
        saves_as_torch: bool,
        take_up: Callable[[Tensor, Tensor], None] | None,
        serving: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, variance = backend.kernels(serving).norm_act(
            x, weight, bias, running_mean, running_var, residual, per_image, eps, negative_slope
        )
        if take_up is not None:
            take_up(mean, variance)
        ctx.mark_non_differentiable(mean, variance)
        ctx.serving, ctx.per_image, ctx.eps, ctx.negative_slope = serving, per_image, eps, negative_slope
        ctx.own_statistics = running_mean is None
        # Without a residual the mask can be computed again from x, and y may be changed in place.
        masked = negative_slope is not None
        output = y if masked and (saves_as_torch or residual is not None) else None
        given = saves_as_torch and running_mean is not None
        statistics = (running_mean, running_var) if given else (mean, variance)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, bias if masked and output is None else None, *statistics, output)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, variance, output = ctx.saved_tensors
        needs, slope = ctx.needs_input_grad, ctx.negative_slope
        if torch.is_grad_enabled():
            if bias is None and ctx.bias_dtype is not None:  # no gradient depends on it
                bias = x.new_zeros(x.shape[1], dtype=ctx.bias_dtype).requires_grad_()
            if output is not None:
                grad, slope = activation_gradient(grad, output, slope), None
            norm = reference.instance_norm_act if ctx.per_image else reference.batch_norm_act
            kept = None if ctx.own_statistics else _stored(x, weight, mean, variance)

            def call(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                return norm(
                    x,
                    weight,
                    bias,
                    *(kept or (None, None)),
                    training=ctx.own_statistics,
                    eps=ctx.eps,
                    negative_slope=slope,
                )

            grads = composite_backward(call, (x, weight, bias), needs[:3], grad)
            return (*grads, grad if needs[3] else None, *[None] * 8)
        need_residual = needs[3] and slope is not None
        d_x, d_weight, d_bias, d_residual = backend.kernels(ctx.serving).norm_act_backward(
            *(grad, x, weight, bias, mean, variance, output, ctx.per_image, ctx.own_statistics),
            *(ctx.eps, slope, *needs[:3], need_residual),
        )
        return (
            d_x if needs[0] else None,
            d_weight.to(weight.dtype) if needs[1] else None,
            d_bias.to(ctx.bias_dtype) if needs[2] else None,
            (d_residual if need_residual else grad) if needs[3] else None,
            *[None] * 8,
        )


def _stored(x: Tensor, weight: Tensor | None, *statistics: Tensor) -> tuple[Tensor, ...]:
    """Statistics in the dtype that PyTorch wants them in beside `x` and `weight`."""
    return tuple(t.to(x.dtype if weight is None else weight.dtype) for t in statistics)


def _check(
    op: str, x: Tensor, residual: Tensor | None, eps: float, negative_slope: float | None, **channels: Any
) -> None:
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be (N, C, H, W), got {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{op}: x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    given: dict[str, Tensor] = {name: t for name, t in channels.items() if t is not None}
    first = next(iter(given), None)
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
        if t.shape != (x.shape[1],):
            raise ValueError(f"{op}: {name} must be ({x.shape[1]},), got {tuple(t.shape)}")
        wide = torch.promote_types(x.dtype, torch.float32)
        if t.dtype not in (x.dtype, wide):
            both = f"{x.dtype}" if wide == x.dtype else f"{x.dtype} or {wide}"
            raise TypeError(f"{op}: {name} must be {both} for x in {x.dtype}, got {t.dtype}")
        if t.dtype != given[str(first)].dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of {first}, {given[str(first)].dtype}, got {t.dtype}"
            )
        if t.device != x.device:
            raise ValueError(f"{op}: {name} must be on the device of x, {x.device}, got {t.device}")
    if residual is not None:
        if not isinstance(residual, Tensor):
            raise TypeError(f"{op}: residual must be a tensor, got {type(residual).__name__}")
        if residual.shape != x.shape:
            raise ValueError(f"{op}: residual must be {tuple(x.shape)}, got {tuple(residual.shape)}")
        if residual.dtype != x.dtype:
            raise TypeError(f"{op}: residual must have the dtype of x, {x.dtype}, got {residual.dtype}")
        if residual.device != x.device:
            raise ValueError(f"{op}: residual must be on the device of x, {x.device}, got {residual.device}")
    if not isinstance(eps, Real) or not eps >= 0:
        raise ValueError(f"{op}: eps must be a number of 0 or more, got {eps!r}")
    if negative_slope is not None:
        check_slope(op, negative_slope)


def norm_act(
    op: str,
    per_image: bool,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    negative_slope: float | None,
    saves_as_torch: bool = False,
) -> Tensor:
    """Either; `saves_as_torch`: what changes before backward changes gradients as it does in PyTorch."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {type(x).__name__}")
    channels = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    _check(op, x, residual, eps, negative_slope, **channels)
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}: running_mean and running_var must both be given, or neither")
    if not training and running_mean is None:
        raise ValueError(f"{op}: running_mean and running_var must be given where training is False")
    n, _, h, w = x.shape
    count = h * w if per_image else n * h * w
    if training and count == 1:
        raise ValueError(f"{op}: training needs more than one value for each mean, got x of {tuple(x.shape)}")
    serving = backend.select(x, op)
    if serving == "reference":
        function = reference.instance_norm_act if per_image else reference.batch_norm_act
        return function(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            training=training,
            momentum=momentum,
            eps=eps,
            residual=residual,
            negative_slope=negative_slope,
        )
    stored = (None, None) if training else (running_mean, running_var)
    own = per_image and training
    tracked = training and x.numel() > 0 and running_mean is not None and running_var is not None

    def take_up(mean: Tensor, variance: Tensor) -> None:
        _update(running_mean, mean, momentum, momentum)  # type: ignore[arg-type]
        _update(running_var, variance, momentum, momentum * count / (count - 1))  # type: ignore[arg-type]

    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        # An activation checkpoint's second forward ends where the last tensor is saved.
        early = tracked and saves_as_torch
        y, mean, variance = _NormAct.apply(
            *recordable(x, weight, bias, residual, *stored),
            *(own, eps, negative_slope, saves_as_torch, take_up if early else None, serving),
        )
        tracked = tracked and not early
    else:
        y, mean, variance = backend.kernels(serving).norm_act(
            x, weight, bias, *stored, residual, own, eps, negative_slope
        )
    if tracked:
        take_up(mean, variance)
    return y


def _update(running: Tensor, value: Tensor, momentum: float, weight: float) -> None:
    """running * (1 - momentum) + value * weight. As PyTorch has it, autograd does not take notice."""
    kept = running if is_compiling() else running.data
    with torch.no_grad():
        if value.shape != running.shape:
            value = value.view(-1, len(running)).mean(0)
        kept.copy_((kept.to(value.dtype) * (1 - momentum)).add_(value, alpha=weight))


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    negative_slope: float | None = None,
) -> Tensor:
    """act((x - mean) / sqrt(variance + eps) * weight + bias + residual), mean and variance of each channel.

    training: with the batch's own mean and variance; running_mean and running_var, where given, take up
        `momentum` of them (of the unbiased variance). Otherwise with running_mean and running_var.
    negative_slope: None for no activation, 0.0 for ReLU, above for leaky ReLU.

    Shapes: x, residual and the result (N, C, H, W), the result in the memory format of x; the others (C,).
    Dtypes: float32, float64, bfloat16, float16; the last two compute in float32 and may have float32 for
    what is (C,).

    Saved for backward: x, the mean and variance, and the result if it has both a residual and an activation.
    Double backward works; torch.func transforms take the reference.

    Raises ValueError for shapes and devices that do not fit, for one value a channel in training, and for a
    negative slope below 0, TypeError for dtypes. Source: arXiv 1502.03167; `torch.nn.functional.batch_norm`.
    """
    if is_symbolic(x):
        return handle_torch_function(
            batch_norm_act,
            (x,),
            *(x, weight, bias, running_mean, running_var),
            training=training,
            momentum=momentum,
            eps=eps,
            residual=residual,
            negative_slope=negative_slope,
        )
    return norm_act(
        *("batch_norm_act", False, x, weight, bias, running_mean, running_var),
        *(training, momentum, eps, residual, negative_slope),
    )


def instance_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    negative_slope: float | None = None,
) -> Tensor:
    """`batch_norm_act` with the mean and variance of each channel of each image.

    training: with the images' own mean and variance (`use_input_stats` of PyTorch); running_mean and
        running_var, where given, take up `momentum` of the images' average. Otherwise with running_mean and
        running_var.

    Shapes, dtypes, what is saved and errors are those of `batch_norm_act`; training needs more than one
    pixel. Source: arXiv 1607.08022; `torch.nn.functional.instance_norm`.
    """
    if is_symbolic(x):
        return handle_torch_function(
            instance_norm_act,
            (x,),
            *(x, weight, bias, running_mean, running_var),
            training=training,
            momentum=momentum,
            eps=eps,
            residual=residual,
            negative_slope=negative_slope,
        )
    return norm_act(
        *("instance_norm_act", True, x, weight, bias, running_mean, running_var),
        *(training, momentum, eps, residual, negative_slope),
    )
