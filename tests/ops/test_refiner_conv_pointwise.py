"""1×1 convolutions, which of contiguous images are products of a matrix with rows of pixels."""

import pytest
import torch

import fastda
from fastda import reference
from tests.common import assert_same_bits_with_threads, check_against_reference
from tests.ops.refiner_conv import LAYOUTS, images_as
from tests.ops.test_refiner_conv_padding import case

# (N, C, K, 1, H, W): panels of pixels that end in a vector, in a row and in an image; of many images; sums in
# parts; panels of channels; blocks of pixels, and several to a chunk.
CASES = [
    (2, 17, 9, 1, 7, 9),
    (3, 16, 40, 1, 1, 1),
    (3, 33, 20, 1, 5, 13),
    (70, 16, 13, 1, 1, 3),
    (1, 300, 14, 1, 3, 67),
    (2, 20, 70, 1, 37, 53),
    (5, 80, 32, 1, 14, 14),
    (1, 129, 66, 1, 16, 129),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_matches_reference(sizes, layout):
    for options in (
        {"residual": True},
        {"bias": None, "relu": False},
        {"negative_slope": 0.2, "relu": False},
    ):
        check_against_reference("conv2d", images_as(case(sizes, 0, **options), LAYOUTS[layout]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_dtypes(sizes, dtype):
    check_against_reference("conv2d", case(sizes, 0, dtype, residual=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sizes", [CASES[0], CASES[2], CASES[4]], ids=str)
def test_what_is_not_finite_stays_in_its_pixel(sizes, value):
    arguments = case(sizes, 0, relu=False)
    with torch.no_grad():
        arguments["x"][0, -1, 2, -1] = value
    y, expected = fastda.conv2d(**arguments), reference.conv2d(**arguments)
    assert torch.equal(y.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    torch.testing.assert_close(y[finite], expected[finite], rtol=1e-4, atol=1e-4)


def test_weights_in_any_layout():
    for lay in (lambda w: w.mT.contiguous().mT, lambda w: w.transpose(0, 1).contiguous().transpose(0, 1)):
        arguments = case((2, 40, 24, 1, 9, 11), 0, relu=False)
        arguments["weight"] = lay(arguments["weight"].detach()).requires_grad_()
        check_against_reference("conv2d", arguments)


def test_the_bits_do_not_depend_on_threads():
    for sizes in ((5, 80, 32, 1, 14, 14), (1, 129, 66, 1, 16, 129), (3, 32, 16, 1, 70, 70)):
        assert_same_bits_with_threads(fastda.conv2d, case(sizes, 0, relu=False))
