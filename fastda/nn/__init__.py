"""The operators as modules."""

from fastda.nn.grad_reverse import DomainClassifier, GradientReversal, ScheduledGradientReversal

__all__ = ["DomainClassifier", "GradientReversal", "ScheduledGradientReversal"]
