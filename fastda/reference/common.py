"""What the references share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def act(y: Tensor, residual: Tensor | None, negative_slope: float | None) -> Tensor:
    """The sum of both, then leaky ReLU: ReLU with a slope of 0, nothing without one."""
    if residual is not None:
        y = y + residual
    if negative_slope is None:
        return y
    return F.leaky_relu(y, negative_slope) if negative_slope else F.relu(y)
