"""Triton kernels behind the operators: `fastda.triton.<op>` has the signature of `torch.ops.fastda.<op>`.

Imported by the first call that they serve, never by `import fastda`.
"""

from fastda.triton.grad_reverse import grad_reverse_backward
from fastda.triton.patch_loss import (
    patch_discriminator_loss,
    patch_generator_loss,
    patch_head_discriminator_loss,
    patch_loss_map,
    patch_loss_scale_,
    refiner_loss,
    self_regularization,
)
from fastda.triton.refiner_conv import conv_same, conv_same_backward, refiner_block, refiner_block_backward

__all__ = [
    "conv_same",
    "conv_same_backward",
    "grad_reverse_backward",
    "patch_discriminator_loss",
    "patch_generator_loss",
    "patch_head_discriminator_loss",
    "patch_loss_map",
    "patch_loss_scale_",
    "refiner_block",
    "refiner_block_backward",
    "refiner_loss",
    "self_regularization",
]
