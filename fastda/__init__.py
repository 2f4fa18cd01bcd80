"""Fused kernels for domain adaptation, matching their PyTorch references in value and gradient."""

from fastda.backend import info, use_backend
from fastda.ops.grad_reverse import grad_reverse, grad_reverse_linear

__version__ = "0.1.0"
__all__ = ["grad_reverse", "grad_reverse_linear", "info", "use_backend"]
