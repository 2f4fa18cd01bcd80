"""Convolutions with a padding of the caller's choice: against the reference, and one clear error each."""

import pytest
import torch

import fastda
from fastda import backend, reference
from tests.common import (
    assert_results,
    check_against_reference,
    check_compiled,
    check_error,
    check_gradients,
    check_opcheck,
    check_transforms,
    draw,
    results,
)
from tests.ops.refiner_conv import LAYOUTS, B, W, X, images_as

# (N, C, K, k, H, W) and the padding: by Winograd, with ragged tiles and vectors, and directly.
CASES = [
    *(((2, 17, 33, 5, 16, 21), p) for p in range(5)),
    *(((1, 18, 40, 2, 23, 12), p) for p in range(2)),
    ((53, 17, 20, 5, 9, 8), 1),  # several images to a task, and fewer to the last
    ((53, 17, 20, 5, 9, 8), 0),  # likewise the tiles of the gradient
    ((2, 20, 17, 5, 3, 2), 4),
    *(((1, 20, 16, 7, 17, 15), p) for p in (0, 2, 6)),
    *(((2, 20, 17, 3, 9, 11), p) for p in (0, 2)),
    *(((3, 17, 33, 3, 22, 27), p) for p in (0, 2)),
    *(((1, 18, 20, 3, 4, 6), p) for p in (0, 1, 2)),
    *(((2, 3, 33, 5, 14, 21), p) for p in (0, 2, 3)),  # few channels
    *(((1, c, 17, 7, 18, 70), p) for c, p in ((2, 0), (3, 3), (4, 6))),
    *(((2, 3, 5, 4, 7, 9), p) for p in (0, 1, 3)),
    *(((1, 1, 3, 6, 1, 2), 3), ((2, 3, 4, 5, 7, 5), 0)),
]


def case(sizes, padding, dtype=torch.float32, **options):
    return draw(
        "conv2d", sizes, dtype, **{"bias": True, "residual": None, "relu": True, **options}, padding=padding
    )


