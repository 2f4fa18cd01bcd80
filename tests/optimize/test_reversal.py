"""Reversing Functions: the written forms and no others, bit for bit."""

import numpy
import pytest
import torch
from torch.autograd.function import once_differentiable

import fastda
from tests.optimize.helpers import served
from tests.optimize.reversing import Layer, function, gradient, neg_times, saved

pytestmark = pytest.mark.isa_independent


def minus_times(ctx, grad_output):
    """A docstring, and an annotation below, change nothing."""
    grad_input: torch.Tensor = -grad_output * ctx.s
    return grad_input, None


def of_a_local(ctx, g):
    lambd = ctx.s
    result = lambd * g.neg()
    return result, None


def minus_all(ctx, grad):
    return -(ctx.s * grad), None


def times_minus_one(ctx, grad):
    return grad * -1 * ctx.s, None


def copies(ctx, grad):
    return grad.clone() * -ctx.s, None


def constant(ctx, grad):
    return grad.neg() * 0.1, None


def asks(ctx, grad):
    out = None
    (s,) = ctx.saved_tensors
    if ctx.needs_input_grad[0]:
        out = -grad * s
    return out, None


TWO = [neg_times, minus_times, of_a_local, minus_all, times_minus_one, saved, copies, constant, asks]
SCALES = [
    *(0.3, -2.5, 0.0, 1, 0, -3, True, float("nan"), float("inf"), 1e300),
    *(numpy.float64(0.3), numpy.float32(0.3), numpy.uint8(3)),
    *(torch.tensor(0.3), torch.tensor([0.3]), torch.tensor(0.3, dtype=torch.float64), torch.tensor(3)),
    *(torch.tensor(3, dtype=torch.uint8), torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor(True)),
    torch.tensor(0.3, dtype=torch.bfloat16),
]


def same(a, b):
    """Equal to the bit, the signs of zeros included."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32)) or torch.equal(
        torch.nan_to_num(a, nan=7.0), torch.nan_to_num(b, nan=7.0)
    )


@pytest.mark.parametrize("backward", TWO, ids=lambda f: f.__name__)
def test_every_form_with_every_scale(backward):
    layer = Layer(function(backward))
    expected = []
    for scale in SCALES:
        try:
            expected.append(gradient(layer, scale))
        except Exception as problem:
            expected.append((type(problem), str(problem)))
    report = fastda.optimize(layer)
    (entry,) = report.replaced
    assert entry.what == "gradient reversal Reverse → one pass over the gradient, where it made two"
    for scale, right in zip(SCALES, expected, strict=True):
        if isinstance(right, torch.Tensor):
            assert same(gradient(layer, scale), right), scale
        else:
            with pytest.raises(right[0]) as problem:
                gradient(layer, scale)
            assert str(problem.value) == right[1]
    assert served(report) >= 8
    served_before = served(report)
    report.undo()
    assert vars(layer.function)["backward"].__func__ is backward
    gradient(layer, 0.3)
    assert served_before and not report.calls()


def test_zeros_have_their_signs():
    for scale in (0, 0.0, -0.0):
        layer = Layer(function(neg_times))
        before = gradient(layer, scale)
        assert served(fastda.optimize(layer)) == 0
        assert torch.equal(gradient(layer, scale).signbit(), before.signbit())


def not_negative(ctx, grad):
    return 0.1 * grad.clone(), None


def negative_constant_copied(ctx, grad):
    return -0.1 * grad.clone(), None


def clamped(ctx, grad):
    return (-grad * ctx.s).clamp(-10, 10), None


def without_nan(ctx, grad):
    return torch.nan_to_num(-grad * ctx.s), None


def two_scales(ctx, grad):
    return -grad * ctx.s * ctx.t, None


def of_a_branch(ctx, grad):
    if ctx.s > 1:
        return -grad * ctx.s, None
    return grad.neg(), None


def of_a_global(ctx, grad):
    return -grad * GLOBAL, None


def printing(ctx, grad):
    print(end="")
    return -grad * ctx.s, None


def doubled(ctx, grad):
    return grad * 2.0 * ctx.s, None


@once_differentiable
def decorated(ctx, grad):
    return -grad * ctx.s, None


def in_place(ctx, grad):
    return grad.neg_().mul_(ctx.s), None


GLOBAL = 1.0
OTHERS = [
    doubled,
    decorated,
    in_place,
    not_negative,
    negative_constant_copied,
    clamped,
    without_nan,
    two_scales,
    of_a_branch,
    of_a_global,
    printing,
]


@pytest.mark.parametrize("backward", OTHERS, ids=lambda f: f.__name__)
def test_no_other_form_is_touched(backward):
    layer = Layer(function(backward))
    report = fastda.optimize(layer)
    assert vars(layer.function)["backward"].__func__ is backward
    assert not report.replaced
    looks_like_one = backward not in (doubled, not_negative, negative_constant_copied)
    assert [e.what for e in report.left] == looks_like_one * [
        "Reverse has a backward that is none of the written forms of −scale · gradient; if it is meant as "
        "that: fastda.grad_reverse(x, scale)"
    ]


def one_pass(ctx, grad):
    return -ctx.s * grad, None


def weighted(ctx, grad):
    return ctx.s * grad, None


@pytest.mark.parametrize("backward", [one_pass, weighted], ids=lambda f: f.__name__)
def test_one_pass_is_what_it_gets_at_best(backward):
    report = fastda.optimize(Layer(function(backward)))
    assert [e.what for e in report.left] == [
        "Reverse makes one pass over the gradient already; fastda.grad_reverse(x, scale) saves Python, too"
    ]
