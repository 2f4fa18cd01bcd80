"""Functions that do more than reverse a gradient."""

import functools
from typing import ClassVar

import pytest
import torch
from torch.autograd.function import once_differentiable

from tests.optimize.cases import (
    Copying,
    Function,
    Reversal,
    Reverse,
    function,
    in_places,
    negated,
    rows,
    view,
)
from tests.optimize.checking import check

# -- the gradient is more than scaled ------------------------------------------------------------------------


class ClampsLargeGradients(Reversal):
    function = function(forward=view, backward=lambda ctx, g: ((-ctx.alpha * g).clamp(-10, 10), None))
    arguments = (1.0,)
    gradient = 100.0


class ClampsInPlace(Reversal):
    function = function(forward=view, backward=lambda ctx, g: (g.neg().mul_(ctx.alpha).clamp_(-5, 5), None))
    arguments = (1.0,)
    gradient = 100.0


class ReplacesNaN(Reversal):
    function = function(forward=view, backward=lambda ctx, g: (torch.nan_to_num(-ctx.alpha * g), None))
    arguments = (1.0,)
    gradient = "nan"


class ReplacesNaNByWhere(Reversal):
    function = function(
        forward=view, backward=lambda ctx, g: (-ctx.alpha * torch.where(g != g, torch.zeros_like(g), g), None)
    )
    arguments = (1.0,)
    gradient = "nan"


class LimitsItsNorm(Reversal):
    function = function(
        forward=view, backward=lambda ctx, g: (-ctx.alpha * g / max(1.0, float(g.norm()) / 50), None)
    )
    arguments = (1.0,)
    gradient = 100.0


class RoundsTheGradient(Reversal):
    function = function(forward=view, backward=lambda ctx, g: (-ctx.alpha * (g + 1e-3 - 1e-3), None))
    arguments = (1.0,)
    tolerance = 0.0


class HalvesPrecision(Reversal):
    function = function(forward=view, backward=lambda ctx, g: (-ctx.alpha * g.float().to(g.dtype), None))
    arguments = (1.0,)


class AddsNothing(Reversal):
    function = function(forward=view, backward=lambda ctx, g: (-ctx.alpha * g + 0.0 * g.sum(), None))
    arguments = (1.0,)
    gradient = "nan"


class InPlaceOnTheGradient(Reversal):
    """It changes a gradient that others see."""

    function = function(forward=view, backward=lambda ctx, g: (g.neg_().mul_(ctx.alpha), None))
    arguments = (0.5,)
    second = False


class ChecksTheGradient(Reversal):
    def backward(ctx, g):
        if not torch.isfinite(g).all():
            raise FloatingPointError("the gradient is not finite")
        return -ctx.alpha * g, None

    function = function(forward=view, backward=backward)
    arguments = (1.0,)
    gradient = "nan"


class PrintsTheGradient(Reversal):
    def backward(ctx, g):
        print(f"gradient of {tuple(g.shape)}")
        return -ctx.alpha * g, None

    function = function(forward=view, backward=backward)
    arguments = (1.0,)


class CountsOnTheFunction(Reversal):
    seen: ClassVar = []

    def backward(ctx, g):
        CountsOnTheFunction.seen.append(g.shape)
        print(len(CountsOnTheFunction.seen) % 2)
        return -ctx.alpha * g, None

    function = function(forward=view, backward=backward)
    arguments = (1.0,)

    def prepare(self, model):
        self.seen.clear()

    def call(self, model, x):
        self.seen.clear()
        return model(x)


class OnlyOnce(Reversal):
    """Its second derivative is an error."""

    function = function(forward=view, backward=once_differentiable(lambda ctx, g: (-ctx.alpha * g, None)))
    arguments = (1.0,)


class OnlyWithoutGradMode(Reversal):
    function = function(
        forward=view,
        backward=lambda ctx, g: (g * (ctx.alpha if torch.is_grad_enabled() else -ctx.alpha), None),
    )
    arguments = (1.0,)


