"""Patch discriminators and their losses as modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastda.ops.common import number, shown
from fastda.ops.patch_loss import (
    KINDS,
    REDUCTIONS,
    _check_options,
    _scale,
    patch_discriminator_loss,
    refiner_loss,
)


class PatchDiscriminator(nn.Module):
    """A fully convolutional discriminator: an image to a map of logits, one answer per local patch.

    `features`, any module, then `head`, the convolution to the logits: two channels for the kind of loss
    `softmax`, one for the others. `PatchDiscriminator.gaze()` and `.hand()` are SimGAN's networks,
    `.patchgan()` is pix2pix's. Where the head is 1×1 (SimGAN's are), `patch_head_discriminator_loss(
    d.features(real), d.features(fake), d.head.weight, d.head.bias)` fuses it with the loss.
    """

    def __init__(self, features: nn.Module, head: nn.Conv2d) -> None:
        super().__init__()
        self.features, self.head = features, head

    @classmethod
    def gaze(cls, in_channels: int = 1, kind: str = "softmax") -> PatchDiscriminator:
        """For 1×35×55 eye images: 75,906 parameters, a map of 9×14."""
        features = nn.Sequential(
            *_conv(in_channels, 96, 3, 2),
            *_conv(96, 64, 3, 2),
            nn.MaxPool2d(3, 1, padding=1),
            *_conv(64, 32, 3, 1),
            *_conv(32, 32, 1, 1),
        )
        return cls(features, nn.Conv2d(32, _logits(kind), 1))

    @classmethod
    def hand(cls, in_channels: int = 1, kind: str = "softmax") -> PatchDiscriminator:
        """For 1×224×224 hand depth images: a map of 7×7."""
        features = nn.Sequential(
            *_conv(in_channels, 96, 7, 4),
            *_conv(96, 64, 5, 2),
            nn.MaxPool2d(3, 2, padding=1),
            *_conv(64, 32, 3, 2),
            *_conv(32, 32, 1, 1),
        )
        return cls(features, nn.Conv2d(32, _logits(kind), 1))

    @classmethod
    def patchgan(
        cls,
        in_channels: int = 3,
        channels: int = 64,
        layers: int = 3,
        kind: str = "lsgan",
        norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
    ) -> PatchDiscriminator:
        """pix2pix's PatchGAN: with three layers an answer sees 70×70 pixels; 3×256×256 gives 30×30.

        norm: what makes the normalisation of n channels, or None. The gradient penalties of WGAN-GP and R1
        are about single images, so with them it must not mix images: None or nn.InstanceNorm2d.
        Source: Isola et al., arXiv 1611.07004, appendix 6.1.2.
        """
        parts: list[nn.Module] = []
        width = in_channels
        for i in range(layers + 1):
            out, stride = channels * min(2**i, 8), 2 if i < layers else 1
            normalise = norm if i > 0 else None  # it takes the place of a bias
            parts.append(nn.Conv2d(width, out, 4, stride, padding=1, bias=normalise is None))
            if normalise is not None:
                parts.append(normalise(out))
            parts.append(nn.LeakyReLU(0.2, inplace=True))
            width = out
        return cls(nn.Sequential(*parts), nn.Conv2d(width, _logits(kind), 4, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int) -> tuple[nn.Module, nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2)
    return conv, nn.ReLU(inplace=True)


def _logits(kind: str) -> int:
    if kind not in KINDS:
        raise ValueError(f"PatchDiscriminator: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return 2 if kind == "softmax" else 1


class PatchDiscriminatorLoss(nn.Module):
    """`fastda.patch_discriminator_loss` with its options fixed: (real_logits, fake_logits) to the loss."""

    def __init__(
        self,
        kind: str = "softmax",
        *,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        return_accuracy: bool = False,
    ) -> None:
        super().__init__()
        reductions = (*REDUCTIONS, "none")
        _check_options("PatchDiscriminatorLoss", kind, reduction, label_smoothing, reductions)
        self.kind, self.reduction = kind, reduction
        self.label_smoothing, self.return_accuracy = label_smoothing, return_accuracy

    def forward(
        self,
        real_logits: Tensor,
        fake_logits: Tensor,
        real_weight: Tensor | None = None,
        fake_weight: Tensor | None = None,
    ) -> Any:
        return patch_discriminator_loss(
            real_logits,
            fake_logits,
            self.kind,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            real_weight=real_weight,
            fake_weight=fake_weight,
            return_accuracy=self.return_accuracy,
        )

    def extra_repr(self) -> str:
        return f"{self.kind!r}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"


class RefinerLoss(nn.Module):
    """`fastda.refiner_loss` with its options fixed: (fake_logits, refined, synthetic) to the loss.

    reg_scale: λ of the ℓ₁ term. A float is kept as an attribute; a 0-dim tensor as a buffer, which may change
    its value at every step without a recompilation. The paper gives no value.
    """

    reg_scale: float | Tensor

    def __init__(self, reg_scale: float | Tensor, kind: str = "softmax", *, reduction: str = "mean") -> None:
        super().__init__()
        _check_options("RefinerLoss", kind, reduction, 0.0, REDUCTIONS)
        _scale("RefinerLoss", "reg_scale", reg_scale, torch.empty(()))
        self.kind, self.reduction = kind, reduction
        if isinstance(reg_scale, Tensor):
            self.register_buffer("reg_scale", reg_scale)
        else:
            self.reg_scale = number(reg_scale)

    def forward(self, fake_logits: Tensor, refined: Tensor, synthetic: Tensor) -> Tensor:
        return refiner_loss(
            fake_logits, refined, synthetic, self.reg_scale, self.kind, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        return f"reg_scale={shown(self.reg_scale)}, {self.kind!r}, reduction={self.reduction!r}"
