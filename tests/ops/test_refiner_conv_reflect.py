"""The convolutions with a padding that mirrors the image."""

import pytest
import torch

import fastda
from fastda import reference
from tests.common import (
    check_against_reference,
    check_compiled,
    check_error,
    check_gradients,
    check_opcheck,
    check_transforms,
)
from tests.ops.refiner_conv import CHANNELS_LAST, LAYOUTS, B, W, X, conv, images_as

# (N, C, K, k, H, W) for each way of convolving, at sizes where the mirrored columns fall on either side of a
# vector's end: direct, Winograd by tiles, by channels, large filters, 5x5.
SIZES = [
    *((1, 1, 2, 3, 2, 2), (2, 3, 5, 5, 3, 7), (2, 3, 5, 7, 9, 41), (1, 2, 3, 3, 5, 530)),
    *((2, 16, 20, 3, 13, 63), (1, 20, 17, 3, 29, 64), (1, 17, 33, 3, 37, 65), (1, 16, 16, 3, 30, 66)),
    *((1, 40, 70, 3, 9, 7), (1, 16, 16, 3, 4, 5), (1, 16, 17, 7, 13, 18), (1, 20, 24, 5, 18, 14)),
    *((2, 3, 18, 5, 13, 50), (1, 4, 17, 7, 9, 66)),  # few channels
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_reflected_conv_same_matches_reference(sizes, layout):
    arguments = conv(sizes, padding_mode="reflect", relu=False)
    check_against_reference("conv_same", images_as(arguments, LAYOUTS[layout]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 20, 17, 3, 29, 27), (1, 16, 17, 7, 13, 18), (2, 5, 7, 3, 9, 8)], ids=str
)
def test_reflected_dtypes(sizes, dtype):
    for layout in ("contiguous", "channels_last"):
        arguments = conv(sizes, dtype, padding_mode="reflect", residual=True, relu=False, negative_slope=0.2)
        check_against_reference("conv_same", images_as(arguments, LAYOUTS[layout]))


@pytest.mark.isa_independent
@pytest.mark.parametrize("padding, dilation", [(1, 1), (4, 1), (2, 2), (1, 2)])
def test_other_reflected_paddings(padding, dilation):
    arguments = conv((2, 3, 4, 5 if dilation == 1 else 3, 7, 9), padding_mode="reflect", relu=False)
    check_against_reference("conv2d", {**arguments, "padding": padding, "dilation": dilation})


@pytest.mark.parametrize("c, kernel", [(3, 3), (16, 3), (16, 7)])
def test_what_is_not_finite_goes_where_it_is_mirrored(c, kernel):
    for row, column, value in ((1, 1, torch.nan), (0, 5, torch.inf), (8, 11, torch.nan), (9, 12, -torch.inf)):
        x, weight = torch.randn(1, c, 10, 13), torch.randn(c, c, kernel, kernel)
        x[0, c // 2, row, column] = value
        right = reference.conv_same(x.double(), weight.double(), padding_mode="reflect")
        for layout in (torch.contiguous_format, CHANNELS_LAST):
            y = fastda.conv_same(x.contiguous(memory_format=layout), weight, padding_mode="reflect")
            assert torch.equal(y.isfinite(), right.isfinite()) and torch.equal(y.isnan(), right.isnan())


def test_bits_do_not_hang_on_the_threads():
    def results(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            x, weight = (t.detach().requires_grad_() for t in (given["x"], given["weight"]))
            y = fastda.conv_same(x, weight, padding_mode="reflect")
            return (y, *torch.autograd.grad(y.square().sum(), (x, weight)))
        finally:
            torch.set_num_threads(before)

    for kernel in (3, 7):
        given = conv((3, 32, 24, kernel, 45, 38))
        for one, two in zip(results(1), results(2), strict=True):
            assert torch.equal(one, two)


@pytest.mark.isa_independent
def test_reflected_in_torch():
    options = {"padding_mode": "reflect", "relu": False}
    for kernel in (3, 5):
        given = conv((1, 2, 3, kernel, 4, 5), torch.float64, residual=True, negative_slope=0.3, **options)
        check_gradients("conv_same", given)
    check_compiled("conv_same", conv((2, 16, 20, 3, 9, 11), **options), backend="aot_eager")
    check_transforms("conv_same", conv((1, 2, 3, 3, 3, 4), torch.float64, **options))
    x, weight, bias = torch.randn(2, 16, 7, 9), torch.randn(16, 16, 3, 3), torch.randn(16)
    check_opcheck("conv_same", x, weight, bias, x.clone(), True, False, 0.1, True)
    check_opcheck("conv_same_backward", x, x.clone(), weight, None, False, True, True, False, 0.0, True)


@pytest.mark.isa_independent
def test_errors_of_a_reflected_padding():
    arguments = {"x": X, "weight": W, "bias": B}
    for change, message in (
        ({"padding_mode": "circular"}, "padding_mode must be 'zeros' or 'reflect', got 'circular'"),
        (
            {"x": X[..., :1], "padding_mode": "reflect"},
            "x must be larger than its reflected padding, 1, got (2, 3, 7, 1)",
        ),
    ):
        check_error(fastda.conv_same, {**arguments, **change}, ValueError, f"conv_same: {message}")
    reflect = (False, 0.0, True)
    for call in (
        lambda: torch.ops.fastda.conv_same(X[..., :1], W, None, None, False, *reflect),
        lambda: torch.ops.fastda.conv_same_backward(
            torch.randn(2, 4, 7, 9), X, W, None, True, True, True, *reflect
        ),
    ):
        with pytest.raises(RuntimeError, match="must"):
            call()
