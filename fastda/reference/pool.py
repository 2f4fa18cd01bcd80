"""ReLU and max-pooling, as convolutional networks follow a layer by them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

Pair = int | tuple[int, ...]


def relu_max_pool(
    x: Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    *,
    relu: bool = True,
) -> Tensor:
    """The largest entry of every window of relu(x), or of x; see `fastda.relu_max_pool`."""
    return F.max_pool2d(F.relu(x) if relu else x, kernel_size, stride, padding, dilation, ceil_mode)
