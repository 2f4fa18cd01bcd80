"""Where a module may have a gradient reversal from: names, attributes, functions, containers."""

import functools
import types

import pytest
import torch
from torch import nn

import fastda
from tests.optimize.cases import (
    Case,
    Copying,
    Function,
    Reverse,
    cases,
    rows,
)
from tests.optimize.checking import check, served


class HelperOnTheFunction(Function):
    """CuthbertCai/pytorch_DANN: called as GradReverse.grad_reverse(x, constant)."""

    @staticmethod
    def forward(ctx, x, constant):
        ctx.constant = constant
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output.neg() * ctx.constant, None

    def grad_reverse(x, constant):
        return HelperOnTheFunction.apply(x, constant)


class _Reference(Case):
    why = r"gradient|reversal|scale|forward|backward|refer|name"
    why_not = None  # it cannot be here

    def inputs(self):
        return [(rows(),), (rows(1),)]


class ByItsHelper(_Reference):
    served = True

    def build(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Linear(6, 3)

            def forward(self, x):
                return HelperOnTheFunction.grad_reverse(self.first(x), 0.4)

        return Model()


class _Held(_Reference):
    """The Function held by an attribute of other types than a Function."""

    def build(self):
        class Model(nn.Module):
            def __init__(self, held):
                super().__init__()
                self.first, self.held = nn.Linear(6, 3), held

        Model.forward = type(self).forward
        return Model(self.hold())


class ALambda(_Held):
    served = True

    def hold(self):
        return lambda x: Reverse.apply(x, 0.4)

    def forward(self, x):
        return self.held(self.first(x))


def takes_keywords():
    """Whether a Function's apply does, as torch 2.11's does not yet."""
    try:
        Copying.apply(torch.ones(1), coeff=0.4)
    except TypeError:
        return False
    return True


class APartial(ALambda):
    why_not = None if takes_keywords() else "a Function of this torch is called without keywords"

    def hold(self):
        return functools.partial(Copying.apply, coeff=0.4)


class APartialOfAFunction(ALambda):
    def hold(self):
        return functools.partial(lambda alpha, x: Reverse.apply(x, alpha), 0.4)


class AList(_Held):
    served = True

    def hold(self):
        return [Reverse, Copying]

    def forward(self, x):
        return self.held[1].apply(self.held[0].apply(self.first(x), 0.3), 0.2)


class ADict(_Held):
    served = True

    def hold(self):
        return {"grl": Reverse.apply}

    def forward(self, x):
        return self.held["grl"](self.first(x), 0.3)


class ByStaticMethod(_Held):
    def hold(self):
        class GRL:
            apply = staticmethod(lambda x, a: Reverse.apply(x, a))

        return GRL

    def forward(self, x):
        return self.held.apply(self.first(x), 0.3)


class _FromInit(_Reference):
    """Its `__init__` names the Function; the object that the call uses has been made."""

    def build(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Linear(6, 3)
                self.a_lambda = lambda x: Reverse.apply(x, 0.4)
                self.a_partial = functools.partial(Copying.apply)
                self.a_list = [Reverse.apply, Copying]

        Model.forward = type(self).forward
        return Model()


class ALambdaFromInit(_FromInit):
    def forward(self, x):
        return self.a_lambda(self.first(x))


class APartialFromInit(_FromInit):
    def forward(self, x):
        return self.a_partial(self.first(x), 0.3)


class AListFromInit(_FromInit):
    def forward(self, x):
        return self.a_list[0](self.first(x), 0.3)


layers = types.ModuleType("layers")
layers.GRL = Reverse


class OfAModule(_Held):
    """`layers.GRL.apply(x, alpha)` behind `import layers`."""

    def hold(self):
        return None

    def forward(self, x):
        return layers.GRL.apply(self.first(x), 0.3)


class OfAModuleExchangedLater(OfAModule):
    def everywhere(self, monkeypatch):
        monkeypatch.setattr(layers, "GRL", Copying)


class ComparedByIdentity(_Held):
    """Whoever looks at the attribute finds what was put there."""

    def hold(self):
        return Reverse

    def forward(self, x):
        assert self.held is Reverse and issubclass(self.held, Function)
        return self.held.apply(self.first(x), 0.3)


class AsADefaultArgument(_Held):
    def hold(self):
        return None

    def forward(self, x, reverse=Reverse.apply):
        return reverse(self.first(x), 0.3)


class ByGlobals(_Held):
    why = None  # nothing names it

    def hold(self):
        return "Reverse"

    def forward(self, x):
        return globals()[self.held].apply(self.first(x), 0.3)


class AStaticMethodOfTheModule(_Held):
    served = True

    def hold(self):
        return None

    def build(self):
        model = super().build()
        type(model).reverse = staticmethod(lambda x, alpha=0.1: Reverse.apply(x, alpha))
        return model

    def forward(self, x):
        return self.reverse(self.first(x)) + type(self).reverse(self.first(x), 0.4)


class AClassMethodOfTheModule(_Held):
    served = True

    def hold(self):
        return None

    def build(self):
        model = super().build()
        type(model).scale = 0.5
        type(model).reverse = classmethod(lambda cls, x: Reverse.apply(x, cls.scale))
        return model

    def change(self, model):
        model.scale = 7.0  # which the class method does not see

    def forward(self, x):
        return self.reverse(self.first(x))


class AProperty(_Held):
    served = True

    def hold(self):
        return 0.5

    def build(self):
        model = super().build()
        type(model).scale = property(lambda self: 2 * self.held)
        return model

    def change(self, model):
        model.held = 3.0

    def forward(self, x):
        return Reverse.apply(self.first(x), self.scale)


@pytest.mark.parametrize(
    "case", [c for c in cases(globals()) if issubclass(c, _Reference)], ids=lambda c: c.__name__
)
def test_however_a_module_refers_to_it(case, monkeypatch):
    if case.why_not:
        pytest.skip(case.why_not)
    check(case(), monkeypatch)


@pytest.mark.parametrize(
    "case", [ALambdaFromInit, APartialFromInit, AListFromInit, AList, ADict], ids=lambda c: c.__name__
)
def test_what_is_reported_replaced_is_served(case):
    model = case().made()
    report = fastda.optimize(model)
    model(rows()).sum().backward()
    assert len(report.replaced) > 0
    assert all(calls.served == calls.total for calls in report.calls().values())
    assert served(report) > 0
    report.undo()


def test_other_layers_are_no_reversal():
    report = fastda.optimize(nn.Sequential(nn.Linear(6, 4), nn.ReLU()))
    assert not report.replaced
    assert not report.left