class WithoutMaterializedGradients(Reversal):
    def forward(ctx, x, alpha):
        ctx.set_materialize_grads(False)
        ctx.alpha = alpha
        return x.view_as(x)

    function = function(
        forward=forward, backward=lambda ctx, g: (None if g is None else -ctx.alpha * g, None)
    )
    arguments = (1.0,)


class NotDifferentiable(Reversal):
    def forward(ctx, x, alpha):
        y = x.clone()
        ctx.mark_non_differentiable(y)
        ctx.alpha = alpha
        return y

    function = function(forward=forward, backward=negated)
    arguments = (1.0,)


class Dirty(Reversal):
    def forward(ctx, x, alpha):
        ctx.alpha = alpha
        ctx.mark_dirty(x)
        return x

    function = function(forward=forward, backward=negated)
    arguments = (1.0,)


class AsksWhoNeedsIt(Reversal):
    function = function(
        forward=view, backward=lambda ctx, g: (-g * ctx.alpha if ctx.needs_input_grad[0] else None, None)
    )
    arguments = (1.0,)


# -- the forward is more than a view -------------------------------------------------------------------------


def forward_of(result):
    def forward(ctx, x, alpha):
        ctx.alpha = alpha
        return result(x)

    return function(forward=forward, backward=negated)


def _forward(name, result, scale=1.0, **more):
    namespace = {"function": forward_of(result), "arguments": (0.5,), "__module__": __name__}
    namespace["inputs"] = lambda self: [(rows(scale=scale),), (rows(9, scale=scale),)]
    return type(name, (Reversal,), namespace | more)


FORWARDS = [
    _forward("ClampsTheForward", lambda x: x.clamp(-100, 100), scale=1e4),
    _forward("ReplacesNaNForward", lambda x: torch.nan_to_num(x, posinf=7.0), scale=1e400),
    _forward("ReluForward", lambda x: x.relu()),
    _forward("TimesOnePlusTiny", lambda x: x * (1 + 1e-15), tolerance=0.0),
    _forward("Doubles", lambda x: 2 * x),
    _forward("Flattens", lambda x: x.view(-1)[: x.shape[1]].view(1, -1)),
    _forward("Transposed", lambda x: x.t().contiguous().t()),
    _forward("FirstRows", lambda x: x[:8]),
    _forward("ToFloat", lambda x: x.float().double()),
    _forward("Detaches", lambda x: x.detach()),
    _forward("Ones", lambda x: torch.ones_like(x)),
    _forward("PlusZero", lambda x: x + 0),
    _forward("Contiguous", lambda x: x.contiguous()),
    _forward("AsATuple", lambda x: (x.view_as(x),)),
]
globals().update({case.__name__: case for case in FORWARDS})


class ChecksTheForward(Reversal):
    def forward(ctx, x, alpha):
        if torch.isinf(x).any():
            raise ValueError("features are infinite")
        ctx.alpha = alpha
        return x.view_as(x)

    function = function(forward=forward, backward=negated)
    arguments = (0.5,)

    def inputs(self):
        return [(rows(),), (rows(scale=1e400),)]


class ScalesByGlobals(Reversal):
    function = function(forward=view, backward=lambda ctx, g: (-g * SCALE, None))
    arguments = (0.5,)

    def everywhere(self, monkeypatch):
        monkeypatch.setitem(globals(), "SCALE", 4.0)


SCALE = 1.0


class OfItsFunctionAttribute(Reversal):
    def backward(ctx, g):
        return -g * OfItsFunctionAttribute.function.backward.scale, None

    function = function(forward=view, backward=backward)
    arguments = (0.5,)

    def prepare(self, model):
        self.function.backward.scale = 1.0

    def everywhere(self, monkeypatch):
        monkeypatch.setattr(self.function.backward, "scale", 5.0)


class UnderAutocast(Reversal):
    function = function(
        forward=torch.amp.custom_fwd(view, device_type="cpu", cast_inputs=torch.float32),
        backward=torch.amp.custom_bwd(negated, device_type="cpu"),
    )
    arguments = (0.5,)
    second = False
    tolerance = 1e-2

    def around(self):
        return torch.autocast("cpu", torch.bfloat16)


