"""Functions that look like a gradient reversal, in many spellings."""

import pytest
import torch

from tests.optimize.cases import (
    F64,
    Copying,
    Reversal,
    function,
    in_places,
    negated,
    view,
)
from tests.optimize.checking import check


def _spelling(name, forward, backward, *arguments, served=True):
    namespace = {"function": function(forward=forward, backward=backward), "arguments": arguments}
    return type(name, (Reversal,), {**namespace, "served": served, "__module__": __name__})


def view_shape(ctx, x, alpha):
    ctx.alpha = alpha
    return x.view(x.shape)


def itself(ctx, x, alpha):
    ctx.alpha = alpha
    return x


SERVED = [
    _spelling("NegTimesScale", view, negated, 0.3),
    _spelling("MinusGradTimesScale", view, lambda ctx, g: (-g * ctx.alpha, None), 0.3),
    _spelling("MinusScaleTimesGrad", view, lambda ctx, g: (-ctx.alpha * g, None), 2.0, served=False),
    _spelling("GradTimesMinusScale", view, lambda ctx, g: (g * -ctx.alpha, None), 2, served=False),
    _spelling("MinusOfTheProduct", itself, lambda ctx, g: (-(ctx.alpha * g), None), 0.7),
    _spelling("ItselfForward", itself, negated, 0.0),
    _spelling("ANegativeScale", view, negated, -2.5),
    _spelling("ALargeScale", view, negated, 1e6),
    _spelling("AZeroDimensionalScale", view, negated, torch.tensor(0.3, dtype=F64)),
]
globals().update({case.__name__: case for case in SERVED})


class WithoutAScale(Reversal):
    function = function(forward=lambda ctx, x: x.view_as(x), backward=lambda ctx, g: g.neg())


class ConstantScale(Reversal):
    """`grad.neg() * 0.1`, as Mdd's and others' constants."""

    served = True
    function = function(forward=lambda ctx, x: x.view_as(x), backward=lambda ctx, g: g.neg() * 0.1)


class TimesANegativeWeight(Reversal):
    """DA Faster R-CNN's, whose caller passes the negative weight."""

    function = function(forward=view, backward=lambda ctx, g: (ctx.alpha * g, None))
    arguments = (-0.1,)


class TimesAPositiveWeight(TimesANegativeWeight):
    arguments = (0.1,)


class ClonedTimesMinusATenth(Reversal):
    """A sign that the compiler folds into the constant."""

    why = None

    function = function(forward=lambda ctx, x: x.view_as(x), backward=lambda ctx, g: g.clone() * -0.1)


class ClonedTimesATenth(Reversal):
    """The same instructions, and no reversal."""

    why = None

    function = function(forward=lambda ctx, x: x.view_as(x), backward=lambda ctx, g: 0.1 * g.clone())


class MinusOfAMinus(Reversal):
    function = function(forward=lambda ctx, x: x.view_as(x), backward=lambda ctx, g: -(g * -0.1))


class TimesTwoAfterTheScale(Reversal):
    function = function(forward=view, backward=lambda ctx, g: (-g * ctx.alpha * 2, None))
    arguments = (0.3,)


class ACopy(Reversal):
    served = True
    function = Copying
    arguments = (0.3,)


class ACopyWithItsDefault(Reversal):
    served = True
    function = Copying


class AClone(Reversal):
    served = True
    function = function(
        forward=lambda ctx, x, a: (setattr(ctx, "a", a), x.clone())[1],
        backward=lambda ctx, g: (-g * ctx.a, None),
    )
    arguments = (0.3,)


@pytest.mark.parametrize(("case", "place"), in_places(globals()), ids=lambda v: getattr(v, "__name__", v))
def test_the_gradient_is_the_authors(case, place, monkeypatch):
    check(case(), monkeypatch, place=place)
