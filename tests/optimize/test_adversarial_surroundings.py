"""What stands before, behind and around a gradient reversal: in-place layers, modes, hooks, checkpoints."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.optimize.cases import (
    F64,
    Case,
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


class _Behind(Reversal):
    """An operation in place on what the reversal returned."""

    function, arguments = Copying, (0.5,)

    def after(self):
        return nn.Sequential(self.layer(), nn.Linear(5, 2))


class InPlaceReluBehindACopy(_Behind):
    served = True

    def layer(self):
        return nn.ReLU(inplace=True)


class InPlaceDropoutBehindACopy(_Behind):
    def layer(self):
        return nn.Dropout(0.5, inplace=True)


class InPlaceLeakyReluBehindAView(_Behind):
    function = Reverse

    def layer(self):
        return nn.LeakyReLU(0.1, inplace=True)


class InPlaceHardtanhBehindItself(InPlaceLeakyReluBehindAView):
    function = function(forward=lambda ctx, x, a: (view(ctx, x, a), x)[1], backward=negated)


class _ScaleTensor(Reversal):
    """A scale that is a tensor and changes between forward and backward."""

    scale = torch.tensor(0.5, dtype=F64)
    arguments = (scale,)
    second = False

    def call(self, model, x):
        self.scale.fill_(0.5)
        y = model(x)
        self.scale.fill_(4.0)
        return y


class KeptScaleChangedBeforeBackward(_ScaleTensor):
    served = True
    function = Reverse


class SavedScaleChangedBeforeBackward(_ScaleTensor):
    function = function(
        forward=lambda ctx, x, a: (ctx.save_for_backward(a), x.view_as(x))[1],
        backward=lambda ctx, g: (-g * ctx.saved_tensors[0], None),
    )


class NoGradMode(Reversal):
    served = True
    function, arguments = Copying, (0.5,)

    def before(self, model):
        return [(rows(),)]

    def around(self):
        return torch.no_grad()


class InferenceMode(NoGradMode):
    def around(self):
        return torch.inference_mode()


class Anomalies(NoGradMode):
    def around(self):
        return torch.autograd.set_detect_anomaly(True, check_nan=False)


class SavedTensorHooks(NoGradMode):
    """Every tensor that is saved is printed."""

    def around(self):
        def pack(t):
            print(f"saved {tuple(t.shape)}")
            return t.half()

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.double())


class SavedScale(Function):
    @staticmethod
    def forward(ctx, x, alpha):
        ctx.save_for_backward(alpha)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        (alpha,) = ctx.saved_tensors
        return grad.neg() * alpha, None


class _SavedAndCheckpointed(Reversal):
    """There a saved tensor can be read once."""

    function = SavedScale
    second = False

    def call(self, model, x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)


class OneNumberSavedAndCheckpointed(_SavedAndCheckpointed):
    served = True
    arguments = (torch.tensor(0.3, dtype=F64),)


class AColumnSavedAndCheckpointed(_SavedAndCheckpointed):
    arguments = (torch.tensor([0.5, 1.0, 2.0, -1.0, 0.0], dtype=F64),)


class AnIntegerSavedAndCheckpointed(_SavedAndCheckpointed):
    arguments = (torch.tensor(2),)


class Checkpointed(NoGradMode):
    def around(self):
        return contextlib.nullcontext()

    def call(self, model, x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)


class IntegerFeatures(Case):
    """Nothing to reverse: what passes is the author's."""

    def build(self):
        class Model(nn.Module):
            def forward(self, x):
                return Copying.apply(x, 1.0), F.relu(Copying.apply(x.double(), 2.0))

        return Model()

    def inputs(self):
        return [(torch.arange(6),), (torch.eye(3),)]


class Leaves(Case):
    """Straight on an input: what comes back is no leaf, and shares its memory or does not, as before."""

    def build(self):
        class Model(nn.Module):
            def forward(self, x):
                return Copying.apply(x, 1.0), Reverse.apply(x, 2.0)

        return Model()

    def inputs(self):
        return [(rows(),), (rows().detach(),), (rows(6, 4).detach().t().requires_grad_(),)]


@pytest.mark.parametrize(("case", "place"), in_places(globals()), ids=lambda v: getattr(v, "__name__", v))
def test_what_is_around_a_reversal_sees_no_difference(case, place, monkeypatch):
    check(case(), monkeypatch, place=place)


@pytest.mark.parametrize("case", [IntegerFeatures, Leaves], ids=lambda c: c.__name__)
def test_what_comes_back_is_what_came_back(case, monkeypatch):
    check(case(), monkeypatch)
