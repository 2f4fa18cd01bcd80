"""A convolution with the max-pool of its result: what the two operators give, ties and NaN, outliers,
threads, compilers, and one clear error each."""

import pytest
import torch
import torch.nn.functional as F

import fastda
from fastda import backend, reference
from tests.common import (
    assert_same_bits_with_threads,
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

LAST = torch.channels_last
# (N, C, K, k, H, W), padding, kernel_size: each kernel, windows that do not come out, more images than are
# made together, fewer channels than a vector and more.
CASES = [
    *(((5, 3, 33, 5, 17, 14), p, s) for p, s in ((0, 2), (2, 3), (4, 1))),
    ((3, 3, 32, 5, 17, 14), 0, 2),
    *(((19, 17, 20, 5, 14, 11), p, s) for p, s in ((0, 2), (2, 2), (1, 5))),
    *(((2, 3, 17, 7, 19, 22), p, s) for p, s in ((0, 2), (3, 4))),
    *(((3, 20, 16, 2, 21, 12), 0, 3), ((2, 17, 33, 3, 9, 11), 1, 2)),
    *(((1, 130, 80, 3, 6, 7), 1, 2), ((2, 5, 7, 3, 9, 8), 2, 2), ((3, 20, 3, 5, 13, 12), 2, 2)),
    *(((2, 1, 3, 1, 5, 6), 0, 2), ((2, 2, 3, 4, 3, 37), 1, 2), ((2, 1, 9, 3, 19, 20), 1, 15)),
]


def case(sizes, padding, size, dtype=torch.float32, **options):
    return draw("conv2d_max_pool", sizes, dtype, **{"padding": padding, "kernel_size": size, **options})


def in_two(x, weight, bias=None, *, padding=0, kernel_size=2, relu=True):
    return fastda.relu_max_pool(fastda.conv2d(x, weight, bias, padding=padding), kernel_size, relu=relu)


@pytest.mark.parametrize("sizes, padding, size", CASES, ids=str)
def test_matches_reference(sizes, padding, size):
    check_against_reference("conv2d_max_pool", case(sizes, padding, size))
    check_against_reference("conv2d_max_pool", case(sizes, padding, size, bias=None, relu=False))


def test_the_gradient_of_a_first_layer_is_spread_over_its_windows():
    """Which lies in the midst of usual numbers, so that what is read beside it is not noticed as odd."""
    x, weight = torch.randn(3, 3, 28, 28), torch.randn(32, 3, 5, 5, requires_grad=True)
    grad = torch.randn(20, 32, 12, 12).contiguous(memory_format=LAST)[:3]
    (got,) = torch.autograd.grad(fastda.conv2d_max_pool(x, weight), weight, grad)
    (right,) = torch.autograd.grad(in_two(x, weight), weight, grad)
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "sizes, padding, size", [*(CASES[i] for i in (0, 1, 4, 10)), ((1, 16, 20, 7, 18, 21), 3, 2)], ids=str
)
def test_is_what_the_two_operators_give(sizes, padding, size, layout):
    for relu in (True, False):
        arguments = images_as(case(sizes, padding, size, relu=relu), LAYOUTS[layout])
        one, two = results(fastda.conv2d_max_pool, arguments), results(in_two, arguments)
        for what, value in two.items():
            assert value.stride() == one[what].stride() or 1 in value.shape
            # The kernels of d_weight differ where the gradient lies in the other layout.
            torch.testing.assert_close(one[what], value, rtol=1e-4, atol=1e-4)
            # Those of base, too, of images of few channels.
            if what == "value" and not (
                sizes[1] < 16 and backend.native and backend.native.cpu_isa() == "base"
            ):
                assert torch.equal(one[what], value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    arguments = case((3, 3, 33, 5, 17, 14), 1, 2, dtype)
    one, two = results(fastda.conv2d_max_pool, arguments), results(in_two, arguments)
    assert all(one[what].dtype == dtype and torch.allclose(one[what], two[what]) for what in two)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [3, 20])
