"""The operators as modules."""

from fastda.nn.grad_reverse import DomainClassifier, GradientReversal, ScheduledGradientReversal
from fastda.nn.history import ImageHistoryBuffer
from fastda.nn.norm import BatchNormAct2d, InstanceNormAct2d
from fastda.nn.patch_loss import PatchDiscriminator, PatchDiscriminatorLoss, RefinerLoss
from fastda.nn.pool import ReLUMaxPool2d
from fastda.nn.refiner_conv import Refiner, RefinerBlock

__all__ = [
    "BatchNormAct2d",
    "DomainClassifier",
    "GradientReversal",
    "ImageHistoryBuffer",
    "InstanceNormAct2d",
    "PatchDiscriminator",
    "PatchDiscriminatorLoss",
    "ReLUMaxPool2d",
    "Refiner",
    "RefinerBlock",
    "RefinerLoss",
    "ScheduledGradientReversal",
]
