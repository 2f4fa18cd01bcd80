"""Gradient reversal: the identity whose derivative is −scale (Ganin and Lempitsky, arXiv 1409.7495)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grad_reverse(x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """`x` in the forward pass, the incoming gradient times `-scale` in the backward pass.

    `x` has any shape; `scale` is a float, a 0-dim tensor, or a 1-D tensor of one scale per entry of `x`'s dim
    0. The scale is a constant and gets no gradient. The value equals `x` everywhere; where `x` is Inf or NaN
    no formula made of differentiable operators has the derivative −scale, and it is 0 here (the fast operator
    gives −scale there too).
    """
    if isinstance(scale, Tensor):
        scale = scale.detach()
        if scale.dim() == 1:
            scale = scale.view(-1, *(1 for _ in x.shape[1:]))
    constant = x.detach()
    reverse = constant - scale * (x - constant)  # x − x is 0, with derivative 1
    return torch.where(x.isfinite(), reverse.to(x.dtype), constant)


def grad_reverse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: float | Tensor = 1.0
) -> Tensor:
    """`F.linear(grad_reverse(x, scale), weight, bias)`: x (…, I), weight (O, I), bias (O) → (…, O)."""
    return F.linear(grad_reverse(x, scale), weight, bias)
