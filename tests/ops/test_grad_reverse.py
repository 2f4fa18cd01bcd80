"""Gradient reversal: the operators by both of their routes through autograd, and the modules."""

import copy
import io
import math
import os
import pickle
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastda
from fastda import backend, grad_reverse, grad_reverse_linear, reference
from fastda.nn import DomainClassifier, GradientReversal, ScheduledGradientReversal
from fastda.testing import assert_matches
from tests.common import (
    both_routes,
    check_against_reference,
    check_compiled,
    check_error,
    check_gradients,
    check_opcheck,
    check_transforms,
    compiled,
    draw,
    needs_node,
)

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
independent = pytest.mark.isa_independent
native = pytest.mark.skipif(backend.native is None, reason="the native extension is not built")


def leaf(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def grads_of(y, inputs, grad=None, **options):
    return torch.autograd.grad(y, inputs, torch.ones_like(y) if grad is None else grad, **options)


def scales(n, dtype=torch.float32):
    """Every form of a scale, each with its value as float64."""
    sample = torch.rand(n, dtype=dtype) + 0.5
    return {
        "float": (0.7, torch.tensor(0.7, dtype=torch.float64)),
        "int": (2, torch.tensor(2.0, dtype=torch.float64)),
        "0-dim": (torch.tensor(0.3), torch.tensor(0.3).double()),
        "0-dim float64": (torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)),
        "per sample": (sample, sample.double()),
        "per sample, strided": (sample.repeat_interleave(2)[::2], sample.double()),
        "negative": (-1.5, torch.tensor(-1.5, dtype=torch.float64)),
    }


# -- values and gradients ------------------------------------------------------------------------------------


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x,
}


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


# -- zero copies ---------------------------------------------------------------------------------------------


@independent
@both_routes
def test_forward_is_a_view():
    shapes = [
        torch.randn(3, 4),
        torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last),
        torch.tensor(1.0),
    ]
    for x in [*shapes, torch.randn(4, 1).expand(4, 3), torch.randn(0, 3)]:
        for wants_grad in (True, False):
            x = x.detach().requires_grad_(wants_grad)
            y = grad_reverse(x, 0.5)
            assert y is not x
            assert y.data_ptr() == x.data_ptr()
            assert (y.stride(), y.storage_offset()) == (x.stride(), x.storage_offset())
            assert y._is_view()
            assert y.requires_grad == wants_grad
    x = torch.randn(3, requires_grad=True)
    with torch.inference_mode():
        y = grad_reverse(x)
    assert y.data_ptr() == x.data_ptr()


