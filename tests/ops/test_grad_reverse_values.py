"""Gradient reversal: values, gradients, the scale, precision."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastda import grad_reverse, grad_reverse_linear, reference
from fastda.testing import assert_matches
from tests.common import (
    both_routes,
    check_against_reference,
    check_gradients,
    draw,
)
from tests.ops.grad_reverse import DTYPES, LAYOUTS, grads_of, independent, leaf, scales


@both_routes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(129, 33), (3, 5, 37, 53), (1,), (0, 4), (7, 0, 2)], ids=str)
def test_value_and_gradient(shape, dtype):
    for layout in LAYOUTS.values():
        for scale, exact in scales(shape[0]).values():
            x = layout(torch.randn(shape).to(dtype)).detach().requires_grad_()
            grad = layout(torch.randn(shape).to(dtype))
            before = grad.clone()
            y = grad_reverse(x, scale)
            assert torch.equal(y, x)
            assert y.dtype == dtype
            (dx,) = torch.autograd.grad(y, x, grad)
            assert torch.equal(grad, before)
            if exact.dim():
                exact = exact.view(-1, *(1 for _ in shape[1:]))
            assert_matches("grad_reverse", "grad", dx, -exact * grad.double(), dtype)


@both_routes
def test_scalars():
    for dtype in DTYPES:
        for scale in (0.7, torch.tensor(0.7), torch.tensor(0.7, dtype=torch.float64)):
            x = torch.tensor(3.0, dtype=dtype, requires_grad=True)
            y = grad_reverse(x, scale)
            (dx,) = torch.autograd.grad(y, x)
            assert (y.item(), dx.dtype, dx.shape) == (3.0, dtype, ())
            assert dx.item() == pytest.approx(-0.7, rel=4e-3)


@both_routes
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    scale=st.floats(-1e3, 1e3),
    per_sample=st.booleans(),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_order_of_dimensions(shape, scale, per_sample, order):
    axes = list(range(len(shape)))
    order.shuffle(axes)
    inverse = [axes.index(i) for i in range(len(shape))]

    def shuffled(t):  # the same values with another order of strides
        return t.permute(axes).contiguous().permute(inverse)

    factor = torch.full((shape[0],), scale) if per_sample else scale
    x = shuffled(torch.randn(shape, dtype=torch.float64)).requires_grad_()
    grad = shuffled(torch.randn(shape, dtype=torch.float64))
    (dx,) = torch.autograd.grad(grad_reverse(x, factor), x, grad)
    wanted = -factor[0].item() if per_sample and shape[0] else -scale
    torch.testing.assert_close(dx, wanted * grad, rtol=1e-15, atol=0)


@both_routes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_against_the_reference(dtype):
    for sizes in ((1, 1, 1), (5, 7, 3), (37, 129, 65)):
        for options in (
            {"bias": None},
            {"bias": True, "scale": 0.7},
            {"bias": True, "scale": lambda draw, *size: draw()},
            {"bias": None, "scale": lambda draw, *size: draw(size[0])},
        ):
            check_against_reference(
                "grad_reverse_linear", draw("grad_reverse_linear", sizes, dtype, **options)
            )


@both_routes
@pytest.mark.parametrize("bias", [False, True])
def test_linear_takes_any_leading_dimensions(bias):
    weight, b = leaf(5, 4), leaf(5) if bias else None
    wanted = [weight, b] if bias else [weight]
    for shape in ((4,), (3, 4), (2, 3, 4), (2, 1, 3, 4), (0, 4), (2, 0, 4)):
        x = leaf(*shape)
        y, expected = grad_reverse_linear(x, weight, b, 0.5), F.linear(x, weight, b)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        grad = torch.randn_like(y)
        (dx, *dw), (ex, *ew) = (grads_of(out, [x, *wanted], grad) for out in (y, expected))
        torch.testing.assert_close([dx, *dw], [-0.5 * ex, *ew])


@both_routes
def test_linear_without_inputs_or_outputs():
    for i, o in ((0, 3), (3, 0), (0, 0)):
        x, weight, bias = leaf(4, i), leaf(o, i), leaf(o)
        y = grad_reverse_linear(x, weight, bias)
        assert torch.equal(y, F.linear(x, weight, bias))
        assert [g.shape for g in grads_of(y, [x, weight, bias])] == [x.shape, weight.shape, bias.shape]


@both_routes
def test_linear_with_only_some_gradients_wanted():
    for x_grad in (False, True):
        for w_grad in (False, True):
            x, weight = torch.randn(3, 4).requires_grad_(x_grad), torch.randn(5, 4).requires_grad_(w_grad)
            bias = leaf(5)
            wanted = [t for t in (x, weight, bias) if t.requires_grad]
            got = grads_of(grad_reverse_linear(x, weight, bias, 0.5), wanted)
            expected = list(grads_of(F.linear(x, weight, bias), wanted))
            if x_grad:
                expected[0] = -0.5 * expected[0]
            torch.testing.assert_close(list(got), expected)
    x = leaf(3, 4)
    y = grad_reverse_linear(x, weight, None, 2.0)
    (dw,) = grads_of(y, weight, retain_graph=True)
    torch.testing.assert_close(dw, torch.ones(3, 5).t() @ x)
    (dx,) = grads_of(y, x)
    torch.testing.assert_close(dx, -2 * torch.ones(3, 5) @ weight)


@both_routes
def test_nan_and_inf_pass():
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0], requires_grad=True)
    y = grad_reverse(x, 0.5)
    assert torch.equal(y.isnan(), x.isnan())
    grad = torch.tensor([1.0, math.nan, 2.0, math.inf])
    (dx,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(dx, -0.5 * grad, equal_nan=True)
    weight = leaf(2, 4)
    y = grad_reverse_linear(leaf(1, 4), weight, None, 0.5)
    (dw,) = grads_of(y, weight, torch.tensor([[1.0, math.inf]]))
    assert dw[0].isfinite().all()
    assert dw[1].isinf().all()


@both_routes
def test_a_scale_changed_after_forward_does_not_alter_the_gradient():
    x, weight = leaf(4, 3), leaf(2, 3)
    for scale in (torch.tensor(0.5), torch.full((4,), 0.5)):
        outputs = (grad_reverse(x, scale), grad_reverse_linear(x, weight, None, scale))
        scale.fill_(7.0)
        for y, expected in zip(
            outputs, (-0.5 * torch.ones(4, 3), -0.5 * torch.ones(4, 2) @ weight), strict=True
        ):
            torch.testing.assert_close(grads_of(y, x)[0], expected.detach())
        torch.testing.assert_close(grads_of(grad_reverse(x, scale), x)[0], torch.full((4, 3), -7.0))


@independent
@both_routes
def test_second_derivatives_are_reversed_again():
    x = leaf(5, dtype=torch.float64)
    for scale in (0.7, torch.tensor(0.7, dtype=torch.float64), torch.full((5,), 0.7, dtype=torch.float64)):
        (first,) = torch.autograd.grad((grad_reverse(x, scale) ** 3).sum(), x, create_graph=True)
        torch.testing.assert_close(first, -0.7 * 3 * x**2)
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
        torch.testing.assert_close(second, 0.7**2 * 6 * x)
        (third,) = torch.autograd.grad(second.sum(), x)
        torch.testing.assert_close(third, torch.full_like(x, -(0.7**3) * 6))


@independent
@both_routes
@pytest.mark.parametrize("scale", [-1.0, torch.tensor(-1.0), -torch.ones(3, dtype=torch.float64)], ids=str)
def test_gradcheck_at_scale_minus_one(scale):
    """There the gradient is the derivative of the value, and numerical differences can judge it."""
    check_gradients("grad_reverse", draw("grad_reverse", (3, 2)) | {"scale": scale})
    for bias in (None, True):
        check_gradients(
            "grad_reverse_linear", draw("grad_reverse_linear", (3, 2, 4), bias=bias) | {"scale": scale}
        )


@independent
@both_routes
def test_second_derivatives_of_linear_match_the_reference():
    arguments = draw("grad_reverse_linear", (3, 4, 2), bias=True, scale=0.7)
    tensors = [arguments[n] for n in ("x", "weight", "bias")]

    def second(function):
        y = function(**arguments)
        first = torch.autograd.grad((y**3).sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), tensors)

    torch.testing.assert_close(second(grad_reverse_linear), second(reference.grad_reverse_linear))


@independent
@both_routes
def test_several_gradients_at_once():
    x, weight, bias = leaf(4, 3), leaf(2, 3), leaf(2)
    for scale in (0.5, torch.rand(4)):
        for y in (grad_reverse(x, scale), grad_reverse_linear(x, weight, bias, scale)):
            grads = torch.randn(5, *y.shape)
            (batched,) = grads_of(y, x, grads, is_grads_batched=True, retain_graph=True)
            torch.testing.assert_close(
                batched, torch.stack([grads_of(y, x, g, retain_graph=True)[0] for g in grads])
            )


@both_routes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    x, weight, bias = leaf(5, 7), leaf(3, 7), leaf(3)
    for scale in (0.7, torch.tensor(0.7), torch.full((5,), 0.7)):
        with torch.autocast("cpu", dtype):
            assert grad_reverse(x, scale).dtype == torch.float32
            y, expected = grad_reverse_linear(x, weight, bias, scale), F.linear(x, weight, bias)
        assert y.dtype == dtype
        assert torch.equal(y, expected)
        grad = torch.randn(5, 3).to(dtype)
        got, wanted = (grads_of(out, [x, weight, bias], grad) for out in (y, expected))
        assert [g.dtype for g in got] == [torch.float32] * 3
        assert_matches("grad_reverse_linear", "x", got[0], -0.7 * wanted[0].double(), dtype)
        assert torch.equal(got[1], wanted[1])
        assert torch.equal(got[2], wanted[2])
    wide = leaf(5, 7, dtype=torch.float64)
    with torch.autocast("cpu", dtype):
        y = grad_reverse_linear(wide, weight.double(), bias.double(), 0.7)
    assert y.dtype == torch.float64
