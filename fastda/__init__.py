"""Fused kernels for domain adaptation, matching their PyTorch references in value and gradient."""

from fastda.backend import info, use_backend
from fastda.ops.grad_reverse import grad_reverse, grad_reverse_linear
from fastda.ops.refiner_conv import conv_same, refiner_block

__version__ = "0.1.0"
__all__ = ["conv_same", "grad_reverse", "grad_reverse_linear", "info", "refiner_block", "use_backend"]
