"""Which gradients there are, and what is done with them: the same on every lane."""

import itertools

import torch
from torch import Tensor

import fastda
from fastda import reference
from fastda.tools import verify
from tests.conformance.cases import arguments_for, every_dtype, every_operator, few, judge, small


def first_gradients(function, arguments, names, **graph):
    """Gradients of the sum of all outputs under fixed weights."""
    arguments = {n: v.detach().requires_grad_() if n in names else v for n, v in arguments.items()}
    out = function(**arguments)
    outputs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
    weights = [torch.linspace(0.5, 1.5, o.numel(), device=o.device).view(o.shape).to(o) for o in outputs]
    wanted = [arguments[n] for n in names]
    return dict(zip(names, torch.autograd.grad(outputs, wanted, weights, **graph), strict=True)), arguments


@every_dtype
@every_operator
def test_a_first_gradient_is_the_same_with_create_graph(lane, op, dtype):
    """The backward that can be differentiated again is another program; its numbers are not others."""
    wrong, sizes, function = [], small(op), getattr(fastda, op.name)
    for options, value in itertools.product(few(op), (None, float("nan"), float("inf"))):
        exact, names = verify.draw_arguments(op, options, sizes, dtype, 0)
        x = exact[names[0]]
        if value is not None:
            x[(0, 0, x.shape[-2] // 2, x.shape[-1] // 2) if x.dim() == 4 else (0, -1)] = value
        arguments = arguments_for(lane, exact, dtype)
        once, _ = first_gradients(function, arguments, names)
        again, _ = first_gradients(function, arguments, names, create_graph=True)
        wrong += [(value, *w) for w in judge(op, options, sizes, dtype, again, once)]
    assert not wrong


@every_operator
def test_second_gradients_are_those_of_the_reference(lane, op):
    for options in few(op):
        exact, names = verify.draw_arguments(op, options, small(op), torch.float64, 0)

        def second(function, arguments, names=names):
            grads, leaves = first_gradients(function, arguments, names, create_graph=True)
            total = sum(g.square().sum() for g in grads.values() if g.requires_grad)
            if not isinstance(total, Tensor) or not total.requires_grad:
                return [torch.zeros_like(leaves[n]) for n in names]
            return torch.autograd.grad(
                total, [leaves[n] for n in names], allow_unused=True, materialize_grads=True
            )

        expected = second(getattr(reference, op.name), exact)
        actual = second(getattr(fastda, op.name), arguments_for(lane, exact, torch.float64))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.cpu(), e, rtol=1e-9, atol=1e-11)


@every_operator
def test_a_gradient_does_not_depend_on_which_others_are_wanted(lane, op):
    for options in few(op):
        exact, names = verify.draw_arguments(op, options, small(op), torch.float32, 0)
        arguments, function = arguments_for(lane, exact, torch.float32), getattr(fastda, op.name)
        everything, _ = first_gradients(function, arguments, names)
        for name in names:
            alone, _ = first_gradients(function, arguments, [name])
            wrong = judge(op, options, small(op), torch.float32, alone, {name: everything[name]})
            assert not wrong