def backward_profile(make):
    """(calls of each operator, bytes allocated) of one backward pass of the loss that `make` returns."""
    make().backward()
    loss = make()
    torch.use_deterministic_algorithms(False)  # as in use: poisoning fills every new tensor
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        loss.backward()
    sizes = [e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    names = Counter(e.name for e in prof.events() if e.name.startswith("aten::"))
    return names, sum(n for n in sizes if n > 0)


@independent
@needs_node
@pytest.mark.parametrize("kind", ["float", "0-dim", "per sample", "per sample, strided"])
def test_backward_writes_into_a_gradient_that_nobody_else_holds(kind):
    scale, exact = scales(6)[kind]
    exact = exact.view(-1, 1, 1, 1) if exact.dim() else exact
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(6, 5, 9, 7).to(memory_format=memory_format).requires_grad_()

        def loss(reverse, x=x):
            return reverse(x * 1).sin().sum()

        calls, size = backward_profile(lambda: loss(lambda h: grad_reverse(h, scale)))
        _, least = backward_profile(lambda: loss(lambda h: h))
        assert calls["aten::mul_"] == 1
        assert size <= least + 64
        (grad,) = torch.autograd.grad(loss(lambda h: grad_reverse(h, scale)), x)
        assert_matches("grad_reverse", "grad", grad, -exact * x.detach().cos().double())


class FromNumpy(torch.autograd.Function):
    """Its gradient is memory that torch did not allocate."""

    @staticmethod
    def forward(ctx, y, array):
        ctx.array = array
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(ctx.array), None


class Kept(torch.autograd.Function):
    """Its gradient is a view of a tensor that it keeps."""

    @staticmethod
    def forward(ctx, y, kept):
        ctx.kept = kept
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.kept[: grad.shape[0]], None


@independent
@both_routes
def test_backward_leaves_gradients_of_others_alone():
    x, ones = leaf(4, 3), torch.ones(4, 3)

    mine = torch.ones(4, 3)
    (dx,) = torch.autograd.grad(grad_reverse(x, 2.0), x, mine)
    assert torch.equal(mine, ones)
    assert torch.equal(dx, -2 * ones)

    w = leaf(4, 3)  # the sum hands the same gradient to both
    for first, second in ((x, w), (w, x)):
        grads = torch.autograd.grad((grad_reverse(x, 2.0) + w).exp().sum(), [first, second])
        plain = (x + w).exp()
        expected = {id(x): -2 * plain, id(w): plain}
        torch.testing.assert_close(list(grads), [expected[id(first)].detach(), expected[id(second)].detach()])

    y = grad_reverse(x, 2.0)
    y.retain_grad()
    seen = []
    y.register_hook(seen.append)
    (y * 1).sum().backward()
    assert torch.equal(y.grad, ones)
    assert torch.equal(seen[0], ones)
    assert torch.equal(x.grad, -2 * ones)

    y = grad_reverse(x, 2.0)
    dy, dx = torch.autograd.grad((y * 1).sum(), [y, x])
    assert torch.equal(dy, ones)
    assert torch.equal(dx, -2 * ones)

    array = torch.ones(4, 3).numpy()
    (dx,) = torch.autograd.grad(FromNumpy.apply(grad_reverse(x, 2.0), array).sum(), x)
    assert (array == 1).all()
    assert torch.equal(dx, -2 * ones)

    kept = torch.ones(6, 3)
    (dx,) = torch.autograd.grad(Kept.apply(grad_reverse(x, 2.0), kept).sum(), x)
    assert torch.equal(kept, torch.ones(6, 3))
    assert torch.equal(dx, -2 * ones)

    y = grad_reverse(x, 2.0)  # an expanded gradient has many entries in one place
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, -2 * ones)


@independent
@both_routes
def test_backward_twice_through_one_graph():
    x, weight = leaf(4, 3), leaf(2, 3)
    for y in (grad_reverse(x, 2.0), grad_reverse_linear(x, weight, None, 2.0)):
        loss = (y * y).sum()
        first = torch.autograd.grad(loss, x, retain_graph=True)
        assert torch.equal(first[0], torch.autograd.grad(loss, x)[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


@independent
@both_routes
@pytest.mark.parametrize("shape", [(64, 48), (4, 16, 48)], ids=str)
def test_linear_makes_no_pass_and_no_memory_of_its_own(shape):
    for bias in (None, leaf(32)):
        h, weight = leaf(*shape), leaf(32, 48)

        def loss(linear, h=h, weight=weight, bias=bias):
            return linear(h * 1, weight, bias).square().sum()

        calls, size = backward_profile(lambda: loss(partial(grad_reverse_linear, scale=0.5)))
        plain_calls, plain = backward_profile(lambda: loss(F.linear))
        apart_calls, apart = backward_profile(lambda: loss(lambda t, *rest: F.linear(-0.5 * t, *rest)))
        assert size <= plain + 64 < apart
        passes = ("aten::mul", "aten::mul_", "aten::neg", "aten::copy_", "aten::clone", "aten::sum")
        count, plain_count, apart_count = (
            sum(c[name] for name in passes) for c in (calls, plain_calls, apart_calls)
        )
        assert count == plain_count < apart_count


# -- the scale -----------------------------------------------------------------------------------------------


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


# -- in place ------------------------------------------------------------------------------------------------


@independent
@both_routes
@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.relu_(),
        lambda y: F.relu(y, inplace=True),
        lambda y: y.view(-1).add_(1),
        lambda y: y[0].zero_(),
        lambda y: y.__setitem__(0, 1.0),
        lambda y: y.t().mul_(2),
    ],
)
def test_a_change_of_the_output_in_place_raises_and_leaves_x_alone(change):
    for x in (leaf(4, 3), leaf(4, 3) * 1):
        before = x.detach().clone()
        with pytest.raises(RuntimeError, match="modified inplace"):
            change(grad_reverse(x, 0.5))
        assert torch.equal(x, before)