def test_ties_and_nothing_positive_are_pytorchs(channels, layout):
    """Whole numbers, and filters of one tap that is not 0."""
    x = torch.randint(-2, 3, (3, channels, 16, 17)).float().contiguous(memory_format=layout).requires_grad_()
    weight = torch.zeros(32, channels, 3, 3, dtype=torch.float64)
    weight[torch.arange(32), torch.arange(32) % channels, 1, 1] = 1
    for dtype in (torch.float64, torch.float32):
        image, w = x.detach().to(dtype).requires_grad_(), weight.to(dtype)
        y, expected = fastda.conv2d_max_pool(image, w), reference.conv2d_max_pool(image, w)
        torch.testing.assert_close(y, expected, rtol=0, atol=0 if dtype == torch.float64 else 1e-5)
        if dtype == torch.float64:
            grads = (torch.autograd.grad(r, image, torch.ones_like(r))[0] for r in (y, expected))
            assert torch.equal(*grads)


@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("of", ["image", "filter"])
def test_what_is_not_finite(of, channels, value):
    x, weight = torch.randn(4, channels, 20, 20), torch.randn(32, channels, 5, 5)
    if of == "image":
        x[2, 1, 9, 8] = value
    else:
        weight[5, 1, 2, 3] = value
    for relu in (True, False):
        y = fastda.conv2d_max_pool(x, weight, relu=relu)
        expected = reference.conv2d_max_pool(x, weight, relu=relu)
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3, equal_nan=True)


def test_a_large_value_costs_its_neighbours_no_more_than_promised():
    x, weight = torch.randn(4, 3, 28, 28), torch.randn(32, 3, 5, 5)
    x[1, :, 14, 14] = 1e8
    y = fastda.conv2d_max_pool(x, weight, relu=False)
    expected = reference.conv2d_max_pool(x.double(), weight.double(), relu=False)
    near = (expected.abs() < 1e3).expand_as(y)
    assert near[1].any() and (y - expected)[near].abs().max() < 1e-2
    x, grad = torch.randn(4, 20, 12, 12), torch.randn(4, 32, 4, 4)
    grad[1, :, 1, 1] = 1e8
    arguments = {"x": x.requires_grad_(), "weight": torch.randn(32, 20, 5, 5).requires_grad_()}
    found = []
    for route, dtype in ((fastda, torch.float32), (reference, torch.float64)):
        given = {n: t.detach().to(dtype).requires_grad_() for n, t in arguments.items()}
        found.append(torch.autograd.grad(route.conv2d_max_pool(**given), given["x"], grad.to(dtype))[0])
    near = found[1].abs() < 1e4
    assert near[1].any() and (found[0] - found[1])[near].abs().max() < 1e-1


@pytest.mark.parametrize("sizes", [(37, 3, 32, 5, 28, 28), (53, 17, 20, 5, 13, 12)], ids=str)
def test_the_same_bits_for_any_number_of_threads(sizes):
    for layout in (LAYOUTS["contiguous"], LAYOUTS["channels_last"]):
        assert_same_bits_with_threads(fastda.conv2d_max_pool, images_as(case(sizes, 1, 2), layout))


def test_what_is_kept_for_backward():
    arguments, kept = case((2, 3, 32, 5, 28, 28), 0, 2), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fastda.conv2d_max_pool(**arguments)
    small = 2 * 32 * 12 * 12
    assert sum(t.nbytes for t in kept) == sum(arguments[n].nbytes for n in ("x", "weight")) + small