@pytest.mark.parametrize("sizes, padding", CASES, ids=str)
def test_matches_reference(sizes, padding):
    check_against_reference("conv2d", case(sizes, padding))
    check_against_reference("conv2d", case(sizes, padding, residual=True))
    check_against_reference("conv2d", case(sizes, padding, bias=None, relu=False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes, padding", [CASES[i] for i in (0, 1, 6, 7, 8, 9, 13, 15, 16)], ids=str)
def test_layouts_and_views(sizes, padding, layout):
    check_against_reference("conv2d", images_as(case(sizes, padding, residual=True), LAYOUTS[layout]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "sizes, padding, dilation",
    [
        *(((2, 17, 33, 3, 19, 22), 2, 2), ((1, 3, 5, 3, 7, 9), 4, 4), ((1, 16, 20, 5, 11, 13), 6, 3)),
        *(((2, 3, 4, 3, 9, 8), 1, 2), ((1, 3, 2, 2, 6, 7), 0, 3), ((1, 20, 16, 3, 3, 5), 2, 2)),
    ],
    ids=str,
)
def test_dilation(sizes, padding, dilation, layout):
    arguments = {**case(sizes, padding), "dilation": dilation, "relu": False}
    arguments = images_as(arguments, LAYOUTS[layout])
    check_against_reference("conv2d", arguments)
    y, expected = fastda.conv2d(**arguments), reference.conv2d(**arguments)
    assert y.is_contiguous() == expected.is_contiguous() or 1 in y.shape
    residual = torch.randn(y.shape, requires_grad=True)
    fused = {**arguments, "residual": residual, "relu": True}
    gate = reference.conv2d(**fused) > 0
    got = torch.autograd.grad(fastda.conv2d(**fused)[gate].sum(), (residual, arguments["weight"]))
    right = torch.autograd.grad(reference.conv2d(**fused)[gate].sum(), (residual, arguments["weight"]))
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes, padding", [CASES[0], CASES[5]], ids=str)
def test_dtypes(sizes, padding, dtype):
    check_against_reference("conv2d", case(sizes, padding, dtype))


@pytest.mark.parametrize(
    "sizes, padding",
    [((1, 96, 144, 5, 18, 18), 0), ((1, 256, 64, 5, 20, 31), 2), ((20, 144, 256, 5, 7, 7), 0)],
    ids=str,
)
def test_sums_over_many_channels_keep_their_error(sizes, padding):
    check_against_reference("conv2d", case(sizes, padding, relu=False))


@pytest.mark.parametrize("kernel, padding", [(5, 0), (5, 2), (5, 4), (2, 1)])
def test_what_is_not_finite_reaches_no_further_than_its_window(kernel, padding):
    x, weight = torch.randn(1, 16, 20, 20), torch.randn(16, 16, kernel, kernel)
    for value in (torch.inf, -torch.inf, torch.nan, 3e38):
        x[0, 3, 9, 8] = value
        y, expected = fastda.conv2d(x, weight, padding=padding), reference.conv2d(x, weight, padding=padding)
        assert torch.equal(y.isfinite(), expected.isfinite())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kernel, padding", [(3, 1), (5, 0), (5, 4), (7, 3)])
def test_where_all_is_large_what_overflows_on_the_way_is_made_again(kernel, padding, layout):
    """Below some row: in its last pixels alone a tile overflows, and no value is larger than usual."""
    for row in range(5, 13):
        x, weight = torch.randn(1, 16, 40, 24), torch.randn(16, 16, kernel, kernel) * 1e-4
        x[:, :, row:] = torch.where(x[:, :, row:] < 0, -1.7e38, 1.7e38)
        y = fastda.conv2d(x.contiguous(memory_format=layout), weight, padding=padding)
        right = reference.conv2d(x.double(), weight.double(), padding=padding)
        assert (y - right).abs().max() <= 1e-5 * right.abs().max()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_where_a_last_row_alone_overflows_its_tiles_are_made_again(layout):
    x = torch.where(torch.randn(1, 16, 22, 24) < 0, -1e36, 1e36)
    x[:, :, -1] *= 170
    weight = torch.randn(16, 16, 3, 3) * 1e-4
    y, right = (
        fastda.conv2d(x.contiguous(memory_format=layout), weight),
        reference.conv2d(x.double(), weight.double()),
    )
    assert (y - right).abs().max() <= 1e-5 * right.abs().max()


def test_an_empty_batch():
    x = torch.randn(0, 20, 9, 9, requires_grad=True)
    weight, bias = torch.randn(20, 20, 5, 5, requires_grad=True), torch.randn(20, requires_grad=True)
    arguments = {"x": x, "weight": weight, "bias": bias, "padding": 3}
    assert_results("conv2d", results(fastda.conv2d, arguments), results(reference.conv2d, arguments))


def test_no_input_channels():
    bias = torch.randn(20)
    y = fastda.conv2d(torch.randn(2, 0, 9, 8), torch.randn(20, 0, 5, 5), bias)
    assert torch.equal(y, bias.view(1, 20, 1, 1).expand(2, 20, 5, 4))


@pytest.mark.parametrize("sizes", [(3, 20, 33, 5, 40, 37), (53, 17, 20, 5, 9, 8)], ids=str)
@pytest.mark.parametrize("padding", [0, 1])
def test_one_and_two_threads_give_the_same_bits(sizes, padding):
    arguments = case(sizes, padding)
    one = results(fastda.conv2d, arguments)
    torch.set_num_threads(2)
    try:
        two = results(fastda.conv2d, arguments)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.isa_independent
def test_derivatives_compilers_and_transforms():
    small = case((2, 2, 3, 4, 5, 4), 1, torch.float64, residual=True)
    check_gradients("conv2d", small)
    check_transforms("conv2d", case((1, 2, 2, 3, 4, 3), 0, torch.float64))
    check_compiled("conv2d", case((2, 3, 4, 5, 8, 9), 0))
    dilated = {**case((1, 2, 2, 3, 5, 4), 2, torch.float64, relu=False), "dilation": 2}
    check_gradients("conv2d", dilated)
    check_transforms("conv2d", dilated)
    check_compiled("conv2d", {**case((2, 3, 4, 3, 8, 9), 2), "dilation": 2})


@pytest.mark.isa_independent
@pytest.mark.skipif(backend.native is None, reason=f"no C++ extension: {backend.native_error}")
def test_opcheck():
    x, weight, bias, residual = (torch.randn(s) for s in ((2, 3, 7, 6), (4, 3, 4, 4), (4,), (2, 4, 6, 5)))
    for layout in (torch.contiguous_format, torch.channels_last):
        image = x.to(memory_format=layout)
        check_opcheck("conv2d", image, weight, bias, residual, 1, True)
        check_opcheck("conv2d_backward", residual, image, weight, residual, 1, True, True, True)


ERRORS = [
    ({"x": X[0]}, ValueError, "x must be (N, C, H, W), got (3, 7, 9)"),
    ({"weight": W[..., :2]}, ValueError, "weight must be (K, C, k, k), got (4, 3, 3, 2)"),
    ({"weight": W[..., :0, :0]}, ValueError, "weight must be (K, C, k, k), got (4, 3, 0, 0)"),
    ({"weight": W[:, :2]}, ValueError, "weight must take the 3 channels of x, got 2 ((4, 2, 3, 3))"),
    ({"bias": B[:3]}, ValueError, "bias must be (4,), got (3,)"),
    ({"residual": X}, ValueError, "residual must be (2, 4, 5, 7), got (2, 3, 7, 9)"),
    ({"padding": 3}, ValueError, "padding must be from 0 to 2 for this weight, got 3"),
    ({"padding": -1}, ValueError, "padding must be from 0 to 2 for this weight, got -1"),
    ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
    ({"dilation": (2, 2)}, TypeError, "dilation must be an int, got (2, 2)"),
    ({"dilation": 2, "padding": 5}, ValueError, "padding must be from 0 to 4 for this weight, got 5"),
    ({"padding": 0.5}, TypeError, "padding must be an int, got 0.5"),
    ({"padding": (1, 1)}, TypeError, "padding must be an int, got (1, 1)"),
    (
        {"x": X[..., :2]},
        ValueError,
        "x must be at least as large as the filter with its padding, 3 by 3 and 0, got (2, 3, 7, 2)",
    ),
    ({"weight": W.double()}, TypeError, "weight must have the dtype of x, torch.float32, got torch.float64"),
]


@pytest.mark.isa_independent
@pytest.mark.parametrize("change, kind, message", ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(change, kind, message):
    check_error(fastda.conv2d, {"x": X, "weight": W, "bias": B, **change}, kind, f"conv2d: {message}")


@pytest.mark.isa_independent
@pytest.mark.skipif(backend.native is None, reason=f"no C++ extension: {backend.native_error}")
def test_raw_operators_refuse_what_does_not_fit():
    ops, y = torch.ops.fastda, torch.randn(2, 4, 5, 7)
    calls = [
        lambda: ops.conv2d(X, W, None, None, 3, False),
        lambda: ops.conv2d(X, W, None, None, -1, False),
        lambda: ops.conv2d(X, W, None, X, 0, False),
        lambda: ops.conv2d(X[..., :2], W, None, None, 0, False),
        lambda: ops.conv2d_backward(X, X, W, None, 0, True, True, True),
        lambda: ops.conv2d_backward(y, X, W, X, 0, True, True, True),
        lambda: ops.conv2d_backward(y, X, W, None, 1, True, True, True),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="must"):
            call()
