"""The operators as modules."""

from fastda.nn.grad_reverse import DomainClassifier, GradientReversal, ScheduledGradientReversal
from fastda.nn.refiner import Refiner, RefinerBlock

__all__ = ["DomainClassifier", "GradientReversal", "Refiner", "RefinerBlock", "ScheduledGradientReversal"]
