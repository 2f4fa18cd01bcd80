"""Gradient reversal: views without copies, gradients in place, changes in place."""

from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from fastda import grad_reverse, grad_reverse_linear
from fastda.testing import assert_matches
from tests.common import (
    both_routes,
    needs_node,
)
from tests.ops.grad_reverse import independent, leaf, scales


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
