"""The convolutions of SimGAN's refiner (Shrivastava et al., arXiv 1612.07828, section 2.3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastda.reference.common import act


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
    """act(x * weight + bias + residual); see `fastda.conv2d`."""
    if padding_mode == "reflect":
        x, padding = F.pad(x, (padding,) * 4, mode="reflect"), 0
    y = F.conv2d(x, weight, bias, stride=stride, padding=padding, dilation=dilation)
    return act(y, residual, 0.0 if relu else negative_slope)


def conv2d_max_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: int = 0,
    kernel_size: int = 2,
    relu: bool = True,
) -> Tensor:
    """The largest entries of relu(x * weight + bias) in its windows; see `fastda.conv2d_max_pool`."""
    y = F.max_pool2d(F.conv2d(x, weight, bias, padding=padding), kernel_size)
    return F.relu(y) if relu else y


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
    """act(x * weight + bias + residual), with stride 1 and padding k // 2; see `fastda.conv_same`."""
    return conv2d(
        x,
        weight,
        bias,
        padding=weight.shape[-1] // 2,
        padding_mode=padding_mode,
        residual=residual,
        relu=relu,
        negative_slope=negative_slope,
    )


def refiner_block(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    negative_slope: float = 0.0,
) -> Tensor:
    """act(x + conv(act(conv(x, weight1) + bias1), weight2) + bias2); see `fastda.refiner_block`."""
    inner = conv_same(x, weight1, bias1, negative_slope=negative_slope)
    return conv_same(inner, weight2, bias2, residual=x, negative_slope=negative_slope)
