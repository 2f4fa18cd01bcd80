"""Convolutions to a few channels, whose kernels have lanes of input channels or of pixels."""

import pytest
import torch

import fastda
from fastda import reference
from tests.common import assert_results, assert_same_bits_with_threads, check_against_reference, results
from tests.ops.refiner_conv import LAYOUTS, images_as
from tests.ops.test_refiner_conv_padding import case

# (N, C, K, k, H, W) and the padding: one to four outputs, ragged channels and pixels, many blocks.
CASES = [
    *(((2, 17, k, 3, 9, 11), 1) for k in (1, 2, 3, 4)),
    *(((1, 64, k, 1, 13, 21), 0) for k in (1, 2, 3, 4)),
    *(((1, 33, 3, k, 9, 10), k // 2) for k in (2, 5, 7)),
    *(((1, 16, 1, 3, 4, 270), 0), ((3, 70, 2, 1, 31, 40), 0), ((2, 96, 1, 5, 40, 17), 4)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes, padding", CASES, ids=str)
def test_matches_reference(sizes, padding, layout):
    for options in ({"residual": True}, {"bias": None, "relu": False}, {"relu": False}):
        arguments = images_as(case(sizes, padding, **options), LAYOUTS[layout])
        check_against_reference("conv2d", arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mirrored_border(layout):
    arguments = images_as(case(CASES[2][0], 1, relu=False), LAYOUTS[layout])
    check_against_reference("conv2d", {**arguments, "padding_mode": "reflect"})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes, padding", [CASES[2], CASES[4], CASES[8]], ids=str)
def test_dtypes(sizes, padding, layout, dtype):
    check_against_reference("conv2d", images_as(case(sizes, padding, dtype, relu=False), LAYOUTS[layout]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sizes, padding", [CASES[0], CASES[5], CASES[8]], ids=str)
def test_what_is_not_finite_stays_in_its_window(sizes, padding, value, layout):
    arguments = case(sizes, padding, relu=False)
    with torch.no_grad():
        arguments["x"][0, -1, 4, -1] = value
    arguments = images_as(arguments, LAYOUTS[layout])
    y, expected = fastda.conv2d(**arguments), reference.conv2d(**arguments)
    assert torch.equal(y.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    torch.testing.assert_close(y[finite], expected[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bits_do_not_depend_on_threads(layout):
    arguments = images_as(case((5, 70, 2, 3, 41, 40), 1, relu=False), LAYOUTS[layout])
    assert_same_bits_with_threads(fastda.conv2d, arguments)


def test_one_gradient_at_a_time():
    arguments = case(CASES[0][0], 1, relu=False)
    everything = results(fastda.conv2d, arguments)
    for name in ("x", "weight", "bias"):
        alone = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
        alone[name].requires_grad_()
        only = results(fastda.conv2d, alone)
        assert only.keys() == {"value", name}
        assert_results("conv2d", only, {what: everything[what] for what in only})
