"""Scales of gradient reversals, and what may stand for one."""

import numpy
import pytest
import torch
from torch import nn

from tests.optimize.cases import (
    F64,
    Function,
    Reversal,
    Reverse,
    function,
    in_places,
    negated,
    network,
    rows,
    view,
)
from tests.optimize.checking import check


def default_of_a_tenth(ctx, x, lambd=0.1):
    ctx.lambd = lambd
    return x.view_as(x)


class DefaultOfATenth(Reversal):
    served = True
    function = function(forward=default_of_a_tenth, backward=lambda ctx, g: (g.neg() * ctx.lambd, None))


class DefaultOfATenthGiven(DefaultOfATenth):
    arguments = (1.0,)


class NegativeDefault(Reversal):
    served = True

    def forward(ctx, x, lambd=-3.0):
        ctx.lambd = lambd
        return x.view_as(x)

    function = function(forward=forward, backward=lambda ctx, g: (g.neg() * ctx.lambd, None))


class NoneMeansAHalf(Reversal):
    served = True

    def forward(ctx, x, alpha=None):
        ctx.alpha = 0.5 if alpha is None else alpha
        return x.view_as(x)

    function = function(forward=forward, backward=negated)


class NoneMeansAHalfGivenNone(NoneMeansAHalf):
    arguments = (None,)


class ZeroMeansOne(Reversal):
    served = True

    def forward(ctx, x, alpha):
        ctx.alpha = alpha or 1.0
        return x.view_as(x)

    function = function(forward=forward, backward=negated)
    arguments = (0.0,)


class ScaleByDtype(Reversal):
    served = True

    def forward(ctx, x, alpha):
        ctx.alpha = alpha if x.dtype == torch.float64 else 2 * alpha
        return x.view_as(x)

    function = function(forward=forward, backward=negated)
    arguments = (0.4,)
    second = False
    tolerance = 1e-5

    def change(self, model):
        model.float()

    def before(self, model):
        return [(rows(),)]

    def inputs(self):
        return [(rows().detach().float().requires_grad_(),)]


class ScaleByDimension(Reversal):
    served = True

    def forward(ctx, x, alpha):
        ctx.alpha = alpha / x.dim()
        return x.view_as(x)

    function = function(forward=forward, backward=negated)
    arguments = (0.4,)


class ScaleByBatch(Reversal):
    def backward(ctx, g):
        return g * -ctx.alpha / (len(g) if len(g) > 8 else 1), None

    function = function(forward=view, backward=backward)
    arguments = (0.4,)

    def inputs(self):
        return [(rows(3),), (rows(9),)]


class ScaleOfOtherRanks(Reversal):
    def backward(ctx, g):
        return (g * -ctx.alpha if g.dim() == 2 else g * ctx.alpha), None

    function = function(forward=view, backward=backward)
    arguments = (0.4,)

    def inputs(self):
        return [(rows(),), (rows(2, 18).detach().view(2, 3, 6).requires_grad_(),)]


DEFAULTS = {"lambd": 1.0}


class MutableDefault(Reversal):
    served = True

    def forward(ctx, x, config=DEFAULTS):
        ctx.alpha = config["lambd"]
        return x.view_as(x)

    function = function(forward=forward, backward=negated)

    def everywhere(self, monkeypatch):
        monkeypatch.setitem(DEFAULTS, "lambd", 0.25)


class DefaultChangedLater(Reversal):
    served = True

    def forward(ctx, x, alpha=1.0):
        ctx.alpha = alpha
        return x.view_as(x)

    function = function(forward=forward, backward=negated)

    def everywhere(self, monkeypatch):
        monkeypatch.setattr(self.function.forward, "__defaults__", (0.25,))


class AtMostTen(Reversal):
    served = True

    def forward(ctx, x, alpha):
        ctx.alpha = min(alpha, 10)
        return x.view_as(x)

    function = function(forward=forward, backward=negated)
    arguments = (1000.0,)