@independent
@both_routes
def test_a_change_of_x_in_place_never_gives_a_wrong_gradient():
    x = leaf(4, 3) * 1
    y = grad_reverse(x, 0.5)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified inplace"):
        y.sum().backward()
    x, weight = leaf(4, 3) * 1, leaf(2, 3)
    y = grad_reverse_linear(x, weight, None, 0.5)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# -- precision -----------------------------------------------------------------------------------------------


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


# -- errors --------------------------------------------------------------------------------------------------

X, W, B = torch.randn(4, 3, requires_grad=True), torch.randn(2, 3), torch.randn(2)
ERRORS = [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    (
        {"x": torch.ones(4, 3, dtype=torch.int64)},
        TypeError,
        "x must have a floating-point dtype, got torch.int64",
    ),
    (
        {"x": torch.ones(4, 3, dtype=torch.complex64, requires_grad=True)},
        TypeError,
        "x must have a floating-point dtype, got torch.complex64",
    ),
    (
        {"x": torch.eye(3).to_sparse().requires_grad_()},
        TypeError,
        "x must be a strided tensor, got layout torch.sparse_coo",
    ),
    (
        {"x": torch.eye(3).to_sparse_csr().requires_grad_()},
        TypeError,
        "x must be a strided tensor, got layout torch.sparse_csr",
    ),
    ({"scale": "1"}, TypeError, "scale must be a float or a tensor, got str"),
    ({"scale": None}, TypeError, "scale must be a float or a tensor, got NoneType"),
    ({"scale": 1j}, TypeError, "scale must be a float or a tensor, got complex"),
    (
        {"scale": torch.tensor(1)},
        TypeError,
        "scale must be a float or a floating-point tensor, got torch.int64",
    ),
    (
        {"scale": torch.tensor(1.0, requires_grad=True)},
        ValueError,
        "scale is a constant and must not require grad; pass scale.detach() if that is meant",
    ),
    (
        {"scale": nn.Parameter(torch.ones(4))},
        ValueError,
        "scale is a constant and must not require grad; pass scale.detach() if that is meant",
    ),
    (
        {"scale": torch.ones(4, 1)},
        ValueError,
        "scale must be a float, a 0-dim tensor or a 1-D tensor, got shape (4, 1)",
    ),
    (
        {"scale": torch.ones(3)},
        ValueError,
        "a 1-D scale needs one value per entry of x's dim 0, got (3,) for x of shape (4, 3)",
    ),
    (
        {"scale": torch.ones(4, device="meta")},
        ValueError,
        "a 1-D scale must be on x's device cpu, got meta",
    ),
]
LINEAR_ERRORS = [
    ({"x": torch.tensor(1.0)}, ValueError, "x must be (..., in_features), got a 0-dim tensor"),
    (
        {"weight": torch.randn(2, 4)},
        ValueError,
        "weight must be (out_features, 3) for x of shape (4, 3), got (2, 4)",
    ),
    (
        {"weight": torch.randn(3)},
        ValueError,
        "weight must be (out_features, 3) for x of shape (4, 3), got (3,)",
    ),
    ({"weight": W.double()}, TypeError, "weight must have x's dtype torch.float32, got torch.float64"),
    ({"weight": W.to("meta")}, ValueError, "weight must be on x's device cpu, got meta"),
    ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
    ({"bias": torch.randn(3)}, ValueError, "bias must be (2,), got (3,)"),
    ({"bias": torch.randn(2, 1)}, ValueError, "bias must be (2,), got (2, 1)"),
    ({"bias": B.half()}, TypeError, "bias must have x's dtype torch.float32, got torch.float16"),
    ({"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
]


@independent
@both_routes
@pytest.mark.parametrize(("wrong", "error", "message"), ERRORS)
def test_errors(wrong, error, message):
    check_error(grad_reverse, {"x": X, "scale": 1.0} | wrong, error, f"grad_reverse: {message}")
    arguments = {"x": X, "weight": W, "bias": B, "scale": 1.0} | wrong
    check_error(grad_reverse_linear, arguments, error, f"grad_reverse_linear: {message}")


@independent
@both_routes
@pytest.mark.parametrize(("wrong", "error", "message"), LINEAR_ERRORS)
def test_errors_of_linear(wrong, error, message):
    arguments = {"x": X, "weight": W, "bias": B, "scale": 1.0} | wrong
    check_error(grad_reverse_linear, arguments, error, f"grad_reverse_linear: {message}")


@independent
@both_routes
def test_a_scalar_has_no_samples():
    message = "grad_reverse: a 1-D scale needs one value per entry of x's dim 0, got (1,) for x of shape ()"
    for x in (torch.tensor(1.0), torch.tensor(1.0, requires_grad=True)):
        check_error(grad_reverse, {"x": x, "scale": torch.ones(1)}, ValueError, message)


# -- what torch does around an operator ----------------------------------------------------------------------


@native
def test_opcheck_of_the_raw_operator():
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for grad in (torch.randn(3, 8)[:, ::2], torch.randn(4, 3).t().bfloat16(), image):
        for scale in (torch.tensor(0.7), torch.rand(grad.shape[0])):
            check_opcheck("grad_reverse_backward", grad, scale)


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_raw_operator(dtype):
    for shape in ((0, 3), (1,), (129, 33), (5, 3, 37, 53), (2, 70001)):
        for layout in LAYOUTS.values():
            grad = layout(torch.randn(shape).to(dtype))
            for scale, exact in scales(shape[0]).values():
                if isinstance(scale, torch.Tensor):
                    out = torch.ops.fastda.grad_reverse_backward(grad, scale)
                    factor = exact.view(-1, *(1 for _ in shape[1:])) if exact.dim() else exact
                    assert_matches("grad_reverse", "grad", out, -factor * grad.double(), dtype)
    for shape, wrong in (((3,), (2,)), ((3,), (3, 1)), ((), (1,)), ((0,), (0, 0))):
        grad, scale = torch.ones(shape), torch.ones(wrong)
        with pytest.raises(RuntimeError, match="grad_reverse_backward: scale must be 0-dim"):
            torch.ops.fastda.grad_reverse_backward(grad, scale)
    with pytest.raises(RuntimeError, match="grad_reverse_backward: dtype must be"):
        torch.ops.fastda.grad_reverse_backward(torch.ones(3, dtype=torch.int32), torch.tensor(1.0))


def tensor_scale(scale, n):
    return {"float": scale, "0-dim": torch.tensor(scale), "per sample": torch.full((n,), scale)}


@independent
@pytest.mark.parametrize("kind", ["float", "0-dim", "per sample"])
def test_transforms(kind):
    scale = tensor_scale(0.7, 3)[kind]
    check_transforms("grad_reverse", draw("grad_reverse", (3, 2)) | {"scale": scale}, compile=kind == "0-dim")
    arguments = draw("grad_reverse_linear", (3, 2, 2), bias=True) | {"scale": scale}
    check_transforms("grad_reverse_linear", arguments, compile=kind == "float")


class Bare(torch.autograd.Function):
    """A reversal in the form that transforms ask for, without the way around them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return -grad


@independent
@pytest.mark.xfail(
    strict=True,
    reason="once torch gets this right, _torch.transforms_active and its reference can go",
)
def test_torch_still_needs_the_guard_around_transforms():
    x = torch.randn(3)
    compiled_grad, _ = compiled(torch.func.grad(lambda x: Bare.apply(x).sum()), "aot_eager")
    assert torch.equal(compiled_grad(x), -torch.ones(3))
    assert torch.equal(torch.func.jvp(Bare.apply, (x,), (torch.ones(3),))[1], -torch.ones(3))


def calls(scale):
    yield "grad_reverse", draw("grad_reverse", (5, 7), torch.float32, scale=scale)
    yield "grad_reverse_linear", draw("grad_reverse_linear", (5, 7, 3), torch.float32, bias=True, scale=scale)


@independent
def test_compiled_by_inductor():
    for op, arguments in calls(torch.tensor(0.7)):
        check_compiled(op, arguments)


@independent
@pytest.mark.parametrize("kind", ["float", "per sample"])
def test_compiled_with_other_scales(kind):
    for op, arguments in calls(tensor_scale(0.7, 5)[kind]):
        check_compiled(op, arguments, backend="aot_eager")


@independent
def test_no_compilation_follows_a_changing_scale():
    kinds = {"0-dim": 1, "per sample": 1}
    if torch.__version__ >= (2, 13):  # torch 2.11 makes a constant of every float
        kinds["float"] = 2
    for kind, most in kinds.items():
        for op, rest in ((grad_reverse, {}), (grad_reverse_linear, {"weight": torch.randn(2, 3)})):
            fast, counter = compiled(partial(op, **rest), "aot_eager")
            for step in range(10):
                x, scale = leaf(4, 3), tensor_scale(0.1 * step, 4)[kind]
                (dx,) = grads_of(fast(x, scale=scale), x)
                (expected,) = grads_of(op(x, scale=scale, **rest), x)
                torch.testing.assert_close(dx, expected)
            assert counter.frame_count <= most, (kind, op)


@independent
@needs_node
def test_compiled_autograd():
    weight = leaf(2, 3)

    def loss(x, scale):
        return (
            grad_reverse(x * 2, scale).sin().sum()
            + grad_reverse_linear(x * 2, weight, None, scale).cos().sum()
        )

    for scale in (0.5, torch.rand(4)):
        x = leaf(4, 3)
        expected = torch.autograd.grad(loss(x, scale), [x, weight])
        weight.grad = None
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
            loss(x, scale).backward()
        torch.testing.assert_close((x.grad, weight.grad), expected)


@independent
@both_routes
def test_checkpoints_and_saved_tensor_hooks():
    from torch.utils.checkpoint import checkpoint

    x, weight = leaf(4, 3), leaf(2, 3)

    def f(x):
        return grad_reverse_linear(grad_reverse(x, 0.5).sin(), weight, None, 0.3).cos()

    expected = grads_of(f(x), [x, weight])
    torch.testing.assert_close(grads_of(checkpoint(f, x, use_reentrant=False), [x, weight]), expected)
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(grads_of(f(x), [x, weight]), expected)


@independent
@both_routes
def test_inference_tensors_and_parameters():
    with torch.inference_mode():
        x = torch.ones(3, requires_grad=True)
    y = grad_reverse(x, 0.5)
    assert torch.equal(y, x)
    p = nn.Parameter(torch.ones(3))
    y = grad_reverse(p, 0.5)
    assert type(y) is torch.Tensor
    assert torch.equal(grads_of(y, p)[0], torch.full((3,), -0.5))


@independent
@both_routes
def test_anomaly_mode_names_the_reversal(route):
    x = leaf(3)
    name = "GradReverseBackward" if route == "node" else "_GradReverseBackward"
    assert grad_reverse(x).grad_fn.name() == name
    with (
        pytest.warns(UserWarning, match="grad_reverse"),
        pytest.raises(RuntimeError, match=f"Function '{name}' returned nan"),
        torch.autograd.detect_anomaly(check_nan=True),
    ):
        grad_reverse(x, math.nan).sum().backward()


@independent
def test_a_process_without_the_accelerator_gives_the_same():
    code = """
import torch, fastda
x, w = torch.arange(6.0).view(2, 3).requires_grad_(), torch.ones(4, 3)
fastda.grad_reverse(x, 0.5).sum().backward()
fastda.grad_reverse_linear(x, w, None, torch.tensor(0.5)).sum().backward()
print(x.grad.unique().tolist(), fastda.info()["autograd_extension"])
"""
    env = {**os.environ, "FASTDA_AUTOGRAD_EXTENSION": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "[-2.5] switched off by FASTDA_AUTOGRAD_EXTENSION=0", done.stderr


# -- modules -------------------------------------------------------------------------------------------------


def reversal_of(layer, x):
    """The factor by which `layer` multiplies a gradient."""
    (dx,) = grads_of(layer(x), x)
    return dx.unique().item()


@independent
def test_module_with_a_float_scale():
    layer, x = fastda.nn.GradientReversal(0.5), leaf(4, 3)
    assert reversal_of(layer, x) == -0.5
    assert layer.state_dict() == {}
    assert repr(layer) == "GradientReversal(scale=0.5)"
    layer.scale = 0.25
    assert reversal_of(layer, x) == -0.25
    assert reversal_of(GradientReversal(), x) == -1.0


@independent
def test_module_with_a_tensor_scale():
    layer, x = GradientReversal(torch.tensor(0.5)), leaf(4, 3)
    assert reversal_of(layer, x) == -0.5
    assert list(layer.state_dict()) == ["scale"]
    layer.scale.fill_(0.25)
    assert reversal_of(layer, x) == -0.25
    assert repr(layer) == "GradientReversal(scale=0.25)"
    assert layer.double().scale.dtype == torch.float64
    layer = GradientReversal(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(grads_of(layer(x), x)[0][:, 0], -layer.scale)


@independent
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: GradientReversal(torch.tensor(1.0, requires_grad=True)),
            ValueError,
            "GradientReversal: scale is a constant and must not require grad; "
            "pass scale.detach() if that is meant",
        ),
        (
            lambda: GradientReversal("1"),
            TypeError,
            "GradientReversal: scale must be a float or a tensor, got str",
        ),
        (
            lambda: ScheduledGradientReversal(0),
            ValueError,
            "ScheduledGradientReversal: max_steps must be at least 1, got 0",
        ),
        (
            lambda: ScheduledGradientReversal(1.5),
            TypeError,
            "ScheduledGradientReversal: max_steps must be an int, got float",
        ),
        (
            lambda: ScheduledGradientReversal(True),
            TypeError,
            "ScheduledGradientReversal: max_steps must be an int, got bool",
        ),
        (
            lambda: ScheduledGradientReversal(5, gamma=0.0),
            ValueError,
            "ScheduledGradientReversal: gamma must be positive and finite, got 0.0",
        ),
        (
            lambda: ScheduledGradientReversal(5, gamma=math.nan),
            ValueError,
            "ScheduledGradientReversal: gamma must be positive and finite, got nan",
        ),
        (
            lambda: DomainClassifier(0),
            ValueError,
            "DomainClassifier: in_features must be at least 1, got 0",
        ),
        (
            lambda: DomainClassifier(3, num_domains=0),
            ValueError,
            "DomainClassifier: num_domains must be at least 1, got 0",
        ),
        (
            lambda: DomainClassifier(3, num_layers=-1),
            ValueError,
            "DomainClassifier: num_layers must be at least 0, got -1",
        ),
    ],
)
def test_errors_of_modules(make, error, message):
    check_error(make, {}, error, message)


def dann_scale(step, max_steps, gamma=10.0, low=0.0, high=1.0):
    p = min(step / max_steps, 1.0)
    return low + (high - low) * (2 / (1 + math.exp(-gamma * p)) - 1)


@independent
@both_routes
@pytest.mark.parametrize(
    "options", [{}, {"gamma": 5.0, "low": 0.1, "high": 2.0}, {"low": 1.0, "high": 0.0}], ids=str
)
def test_schedule_is_that_of_dann(options):
    layer, x = ScheduledGradientReversal(20, **options), leaf(2)
    for step in range(25):
        assert reversal_of(layer, x) == pytest.approx(-dann_scale(step, 20, **options), abs=1e-6)
        assert layer.steps.item() == step
        layer.step()


@independent
@both_routes
def test_schedule_moves_on_between_forward_and_backward():
    layer, x = ScheduledGradientReversal(10), leaf(3)
    for step in range(5):
        y = layer(x)
        layer.step()
        assert grads_of(y, x)[0][0].item() == pytest.approx(-dann_scale(step, 10), abs=1e-6)


@independent
def test_schedule_goes_with_the_module():
    layer = ScheduledGradientReversal(10, high=0.5)
    for _ in range(3):
        layer.step()
    assert list(layer.state_dict()) == ["scale", "steps"]
    assert layer.to("meta").scale.device.type == "meta"
    assert repr(layer) == "ScheduledGradientReversal(max_steps=10, gamma=10.0, low=0.0, high=0.5)"

    layer = ScheduledGradientReversal(10, high=0.5)
    for _ in range(3):
        layer.step()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    resumed = ScheduledGradientReversal(10, high=0.5)
    resumed.load_state_dict(torch.load(file))
    copies = [resumed, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    x = leaf(2)
    for other in (*copies, layer):
        other.step()
        assert reversal_of(other, x) == pytest.approx(-0.5 * dann_scale(4, 10), abs=1e-6)
        assert other.steps.item() == 4
    half = copy.deepcopy(layer).bfloat16()
    half.step()
    assert (half.scale.dtype, half.steps.dtype) == (torch.bfloat16, torch.int64)
    assert half.scale.item() == pytest.approx(0.5 * dann_scale(5, 10), rel=4e-3)


@independent
@pytest.mark.parametrize("make", [lambda: GradientReversal(0.5), lambda: GradientReversal(torch.tensor(0.5))])
def test_copies_of_modules(make):
    x = leaf(3)
    layer = make()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert reversal_of(other, x) == -0.5
        if isinstance(layer.scale, torch.Tensor):
            other.scale.fill_(3.0)
        assert reversal_of(layer, x) == -0.5


@independent
def test_one_compilation_serves_a_whole_schedule():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), ScheduledGradientReversal(10), DomainClassifier(8, 6, dropout=0.0)
    )
    plain = copy.deepcopy(net)
    fast, counter = compiled(net, "aot_eager")
    for _ in range(12):
        x = torch.randn(5, 4)
        for model, module in ((fast, net), (plain, plain)):
            module.zero_grad()
            model(x).square().sum().backward()
            module[2].step()
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    assert counter.frame_count == 1


@independent
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    for layer in (GradientReversal(0.5), ScheduledGradientReversal(10)):
        net = nn.Sequential(nn.Linear(3, 4), layer, DomainClassifier(4, 5)).eval()
        x = torch.randn(2, 3)
        program = torch.export.export(net, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), net(x))


DDP = """
import os, sys, torch, torch.distributed as dist
from torch import nn
from fastda.nn import DomainClassifier, GradientReversal, ScheduledGradientReversal
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.Tanh(), ScheduledGradientReversal(4), DomainClassifier(8, 6, dropout=0.0),
        nn.Tanh(), nn.Linear(1, 8), GradientReversal(0.3), nn.Linear(8, 1),
    )
data = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
alone, shared = net(), nn.parallel.DistributedDataParallel(net())
for step in range(3):
    for model, x in ((alone, data), (shared, data[rank::2])):
        module = getattr(model, "module", model)
        module[2].step()
        model.zero_grad()
        model(x).square().mean().backward()
    for p, q in zip(alone.parameters(), shared.module.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
        assert p.grad.abs().max() > 0
print("same gradients")
dist.destroy_process_group()
"""


@independent
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_ddp(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DDP]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], env=env, stdout=-1, stderr=-2, text=True
        )
        for rank in range(2)
    ]
    for process in running:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
        assert "same gradients" in out


@independent
def test_domain_classifier():
    net = DomainClassifier(7)
    assert [type(m).__name__ for m in net] == ["Linear", "ReLU", "Dropout"] * 2 + ["Linear"]
    assert [m.weight.shape for m in net if isinstance(m, nn.Linear)] == [(1024, 7), (1024, 1024), (1, 1024)]
    assert net[2].p == 0.5
    assert DomainClassifier(7, 5, num_layers=0)(torch.randn(3, 7)).shape == (3, 1)
    for domains in (1, 2, 3, 5):
        net = DomainClassifier(7, 5, num_layers=3, dropout=0.0, num_domains=domains)
        logits = net(torch.randn(4, 7))
        assert logits.shape == (4, domains)
        if domains > 1:
            F.cross_entropy(logits, torch.arange(4) % domains).backward()
        else:
            F.binary_cross_entropy_with_logits(logits[:, 0], torch.rand(4)).backward()
        assert all(p.grad.abs().sum() > 0 for p in net.parameters())


@independent
@both_routes
def test_domain_classifier_learns_and_the_features_unlearn():
    """Behind a reversal the loss of three domains falls for the classifier and rises for the features."""
    torch.manual_seed(0)
    domains = torch.arange(96) % 3
    x = torch.randn(96, 6) + F.one_hot(domains, 6) * 2
    features, classifier = nn.Linear(6, 6), DomainClassifier(6, 16, num_layers=1, dropout=0.0, num_domains=3)
    net = nn.Sequential(features, GradientReversal(1.0), classifier)

    def loss():
        return F.cross_entropy(net(x), domains)

    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.5)
    before = loss().item()
    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    learnt = loss().item()
    optimizer = torch.optim.SGD(features.parameters(), lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert learnt < 0.5 * before
    assert loss().item() > learnt
