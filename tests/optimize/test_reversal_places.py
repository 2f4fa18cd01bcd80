"""Reversing Functions wherever code refers to them, those of other packages too."""

import functools
import importlib
import importlib.metadata
import types

import pytest
import torch
from torch import nn
from torch.autograd import Function

import fastda
from tests.optimize.helpers import served
from tests.optimize.reversing import function, neg_times

pytestmark = pytest.mark.isa_independent


class ReverseLayerF(Function):
    @staticmethod
    def forward(ctx, x, alpha):
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_output):
        output = grad_output.neg() * ctx.alpha
        return output, None

    @staticmethod
    def reverse(x, alpha):
        return ReverseLayerF.apply(x, alpha)


class Derived(ReverseLayerF):
    pass


taken_before = ReverseLayerF.apply
elsewhere = types.ModuleType("functions")
elsewhere.GRL = ReverseLayerF


def reverse(x, alpha=1.0):
    return ReverseLayerF.apply(x, alpha)


class InForward(nn.Module):
    def forward(self, x):
        return ReverseLayerF.apply(x, 0.5)


class AppliesGlobal(nn.Module):
    def forward(self, x):
        return taken_before(x, 0.5)


class CallsFunction(nn.Module):
    def forward(self, x):
        return reverse(x, 0.5)


class CallsHelper(nn.Module):
    def forward(self, x):
        return ReverseLayerF.reverse(x, 0.5)


class OfAModule(nn.Module):
    def forward(self, x):
        return elsewhere.GRL.apply(x, 0.5)


class OfAStaticMethod(nn.Module):
    @staticmethod
    def reversed(x):
        return Derived.apply(x, 0.5)

    def forward(self, x):
        return self.reversed(x)


class Holder:
    apply = staticmethod(lambda x, s: ReverseLayerF.apply(x, s))


class OfAHolder(nn.Module):
    def __init__(self):
        super().__init__()
        self.grl = Holder

    def forward(self, x):
        return self.grl.apply(x, 0.5)


class InABase(InForward):
    def forward(self, x):
        return super().forward(x)


class AsAttribute(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        value = self.value[0] if isinstance(self.value, list) else self.value
        return value(x, 0.5)


def in_a_closure():
    local = function(neg_times)

    class Model(nn.Module):
        def forward(self, x):
            return local.apply(x, 0.5)

    return Model()


PLACES = {
    **{
        c.__name__: c
        for c in (InForward, AppliesGlobal, CallsFunction, CallsHelper, OfAModule, OfAStaticMethod)
    },
    "in a base class": InABase,
    "in a class that is an attribute": OfAHolder,
    "in a closure": in_a_closure,
    "attribute": lambda: AsAttribute(ReverseLayerF.apply),
    "lambda": lambda: AsAttribute(lambda x, s: ReverseLayerF.apply(x, s)),
    "partial": lambda: AsAttribute(functools.partial(reverse)),
    "list": lambda: AsAttribute([ReverseLayerF.apply]),
}


@pytest.mark.parametrize("make", PLACES.values(), ids=PLACES.keys())
def test_reversals_are_found_wherever_the_code_refers_to_them(make):
    model = make()
    report = fastda.optimize(model)
    assert [e.path for e in report.replaced] == [""]
    x = torch.ones(3, requires_grad=True)
    model(x).sum().backward()
    assert torch.equal(x.grad, -0.5 * torch.ones(3))
    assert served(report) == 1
    report.undo()
    assert vars(ReverseLayerF)["backward"].__func__.__name__ == "backward"
    assert not hasattr(ReverseLayerF.backward, "reversal")


def test_two_models_share_a_function_until_both_are_undone():
    first, second = fastda.optimize(InForward()), fastda.optimize(CallsHelper())
    first.undo()
    assert hasattr(ReverseLayerF.backward, "reversal")
    second.undo()
    assert not hasattr(ReverseLayerF.backward, "reversal")


def test_nothing_is_written_into_the_authors_module():
    before = dict(globals())
    report = fastda.optimize(nn.ModuleList([InForward(), OfAModule()]))
    assert globals() == before
    report.undo()


def test_pytorch_revgrad():
    peer = pytest.importorskip("pytorch_revgrad", reason="pytorch-revgrad is not installed")
    model = nn.Sequential(nn.Linear(6, 5), peer.RevGrad(alpha=0.7), nn.Linear(5, 1))
    x = torch.randn(4, 6)

    def grads():
        return torch.autograd.grad(model(x).sum(), list(model.parameters()))

    expected = grads()
    report = fastda.optimize(model)
    assert [(e.path, e.type) for e in report.replaced] == [("1", "RevGrad")]
    assert all(map(torch.equal, grads(), expected))
    assert served(report) == 1
    report.undo()


def test_pytorch_adapt_makes_one_pass_already():
    pytest.importorskip("pytorch_adapt", reason="pytorch-adapt is not installed")
    layers = importlib.import_module("pytorch_adapt.layers")
    report = fastda.optimize(layers.GradientReversal())
    assert not report.replaced
    assert "makes one pass over the gradient already" in report.left[0].what


def test_skada_in_its_own_dann():
    skada = pytest.importorskip("skada.deep", reason="skada and skorch are not installed")
    modules = importlib.import_module("skada.deep.modules")

    def train(optimized):
        torch.manual_seed(0)
        network = modules.ToyModule2D(num_features=8, proba=True)
        options = {"max_epochs": 3, "verbose": 0, "batch_size": 16, "train_split": None}
        net = skada.DANN(network, layer_name="dropout", num_features=8, **options)
        net.initialize()
        report = fastda.optimize(net.module_) if optimized else None
        x, domains = torch.randn(64, 2).numpy(), torch.tensor([1, -2]).repeat(32).numpy()
        y = torch.randint(2, (64,)).where(torch.tensor(domains) > 0, -1).numpy()
        net.partial_fit({"X": x, "sample_domain": domains}, y)
        if report:
            assert [e.type for e in report.replaced] == ["DomainClassifier"]
            assert served(report) > 0
            report.undo()
        return net.history[:, "train_loss"]

    assert train(True) == train(False)
