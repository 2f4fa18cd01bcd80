"""Sizes at the edge: nothing at all, one element, no images, no rows."""

import pytest
import torch

import fastda
from fastda import reference, registry
from fastda.tools import verify
from tests import lanes
from tests.conformance.cases import arguments_for, compare, every_dtype, every_operator, few

# What of the sizes of an operator may be 0.
EMPTY = {
    "grad_reverse": ((0,), (0, 4), (4, 0), (2, 0, 3, 2)),
    "grad_reverse_linear": ((0, 3, 2), (3, 2, 0)),
    "patch_discriminator_loss": ((0, 2, 3, 4), (2, 0, 3, 4), (0, 0, 3, 4), (2, 3, 0, 4)),
    "patch_generator_loss": ((0, 3, 4), (2, 3, 0)),
    "self_regularization": ((0, 1, 3, 4), (2, 1, 3, 0)),
    "refiner_loss": ((0, 1, 8, 8), (2, 1, 0, 8)),
    "patch_head_discriminator_loss": ((0, 2, 5, 3, 4), (2, 0, 5, 3, 4)),
    "batch_norm_act": ((0, 3, 4, 5), (2, 3, 0, 5)),
    "instance_norm_act": ((2, 3, 0, 5),),
    "relu_max_pool": ((0, 3, 9, 14),),
    "conv2d": ((0, 3, 4, 3, 5, 6), (0, 20, 16, 5, 9, 8), (0, 20, 16, 4, 12, 12)),
    "conv2d_max_pool": ((0, 3, 4, 3, 5, 6), (0, 20, 16, 5, 9, 8)),
    "conv_same": ((0, 3, 4, 3, 5, 6), (0, 64, 64, 3, 5, 6)),
    "refiner_block": ((0, 3, 3, 5, 6), (0, 64, 3, 5, 6)),
}


def drawn(op, options, sizes, dtype):
    """As `verify.draw_arguments`, which needs a value to settle on."""

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64).to(dtype).double()

    shapes = op.tensors(options, *sizes)
    constants = {n: v(draw, *sizes) if callable(v) else v for n, v in options.items()}
    return {**constants, **{name: draw(*shape) for name, shape in shapes.items()}}, list(shapes)


@every_dtype
@every_operator
def test_nothing(lane, op, dtype):
    """Shapes are kept, a mean of nothing is NaN, a sum 0, and gradients are of the inputs' shapes."""
    for sizes in EMPTY[op.name]:
        for options in few(op):
            exact, names = drawn(op, options, sizes, dtype)
            wrong = compare(lane, op, options, sizes, dtype, exact, names)
            assert not wrong, sizes


@pytest.mark.lanes(*lanes.KERNELS)
@every_dtype
@pytest.mark.parametrize("sizes", [(2, 3, 4, 3, 0, 6), (2, 64, 64, 3, 5, 0)], ids=str)
def test_images_without_pixels(lane, sizes, dtype):
    """PyTorch's own convolution refuses them; here there is nothing to do, and no gradient."""
    (op,) = (o for o in registry.OPERATORS if o.name == "conv_same")
    options = {"residual": True, "relu": True}
    exact, names = drawn(op, options, sizes, dtype)
    given = arguments_for(lane, exact, dtype)
    for what, result in verify.evaluate(fastda.conv_same, given, names, 0).items():
        shape = (sizes[0], sizes[2], *sizes[4:]) if what == "value" else given[what].shape
        assert result.shape == shape and not result.any(), what


@every_operator
def test_the_memory_format_of_an_image_is_kept(lane, op):
    exact, _ = verify.draw_arguments(op, op.options[-1], op.sizes[1], torch.float32, 0)
    for layout in ("contiguous", "channels_last"):
        given = arguments_for(lane, exact, torch.float32, layout)
        with torch.no_grad():
            out = getattr(fastda, op.name)(**given)
            expected = getattr(reference, op.name)(**given)
        for o, e in zip(*(x if isinstance(x, tuple) else (x,) for x in (out, expected)), strict=True):
            assert o.shape == e.shape and o.dtype == e.dtype
            if op.name == "instance_norm_act" and lane.backend != "reference":
                e = given["x"]  # PyTorch's own is contiguous whatever x is
            assert o.stride() == e.stride() or o.dim() != 4 or op.name.startswith("patch")
