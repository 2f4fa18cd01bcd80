"""Convolutions from a few channels, whose kernels have lanes of tiles, or sums over rows of taps."""

import pytest
import torch

import fastda
from fastda import reference
from tests.common import assert_same_bits_with_threads, check_against_reference
from tests.ops.refiner_conv import CHANNELS_LAST, LAYOUTS, images_as
from tests.ops.test_refiner_conv_padding import case

# (N, C, K, k, H, W) and the padding: one to fifteen inputs, ragged tiles and vectors, many blocks.
TILES = [
    *(((2, c, 33, 3, 9, 14), 1) for c in (2, 3, 4, 15)),
    *(((1, c, 16, 5, 13, 11), p) for c, p in ((2, 0), (3, 2), (7, 4))),
    *(((2, c, 20, 7, 17, 14), p) for c, p in ((1, 3), (3, 0), (5, 6))),
    *(((1, 3, 18, 11, 22, 27), 5), ((1, 3, 48, 3, 70, 90), 1), ((3, 3, 32, 5, 28, 28), 0)),
]
DIRECT = [
    *(((2, c, 33, 3, 7, 30), 1) for c in (1, 2, 5)),
    *(((1, 1, k, 5, 20, 41), 2) for k in (8, 32, 64)),
    *(((2, 3, 5, 7, 9, 12), 3), ((1, 3, 70, 1, 13, 21), 0), ((1, 1, 32, 3, 6, 300), 0)),
]
CASES = TILES + DIRECT


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes, padding", CASES, ids=str)
def test_matches_reference(sizes, padding, layout):
    for options in (
        {"residual": True},
        {"bias": None, "relu": False},
        {"negative_slope": 0.2, "relu": False},
    ):
        check_against_reference("conv2d", images_as(case(sizes, padding, **options), LAYOUTS[layout]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes, padding", [TILES[1], TILES[5], TILES[7], DIRECT[1]], ids=str)
def test_a_mirrored_border(sizes, padding, layout):
    arguments = images_as(case(sizes, padding, relu=False), LAYOUTS[layout])
    check_against_reference("conv2d", {**arguments, "padding_mode": "reflect"})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sizes, padding", [TILES[1], TILES[5], TILES[8], DIRECT[0], DIRECT[6]], ids=str)
def test_dtypes(sizes, padding, layout, dtype):
    check_against_reference("conv2d", images_as(case(sizes, padding, dtype, relu=False), LAYOUTS[layout]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sizes, padding", [TILES[1], TILES[5], TILES[7], DIRECT[1]], ids=str)
def test_what_is_not_finite_stays_in_its_window(sizes, padding, value):
    arguments = case(sizes, padding, relu=False)
    with torch.no_grad():
        arguments["x"][0, -1, 4, -1] = value
    y, expected = fastda.conv2d(**arguments), reference.conv2d(**arguments)
    assert torch.equal(y.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    torch.testing.assert_close(y[finite], expected[finite], rtol=1e-4, atol=1e-4)


def test_filter_gradients_of_few_outputs_are_turned():
    for sizes, padding in (((2, 33, 3, 3, 9, 14), 1), ((1, 16, 3, 5, 13, 11), 2), ((1, 20, 1, 7, 17, 14), 3)):
        check_against_reference("conv2d", case(sizes, padding, relu=False))


@pytest.mark.parametrize("sizes, padding", [((40, 3, 32, 5, 40, 40), 2), ((9, 1, 64, 3, 64, 64), 1)], ids=str)
@pytest.mark.parametrize("options", [{"relu": False}, {"relu": True}], ids=str)
def test_results_that_go_past_the_cache(sizes, padding, options):
    arguments = images_as(
        case(sizes, padding, **options), lambda x: x.contiguous(memory_format=CHANNELS_LAST)
    )
    y = fastda.conv2d(**arguments).detach()
    assert y.numel() * y.element_size() >= 6 << 20
    torch.testing.assert_close(y, reference.conv2d(**arguments).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_bits_do_not_depend_on_threads(layout):
    for sizes, padding in (((5, 3, 33, 5, 41, 40), 1), ((7, 1, 32, 3, 50, 50), 1)):
        arguments = images_as(case(sizes, padding, relu=False), LAYOUTS[layout])
        assert_same_bits_with_threads(fastda.conv2d, arguments)