class SquaredAndRooted(Reversal):
    served = True

    def forward(ctx, x, alpha):
        ctx.alpha = abs(alpha) if abs(alpha) > 100 else alpha
        return x.view_as(x)

    function = function(forward=forward, backward=negated)
    arguments = (-200.0,)


class ScaleOfItsClass(Reversal):
    function = None

    def build(self):
        class Own(Function):
            scale = 1.0

            @staticmethod
            def forward(ctx, x):
                return x.view_as(x)

            @staticmethod
            def backward(ctx, grad):
                return -grad * Own.scale

        self.own = [*getattr(self, "own", []), Own]
        return network(Own, (), self.place, self.after)

    def everywhere(self, monkeypatch):
        for own in self.own:
            monkeypatch.setattr(own, "scale", 3.0)


class ScaleByContextClass(Reversal):
    """The ctx of a Function is an instance of a class that knows it."""

    function = type(
        "Written",
        (Function,),
        {
            "scale": 0.5,
            "forward": staticmethod(lambda ctx, x: x.view_as(x)),
            "backward": staticmethod(lambda ctx, g: -g * ctx._forward_cls.scale),
        },
    )


class ByAParameter(Reversal):
    """The scale learns: its gradient is the author's."""

    function = function(
        forward=lambda ctx, x, a: (ctx.save_for_backward(x, a), x.view_as(x))[1],
        backward=lambda ctx, g: (-g * ctx.saved_tensors[1], (g * ctx.saved_tensors[0]).sum()),
    )

    def build(self):
        model = super().build()
        model.scale = nn.Parameter(torch.tensor(0.5))
        model.arguments = (model.scale,)
        return model

    def prepare(self, model):
        model.arguments = (model.scale,)


class OneElement(Reversal):
    served = True
    function = Reverse
    arguments = (torch.tensor([0.5], dtype=F64),)


class PerColumn(Reversal):
    function = Reverse
    arguments = (torch.tensor([0.5, 1.0, 2.0, -1.0, 0.0], dtype=F64),)


class AnIntegerTensor(Reversal):
    function = Reverse
    arguments = (torch.tensor(2),)


class ABool(Reversal):
    function = Reverse
    arguments = (True,)


class ANumPyNumber(Reversal):
    function = Reverse
    arguments = (numpy.float64(0.3),)


class ASmallNumPyNumber(Reversal):
    function = Reverse
    arguments = (numpy.float32(0.3),)


class AnArray(Reversal):
    function = Reverse
    arguments = (numpy.array(0.3),)


class ALongVectorOfOne(Reversal):
    """Its result has more dimensions than the features."""

    function = Reverse
    arguments = (torch.full((1, 1, 1), 0.3, dtype=F64),)


class AWiderScale(Reversal):
    """A float64 scale of float32 features."""

    function = Reverse
    arguments = (torch.full((1,), 0.3, dtype=F64),)
    second = False
    tolerance = 1e-6

    def prepare(self, model):
        model.float()

    def inputs(self):
        return [(rows().detach().float().requires_grad_(),)]


class AnInfiniteScale(Reversal):
    function = Reverse
    arguments = (float("inf"),)


class AScaleThatIsNoNumber(Reversal):
    function = Reverse
    arguments = (float("nan"),)


class AHugeInteger(Reversal):
    function = Reverse
    arguments = (10**400,)


class AString(Reversal):
    function = Reverse
    arguments = ("0.5",)


class AComplexScale(Reversal):
    function = Reverse
    arguments = (1j,)


class TooManyArguments(Reversal):
    function = Reverse
    arguments = (0.5, 0.5)


class TooFewArguments(Reversal):
    function = Reverse
    why = None


@pytest.mark.parametrize(("case", "place"), in_places(globals()), ids=lambda v: getattr(v, "__name__", v))
def test_the_scale_is_the_authors(case, place, monkeypatch):
    check(case(), monkeypatch, place=place)
