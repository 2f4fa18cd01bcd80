"""SimGAN's refiner network (Shrivastava et al., arXiv 1612.07828, section 2.3 and appendix)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.overrides import handle_torch_function

from fastda import _torch
from fastda.ops.common import check_slope, is_symbolic
from fastda.ops.refiner_conv import checked_refiner_block, conv_same


class RefinerBlock(nn.Module):
    """SimGAN's residual block, relu(x + conv2(relu(conv1(x)))), fused.

    channels: of the image that comes and goes, (N, channels, H, W).
    kernel_size: odd; 3 for gaze, 7 for hand images.
    recompute_inner: compute the activation between the convolutions again in backward instead of keeping it:
        one convolution more for one image less of memory.
    negative_slope: of both ReLUs, 0 or more; above 0 they are leaky.

    The parameters are those of two `nn.Conv2d`, conv1 and conv2.
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int = 3,
        *,
        recompute_inner: bool = False,
        negative_slope: float = 0.0,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"RefinerBlock: kernel_size must be odd, got {kernel_size}")
        check_slope("RefinerBlock", negative_slope, "a number of 0 or more")
        self.recompute_inner, self.negative_slope = recompute_inner, negative_slope
        self.conv1 = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        c1, c2 = self.conv1, self.conv2
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
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"Refiner: kernel_size must be odd, got {kernel_size}")
        self.first = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2)
        self.blocks = nn.Sequential(
            *(RefinerBlock(channels, kernel_size, recompute_inner=recompute_inner) for _ in range(blocks))
        )
        self.last = nn.Conv2d(channels, in_channels, 1)

    @classmethod
    def gaze(cls, *, recompute_inner: bool = False) -> Refiner:
        """For 1×35×55 eye images: 3×3 filters, four blocks."""
        return cls(1, 64, 4, 3, recompute_inner=recompute_inner)

    @classmethod
    def hand(cls, *, recompute_inner: bool = False) -> Refiner:
        """For 1×224×224 hand depth images: 7×7 filters, ten blocks."""
        return cls(1, 64, 10, 7, recompute_inner=recompute_inner)

    def forward(self, x: Tensor) -> Tensor:
        h = conv_same(_as_channels_last(x), self.first.weight, self.first.bias, relu=True)
        h = conv_same(self.blocks(h), self.last.weight, self.last.bias)
        return _laid_out_as(x, h)


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