@pytest.mark.isa_independent
def test_frozen_parts_and_no_gradients():
    arguments = case((2, 17, 20, 5, 9, 8), 0, 2)
    whole = results(fastda.conv2d_max_pool, arguments)
    for only in ("x", "weight", "bias"):
        part = {n: t.detach() if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
        part[only] = part[only].requires_grad_()
        assert torch.equal(results(fastda.conv2d_max_pool, part)[only], whole[only])
    with torch.no_grad():
        assert torch.equal(fastda.conv2d_max_pool(**arguments), whole["value"])


def test_an_empty_batch():
    x, weight = torch.randn(0, 3, 28, 28, requires_grad=True), torch.randn(32, 3, 5, 5, requires_grad=True)
    y = fastda.conv2d_max_pool(x, weight)
    d_x, d_weight = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == (0, 32, 12, 12) and d_x.shape == x.shape and not d_weight.any()


@pytest.mark.isa_independent
def test_derivatives_of_a_pooled_convolution_and_compilers():
    check_gradients("conv2d_max_pool", case((2, 2, 3, 3, 7, 6), 1, 2, torch.float64))
    check_gradients("conv2d_max_pool", case((1, 2, 3, 2, 7, 8), 0, 3, torch.float64, relu=False))
    check_transforms("conv2d_max_pool", case((1, 2, 2, 3, 5, 4), 1, 2, torch.float64))
    check_compiled("conv2d_max_pool", case((2, 3, 4, 5, 9, 9), 0, 2))
    x = torch.randn(2, 3, 12, 11)
    with torch.autocast("cpu", torch.bfloat16):
        assert fastda.conv2d_max_pool(x, W).dtype == torch.bfloat16
    with fastda.use_backend("reference"):
        assert torch.equal(fastda.conv2d_max_pool(x, W), F.relu(F.max_pool2d(F.conv2d(x, W), 2)))


@pytest.mark.isa_independent
@pytest.mark.skipif(backend.native is None, reason=f"no C++ extension: {backend.native_error}")
def test_opcheck():
    x, weight, bias = (torch.randn(s) for s in ((2, 3, 8, 7), (4, 3, 3, 3), (4,)))
    for layout in (torch.contiguous_format, LAST):
        image = x.to(memory_format=layout)
        for kept in (True, False):
            check_opcheck("conv2d_max_pool", image, weight, bias, 1, 2, True, kept)
        y, indices = torch.ops.fastda.conv2d_max_pool(image, weight, bias, 1, 2, True, True)
        check_opcheck("conv2d_max_pool_backward", y, indices, image, weight, 1, 2, True, True, True)
        check_opcheck("conv2d_max_pool_backward", y, indices, image, weight, 1, 2, False, False, True)


ERRORS = [
    ({"x": X[0]}, ValueError, "x must be (N, C, H, W), got (3, 7, 9)"),
    ({"weight": W[..., :2]}, ValueError, "weight must be (K, C, k, k), got (4, 3, 3, 2)"),
    ({"bias": B[:3]}, ValueError, "bias must be (4,), got (3,)"),
    ({"padding": 3}, ValueError, "padding must be from 0 to 2 for this weight, got 3"),
    ({"padding": 0.5}, TypeError, "padding must be an int, got 0.5"),
    ({"kernel_size": 0}, ValueError, "kernel_size must be from 1 to 15, got 0"),
    ({"kernel_size": 16}, ValueError, "kernel_size must be from 1 to 15, got 16"),
    ({"kernel_size": (2, 2)}, TypeError, "kernel_size must be an int, got (2, 2)"),
    ({"kernel_size": 6}, ValueError, "x must be large enough for a window, got (2, 3, 7, 9)"),
    ({"weight": W.double()}, TypeError, "weight must have the dtype of x, torch.float32, got torch.float64"),
]


@pytest.mark.isa_independent
@pytest.mark.parametrize("change, kind, message", ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(change, kind, message):
    arguments = {"x": X, "weight": W, "bias": B, **change}
    check_error(fastda.conv2d_max_pool, arguments, kind, f"conv2d_max_pool: {message}")


@pytest.mark.isa_independent
@pytest.mark.skipif(backend.native is None, reason=f"no C++ extension: {backend.native_error}")
def test_raw_operators_refuse_what_does_not_fit():
    ops = torch.ops.fastda
    y, indices = ops.conv2d_max_pool(X, W, None, 0, 2, True, True)
    calls = [
        lambda: ops.conv2d_max_pool(X, W, None, 3, 2, True, True),
        lambda: ops.conv2d_max_pool(X, W, None, 0, 6, True, True),
        lambda: ops.conv2d_max_pool(X, W, None, 0, 0, True, True),
        lambda: ops.conv2d_max_pool(X, W, None, 0, 16, True, True),
        lambda: ops.conv2d_max_pool_backward(y, indices.int(), X, W, 0, 2, True, True, True),
        lambda: ops.conv2d_max_pool_backward(y[..., :1], indices, X, W, 0, 2, True, True, True),
        lambda: ops.conv2d_max_pool_backward(y, indices[:1], X, W, 0, 2, True, True, True),
        lambda: ops.conv2d_max_pool_backward(y.double(), indices, X, W, 0, 2, True, True, True),
        lambda: ops.conv2d_max_pool_backward(y, indices, X, W, 1, 2, True, True, True),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="must"):
            call()
