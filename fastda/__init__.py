"""Fused kernels for domain adaptation, matching their PyTorch references in value and gradient."""

from fastda import nn
from fastda.backend import info, use_backend
from fastda.ops.grad_reverse import grad_reverse, grad_reverse_linear
from fastda.ops.norm import batch_norm_act, instance_norm_act
from fastda.ops.patch_loss import (
    patch_discriminator_loss,
    patch_generator_loss,
    patch_head_discriminator_loss,
    refiner_loss,
    self_regularization,
)
from fastda.ops.pool import relu_max_pool
from fastda.ops.refiner_conv import conv2d, conv2d_max_pool, conv_same, refiner_block
from fastda.optimize import optimize

__version__ = "0.1.0"
__all__ = [
    "batch_norm_act",
    "conv2d",
    "conv2d_max_pool",
    "conv_same",
    "grad_reverse",
    "grad_reverse_linear",
    "info",
    "instance_norm_act",
    "nn",
    "optimize",
    "patch_discriminator_loss",
    "patch_generator_loss",
    "patch_head_discriminator_loss",
    "refiner_block",
    "refiner_loss",
    "relu_max_pool",
    "self_regularization",
    "use_backend",
]
