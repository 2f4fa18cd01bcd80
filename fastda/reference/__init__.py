"""Every operator as a few lines of plain PyTorch that read like the formula.

This package is the specification (run in float64 it is the judge of the kernels), the fallback where no
kernels serve, and what torch.func transforms go through. It imports nothing else of fastda.
"""

from fastda.reference.grad_reverse import grad_reverse, grad_reverse_linear
from fastda.reference.norm import batch_norm_act, instance_norm_act
from fastda.reference.patch_loss import (
    patch_discriminator_loss,
    patch_generator_loss,
    patch_head_discriminator_loss,
    refiner_loss,
    self_regularization,
)
from fastda.reference.pool import relu_max_pool
from fastda.reference.refiner_conv import conv2d, conv2d_max_pool, conv_same, refiner_block

__all__ = [
    "batch_norm_act",
    "conv2d",
    "conv2d_max_pool",
    "conv_same",
    "grad_reverse",
    "grad_reverse_linear",
    "instance_norm_act",
    "patch_discriminator_loss",
    "patch_generator_loss",
    "patch_head_discriminator_loss",
    "refiner_block",
    "refiner_loss",
    "relu_max_pool",
    "self_regularization",
]