class Decorated(Reversal):
    def loud(f):
        @functools.wraps(f)
        def wrapper(*args):
            print(f.__name__)
            return f(*args)

        return wrapper

    function = function(forward=loud(view), backward=loud(negated))
    arguments = (0.5,)


# -- classes beside the usual ones ---------------------------------------------------------------------------


class OverridesApply(Reversal):
    class Own(Function):
        forward, backward = staticmethod(view), staticmethod(negated)

        @classmethod
        def apply(cls, x, alpha):
            return super().apply(x, alpha * 3)

    function = Own
    arguments = (0.5,)


class OfAMetaclass(Reversal):
    class Meta(type(Function)):
        def apply(cls, x, alpha):
            return Reverse.apply(x, 4 * alpha)

    function = Meta("Own", (Function,), {"forward": staticmethod(view), "backward": staticmethod(negated)})
    arguments = (0.5,)


class OverriddenBackward(Reversal):
    function = function(Reverse, backward=lambda ctx, g: (g * ctx.alpha, None))
    arguments = (0.5,)


class OverriddenForward(Reversal):
    def forward(ctx, x, alpha):
        ctx.alpha = alpha / 2
        return x.view_as(x)

    function = function(Reverse, forward=forward)
    arguments = (0.5,)


class InheritsAll(Reversal):
    served = True
    function = function(Reverse)
    arguments = (0.5,)


class CallsItsBase(Reversal):
    function = function(Reverse, forward=lambda ctx, x, a: Reverse.forward(ctx, x, a + 1))
    arguments = (0.5,)


class TwoTensors(Reversal):
    function = function(
        forward=lambda ctx, x, y: (x.view_as(x), y.view_as(y)), backward=lambda ctx, g, h: (-g, -h)
    )

    def build(self):
        model = super().build()
        both = self.function

        class Both(type(model)):
            def forward(self, x):
                h = self.before(x)
                a, b = both.apply(h, 2 * h)
                return self.after(a + b)

        model.__class__ = Both
        return model


class WithSetupContext(Reversal):
    served = True

    def setup_context(ctx, inputs, output):
        _, ctx.alpha = inputs

    function = function(forward=lambda x, a=0.3: x.clone(), setup_context=setup_context, backward=negated)
    arguments = (0.5,)


class SetupContextScalesAgain(Reversal):
    served = True

    def setup_context(ctx, inputs, output):
        ctx.alpha = inputs[1] * 2

    function = function(forward=lambda x, a: x.view_as(x), setup_context=setup_context, backward=negated)
    arguments = (0.5,)


class BackwardExchangedLater(Reversal):
    served = True

    class Own(Function):
        forward, backward = staticmethod(view), staticmethod(negated)

    function = Own
    arguments = (0.5,)
    undoes = False

    def everywhere(self, monkeypatch):
        monkeypatch.setattr(self.Own, "backward", staticmethod(lambda ctx, g: (g * 3, None)))


class ForwardExchangedLater(BackwardExchangedLater):
    undoes = True

    def everywhere(self, monkeypatch):
        monkeypatch.setattr(
            self.Own, "forward", staticmethod(lambda ctx, x, a: (view(ctx, x, 7 * a), x * 2)[1])
        )


class CodeExchangedLater(Reversal):
    """As IPython's autoreload does to a function that it holds."""

    def backward(ctx, g):
        return -g * ctx.alpha, None

    function = function(forward=view, backward=backward)
    arguments = (0.5,)

    def everywhere(self, monkeypatch):
        monkeypatch.setattr(
            vars(CodeExchangedLater)["backward"], "__code__", (lambda ctx, g: (g * 5, None)).__code__
        )


class ApplyExchangedLater(BackwardExchangedLater):
    undoes = True

    def everywhere(self, monkeypatch):
        monkeypatch.setattr(self.Own, "apply", lambda x, alpha: Copying.apply(x, 9.0))


@pytest.mark.parametrize(("case", "place"), in_places(globals()), ids=lambda v: getattr(v, "__name__", v))
def test_a_function_does_what_its_author_wrote(case, place, monkeypatch):
    check(case(), monkeypatch, place=place)
