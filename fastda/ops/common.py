"""What the operators' autograd Functions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import has_torch_function

from fastda import _torch


def composite_backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of `function(*inputs)` for the inputs in `needs`, themselves differentiable.

    The backward of a Function runs this where grad mode is on (create_graph=True), with its reference as
    `function`, so that second derivatives are those of plain PyTorch.
    """
    with torch.enable_grad():
        # A tensor may be passed twice; each argument gets an identity of its own.
        leaves = [None if t is None else t.view_as(t) for t in inputs]
        wanted = [t for t, need in zip(leaves, needs, strict=True) if need and t is not None]
        grads = iter(
            torch.autograd.grad(function(*leaves), wanted, grad, create_graph=True, materialize_grads=True)
        )
    return [next(grads) if need and t is not None else None for t, need in zip(leaves, needs, strict=True)]


def activation_gradient(grad: Tensor, output: Tensor, negative_slope: float) -> Tensor:
    """`grad` through (leaky) ReLU, whose result is `output`; differentiable in `grad`."""
    if negative_slope == 0:
        return torch.ops.aten.threshold_backward(grad, output, 0)
    return torch.ops.aten.leaky_relu_backward(grad, output, negative_slope, True)


def check_slope(op: str, negative_slope: Any, what: str = "None or a number of 0 or more") -> None:
    """Below 0 an output would not tell the sign of what went into the activation."""
    is_number = isinstance(negative_slope, Real) and not isinstance(negative_slope, bool)
    if not is_number or not negative_slope >= 0:
        raise ValueError(f"{op}: negative_slope must be {what}, got {negative_slope!r}")


def shown(value: Any) -> Any:
    """For a repr: the number that a 0-dim tensor holds; itself where it holds none, as on `meta`."""
    try:
        return value.item() if isinstance(value, Tensor) and value.dim() == 0 else value
    except RuntimeError:
        return value


def laid_out_as(parameter: Tensor, grad: Tensor) -> Tensor:
    """`grad` with the strides of its parameter, as DistributedDataParallel's buckets have them."""
    if grad.stride() == parameter.stride():
        return grad
    return torch.empty_like(parameter, dtype=grad.dtype).copy_(grad)


def autocast(x: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """What autocast makes of the operands of a product: its lower precision, float64 left alone."""
    dtype = _torch.autocast_dtype(x.device.type)
    if dtype is None:
        return (x, *tensors)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (x, *tensors)
    )


def is_symbolic(x: Any) -> bool:
    """Whether `x` stands for a tensor in torch.fx.symbolic_trace, which records the call as it is."""
    return not isinstance(x, Tensor) and has_torch_function((x,))


def number(value: Any) -> Any:
    """A real number of any library, such as NumPy's float32, as Python's; whatever else as it is."""
    if isinstance(value, (float, int, Tensor)) or not isinstance(value, Real):
        return value
    return float(value)


def recordable(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Arguments for a Function.

    Copies stand in for tensors made in inference mode, which autograd refuses to save; under torch.compile,
    which refuses a tensor passed twice, views.
    """
    if not is_compiling():
        for t in tensors:
            if t is not None and t.is_inference():
                return tuple(t.clone() if t is not None and t.is_inference() else t for t in tensors)
        return tensors
    seen: list[Tensor | None] = []
    for t in tensors:
        seen.append(t.view_as(t) if t is not None and any(t is s for s in seen) else t)
    return tuple(seen)
