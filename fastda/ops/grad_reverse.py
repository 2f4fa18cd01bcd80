"""Gradient reversal: a view forward, one multiplication backward.

The usual route is a C++ autograd node from `fastda._autograd_<torch version>`, which multiplies in place a
gradient that nobody else holds. It returns None for whatever it leaves alone: bad arguments, tensor
subclasses, transforms, tracing. Those, and a torch for which the module was not built, go through the Python
Functions below.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.overrides import handle_torch_function

from fastda import _torch, backend, reference
from fastda.ops.common import autocast, is_symbolic, number, recordable

_node = backend.autograd_module


def _check_scale(op: str, x: Tensor, scale: float | Tensor) -> None:
    if isinstance(scale, Tensor):
        if not scale.is_floating_point():
            raise TypeError(f"{op}: scale must be a float or a floating-point tensor, got {scale.dtype}")
        if scale.requires_grad:
            raise ValueError(
                f"{op}: scale is a constant and must not require grad; pass scale.detach() if that is meant"
            )
        if scale.dim() > 1:
            raise ValueError(
                f"{op}: scale must be a float, a 0-dim tensor or a 1-D tensor, got shape {tuple(scale.shape)}"
            )
        if scale.dim() == 1:
            if x.dim() == 0 or scale.shape[0] != x.shape[0]:
                raise ValueError(
                    f"{op}: a 1-D scale needs one value per entry of x's dim 0, "
                    f"got {tuple(scale.shape)} for x of shape {tuple(x.shape)}"
                )
            if scale.device != x.device:
                raise ValueError(f"{op}: a 1-D scale must be on x's device {x.device}, got {scale.device}")
    elif not isinstance(scale, (float, int)):
        raise TypeError(f"{op}: scale must be a float or a tensor, got {type(scale).__name__}")


def _check_x(op: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must have a floating-point dtype, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{op}: x must be a strided tensor, got layout {x.layout}")


def _factor(x: Tensor, scale: float | Tensor) -> float | Tensor:
    """−scale as it is now: a later in-place change of the scale must not reach a recorded gradient."""
    if isinstance(scale, Tensor) and scale.dim() == 0:
        if _torch.value_known(scale):
            return -scale.item()
        scale = scale.to(x.device)
    return -scale


def _as_sum(x: Tensor, scale: float | Tensor) -> Tensor:
    """The reversal in torch's own operators, which a trace keeps: x + 0, where 0 has the gradient −1 − scale.

    Where x is not finite, neither is the result (NaN for an infinity).
    """
    if isinstance(scale, Tensor) and scale.dim() == 1:
        scale = scale.view(-1, *(1 for _ in x.shape[1:]))
    z = (x * (-1 - scale)).to(x.dtype)
    return x + (z - z.detach())


class _GradReverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float | Tensor, serving: str) -> Tensor:
        ctx.serving = serving
        if isinstance(factor, Tensor):
            ctx.save_for_backward(factor)
        else:
            ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.saved_tensors:
            return grad * ctx.factor, None, None
        (factor,) = ctx.saved_tensors
        if (
            factor.dim() == 0
            or torch.is_grad_enabled()
            or is_compiling()
            or _torch.transforms_active()
            or type(grad) is not Tensor
        ):
            # Differentiable operators, so that a second derivative is the reversal again; a compiler fuses
            # them with what stands around them.
            factor = factor.view(-1, *(1 for _ in grad.shape[1:])) if factor.dim() else factor
            return (grad * factor).to(grad.dtype), None, None
        return backend.kernels(ctx.serving).grad_reverse_backward(grad, -factor), None, None


def grad_reverse(x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Gradient reversal: `x` forward, the gradient times `-scale` backward.

    Args:
        x: any shape, any floating-point dtype, any layout and device.
        scale: a float; a 0-dim floating-point tensor, whose value can change without a recompilation; or a
            1-D one of one scale per entry of `x`'s dim 0. It gets no gradient. Its value is taken when the op
            is called: changing it before the backward pass does not alter the gradient.

    Returns:
        A view of `x` (same storage). Changing it in place raises wherever a gradient is recorded, so no
        in-place ReLU directly behind a reversal. Where none is, it is an ordinary view, and a change in place
        changes `x`.

    Saved for backward: the scale. Double backward: the reversal again.
    Raises TypeError for integer, complex or sparse `x`, a non-floating or non-tensor scale; ValueError for a
    scale that requires grad or has the wrong shape.

    Source: Ganin and Lempitsky, arXiv 1409.7495, section 3.
    """
    if _node is not None and backend._forced is None and not is_dynamo_compiling():
        y = _node.grad_reverse(x, scale)
        if y is not None:
            return y
    if is_symbolic(x):
        return handle_torch_function(grad_reverse, (x,), x, scale)
    scale = number(scale)
    _check_x("grad_reverse", x)
    _check_scale("grad_reverse", x, scale)
    if _torch.tracing():
        return _as_sum(x, scale)
    serving = backend.select(x)
    if serving == "reference":
        return reference.grad_reverse(x, scale)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x.view_as(x)
    return _GradReverse.apply(x, _factor(x, scale), serving)


