"""What the operators' autograd Functions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def relu_gradient(grad: Tensor, output: Tensor) -> Tensor:
    """`grad` where ReLU's result is positive or NaN, else 0; differentiable in `grad`."""
    return torch.ops.aten.threshold_backward(grad, output, 0)


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


def distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Arguments for a Function. Under torch.compile, which refuses a tensor passed twice, views stand in."""
    if not is_compiling():
        return tensors
    seen: list[Tensor | None] = []
    for t in tensors:
        seen.append(t.view_as(t) if t is not None and any(t is s for s in seen) else t)
    return tuple(seen)
