"""SimGAN's refiner network (Shrivastava et al., arXiv 1612.07828, section 2.3 and appendix)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.overrides import handle_torch_function

from fastda import _torch
from fastda.nn.norm import BatchNormAct2d, InstanceNormAct2d
from fastda.ops.common import check_slope, is_symbolic
from fastda.ops.refiner_conv import checked_refiner_block, conv_same

_NORMS = {"batch": BatchNormAct2d, "instance": InstanceNormAct2d}


class RefinerBlock(nn.Module):
    """SimGAN's residual block, relu(x + conv2(relu(conv1(x)))), fused.

    channels: of the image that comes and goes, (N, channels, H, W).
    kernel_size: odd; 3 for gaze, 7 for hand images.
    recompute_inner: compute the activation between the convolutions again in backward instead of keeping it:
        one convolution more for one image less of memory. Only without a norm.
    norm: "batch" or "instance" for relu(x + norm2(conv2(relu(norm1(conv1(x)))))), where a norm, the addition
        and the ReLU behind it are one operator; None for no normalisation.
    negative_slope: of both ReLUs, 0 or more; above 0 they are leaky.

    The parameters are those of two `nn.Conv2d`, conv1 and conv2. With a norm these have no bias, which the
    norm would take away, and norm1 and norm2 hold the parameters and buffers of two `nn.BatchNorm2d` or two
    `nn.InstanceNorm2d` with affine=True.

    Raises ValueError for an even kernel_size, an unknown norm, a slope below 0, recompute_inner with a norm.
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int = 3,
        *,
        recompute_inner: bool = False,
        norm: str | None = None,
        negative_slope: float = 0.0,
    ) -> None:
        super().__init__()
        _check("RefinerBlock", kernel_size, norm, negative_slope, recompute_inner)
        self.recompute_inner, self.negative_slope = recompute_inner, negative_slope

        def convolution() -> nn.Conv2d:
            padding = kernel_size // 2
            return nn.Conv2d(channels, channels, kernel_size, padding=padding, bias=norm is None)

        def normalisation() -> nn.Module | None:
            if norm is None:
                return None
            return _NORMS[norm](channels, affine=True, negative_slope=negative_slope)

        self.conv1, self.norm1 = convolution(), normalisation()
        self.conv2, self.norm2 = convolution(), normalisation()

    def forward(self, x: Tensor) -> Tensor:
        c1, c2 = self.conv1, self.conv2
        if self.norm1 is not None and self.norm2 is not None:
            return self.norm2(conv_same(self.norm1(conv_same(x, c1.weight)), c2.weight), x)
        return checked_refiner_block(
            *(x, c1.weight, c1.bias, c2.weight, c2.bias),
            recompute=self.recompute_inner,
            negative_slope=self.negative_slope,
        )

    def extra_repr(self) -> str:
        shown = ["recompute_inner=True"] if self.recompute_inner else []
        shown += [f"negative_slope={self.negative_slope}"] if self.negative_slope else []
        return ", ".join(shown)


class Refiner(nn.Module):
    """SimGAN's refiner: k×k convolution, residual blocks, 1×1 convolution; (N, in_channels, H, W) in and out.

    norm, negative_slope: those of `RefinerBlock`; the slope is also that of the ReLU behind the first layer,
        which has no norm. Entries of the state_dict are blocks.0.conv1.weight, blocks.0.norm1.weight, ….

    `Refiner.gaze()` is the eye network (four 3×3 blocks, 296,129 parameters), `Refiner.hand()` the one for
    hands (ten 7×7 blocks, 4,018,625 parameters). The paper does not say what follows the first and the last
    convolution; here the first is followed by a ReLU and the last by nothing.

    Between the first and the last layer the activations stay channels_last, which the kernels like best; the
    result has the memory format of the input.
    """

    def __init__(
        self,
        in_channels: int = 1,
        channels: int = 64,
        blocks: int = 4,
        kernel_size: int = 3,
        *,
        recompute_inner: bool = False,
        norm: str | None = None,
        negative_slope: float = 0.0,
    ) -> None:
        super().__init__()
        _check("Refiner", kernel_size, norm, negative_slope, recompute_inner)
        self.negative_slope = negative_slope
        block: Any = dict(recompute_inner=recompute_inner, norm=norm, negative_slope=negative_slope)
        self.first = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2)
        self.blocks = nn.Sequential(*(RefinerBlock(channels, kernel_size, **block) for _ in range(blocks)))
        self.last = nn.Conv2d(channels, in_channels, 1)

    @classmethod
    def gaze(cls, **options: Any) -> Refiner:
        """For 1×35×55 eye images: 3×3 filters, four blocks. The keyword arguments are those of `Refiner`."""
        return cls(1, 64, 4, 3, **options)

    @classmethod
    def hand(cls, **options: Any) -> Refiner:
        """For 1×224×224 hand depth images: 7×7 filters, ten blocks. The keyword arguments are likewise."""
        return cls(1, 64, 10, 7, **options)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first
        h = conv_same(_as_channels_last(x), first.weight, first.bias, negative_slope=self.negative_slope)
        h = conv_same(self.blocks(h), self.last.weight, self.last.bias)
        return _laid_out_as(x, h)


def _check(op: str, kernel_size: int, norm: str | None, negative_slope: float, recompute_inner: bool) -> None:
    if kernel_size % 2 == 0:
        raise ValueError(f"{op}: kernel_size must be odd, got {kernel_size}")
    if norm is not None and norm not in _NORMS:
        raise ValueError(f"{op}: norm must be 'batch', 'instance' or None, got {norm!r}")
    check_slope(op, negative_slope, "a number of 0 or more")
    if norm is not None and recompute_inner:
        raise ValueError(f"{op}: recompute_inner is for blocks without a norm, got norm={norm!r}")


def _as_channels_last(x: Tensor) -> Tensor:
    if is_symbolic(x):
        return handle_torch_function(_as_channels_last, (x,), x)
    if x.dim() != 4:
        raise ValueError(f"Refiner: x must be (N, C, H, W), got {tuple(x.shape)}")
    return _torch.as_channels_last(x)


def _laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    if is_symbolic(x):
        return handle_torch_function(_laid_out_as, (x,), x, y)
    return y.contiguous(memory_format=_torch.memory_format(x))
