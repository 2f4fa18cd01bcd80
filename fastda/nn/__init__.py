"""The operators as modules."""

from fastda.nn.grad_reverse import DomainClassifier, GradientReversal, ScheduledGradientReversal
from fastda.nn.history import ImageHistoryBuffer
from fastda.nn.patch_loss import PatchDiscriminator, PatchDiscriminatorLoss, RefinerLoss
from fastda.nn.refiner_conv import Refiner, RefinerBlock

__all__ = [
    "DomainClassifier",
    "GradientReversal",
    "ImageHistoryBuffer",
    "PatchDiscriminator",
    "PatchDiscriminatorLoss",
    "Refiner",
    "RefinerBlock",
    "RefinerLoss",
    "ScheduledGradientReversal",
]
