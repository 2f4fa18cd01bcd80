"""Fused kernels for domain adaptation, matching their PyTorch references in value and gradient."""

from fastda.backend import info, use_backend

__version__ = "0.1.0"
__all__ = ["info", "use_backend"]