class _GradReverseLinear(torch.autograd.Function):
    """For a factor known to the host: it becomes the alpha of the product grad · weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, factor: float, serving: str
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.factor, ctx.serving = factor, serving
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        n = x.shape[:-1].numel()
        rows = grad.reshape(n, weight.shape[0])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            if torch.is_grad_enabled():
                dx = (rows @ weight) * ctx.factor
            else:
                # beta is 0: what stands in for the summand is never read.
                dx = torch.addmm(weight.new_empty(1), rows, weight, beta=0, alpha=ctx.factor)
            dx = dx.view(x.shape)
        if ctx.needs_input_grad[1]:
            if torch.is_grad_enabled() and x.requires_grad:
                # For second derivatives x stands behind its reversal.
                x = _GradReverse.apply(x, ctx.factor, ctx.serving)
            dw = rows.t() @ x.reshape(n, x.shape[-1])
        if ctx.needs_input_grad[2]:
            db = rows.sum(0)
        return dx, dw, db, None, None


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    op = "grad_reverse_linear"
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None and name == "bias":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
        if t.device != x.device:
            raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {t.device}")
        if t.dtype != x.dtype:
            raise TypeError(f"{op}: {name} must have x's dtype {x.dtype}, got {t.dtype}")
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be (..., in_features), got a 0-dim tensor")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: weight must be (out_features, {x.shape[-1]}) for x of shape {tuple(x.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")


def grad_reverse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: float | Tensor = 1.0
) -> Tensor:
    """`F.linear(grad_reverse(x, scale), weight, bias)` with −scale folded into the product that gives dx.

    Args:
        x: (..., I), floating-point.
        weight: (O, I), the dtype and device of `x`; under autocast any that `F.linear` takes there.
        bias: (O) or None.
        scale: as in `grad_reverse`; a float or a 0-dim CPU tensor costs nothing, others one pass over the
            gradient.

    Returns:
        (..., O). dweight and dbias are those of `F.linear`; dx = −scale · dy · weight.

    Saved for backward: x, weight, the scale. Double backward works. Raises as `grad_reverse`, and ValueError
    or TypeError for a weight or bias that does not fit `x`.
    """
    if _node is not None and backend._forced is None and not is_dynamo_compiling():
        y = _node.grad_reverse_linear(x, weight, bias, scale)
        if y is not None:
            return y
    if is_symbolic(x):
        return handle_torch_function(grad_reverse_linear, (x,), x, weight, bias, scale)
    scale = number(scale)
    _check_x("grad_reverse_linear", x)
    _check_scale("grad_reverse_linear", x, scale)
    if _torch.tracing():
        return F.linear(_as_sum(x, scale), weight, bias)
    x, weight, bias = autocast(x, weight, bias)
    _check_linear(x, weight, bias)
    serving = backend.select(x)
    if serving == "reference":
        return reference.grad_reverse_linear(x, weight, bias, scale)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        x, weight, bias = recordable(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        factor = _factor(x, scale)
        if isinstance(factor, Tensor) or is_compiling():
            x = _GradReverse.apply(x, factor, serving)
        else:
            return _GradReverseLinear.apply(x, weight, bias, factor, serving)
    return F.linear(x, weight, bias)
