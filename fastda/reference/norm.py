"""Batch and instance normalisation with what follows them in residual networks.

Ioffe and Szegedy, arXiv 1502.03167; Ulyanov, Vedaldi and Lempitsky, arXiv 1607.08022.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastda.reference.common import act


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
    """act(batch_norm(x) + residual); see `fastda.batch_norm_act`."""
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return act(y, residual, negative_slope)


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
    """act(instance_norm(x) + residual); see `fastda.instance_norm_act`."""
    y = F.instance_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return act(y, residual, negative_slope)
