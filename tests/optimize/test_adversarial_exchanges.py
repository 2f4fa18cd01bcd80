"""What changes in a loss or around a reversal after fastda.optimize."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.optimize.cases import (
    F64,
    Case,
    Copying,
    GANLoss,
    cases,
    maps,
)
from tests.optimize.checking import check


class _LossChange(Case):
    served = True

    def build(self):
        return GANLoss("vanilla")

    def inputs(self):
        return [(maps(3, 1), True), (maps(1, 1, 4, 4), False)]


class LabelByData(_LossChange):
    def change(self, loss):
        loss.real_label.data.fill_(0.7)


class LabelByNumpy(_LossChange):
    def change(self, loss):
        loss.fake_label.numpy()[...] = 0.4


class LabelExchanged(_LossChange):
    def change(self, loss):
        loss.real_label = torch.tensor(0.3, dtype=F64)


class ModeExchanged(_LossChange):
    def change(self, loss):
        loss.gan_mode = "wgangp"


class InnerLossExchanged(_LossChange):
    def change(self, loss):
        loss.loss = nn.L1Loss()


class InnerReduction(_LossChange):
    def change(self, loss):
        loss.loss.reduction = "sum"


class InnerForwardPatched(_LossChange):
    undoes = False

    def change(self, loss):
        loss.loss.forward = lambda a, b: F.l1_loss(a, b)


class TargetMethodPatched(_LossChange):
    def change(self, loss):
        loss.get_target_tensor = lambda prediction, real: torch.full_like(prediction, 0.5)


class TargetMethodOfItsClassPatched(_LossChange):
    def everywhere(self, monkeypatch):
        monkeypatch.setattr(
            GANLoss, "get_target_tensor", lambda self, prediction, real: torch.full_like(prediction, 0.5)
        )


class ForwardOfItsClassPatched(_LossChange):
    def everywhere(self, monkeypatch):
        old = GANLoss.forward
        monkeypatch.setattr(GANLoss, "forward", lambda self, *args: 2 * old(self, *args))


class LossPatched(_LossChange):
    def everywhere(self, monkeypatch):
        monkeypatch.setattr(nn.BCEWithLogitsLoss, "forward", lambda self, a, b: F.l1_loss(a, b))


class FunctionalLossPatched(_LossChange):
    def everywhere(self, monkeypatch):
        monkeypatch.setattr(F, "binary_cross_entropy_with_logits", lambda a, b, *_, **__: F.l1_loss(a, b))


class InnerHook(_LossChange):
    def change(self, loss):
        loss.loss.register_forward_hook(lambda module, inputs, y: y + 1)


class GlobalHookOnALoss(_LossChange):
    @contextlib.contextmanager
    def around(self):
        handle = nn.modules.module.register_module_forward_hook(lambda m, inputs, y: y * 2)
        try:
            yield
        finally:
            handle.remove()


class Reversing(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.coeff = nn.Conv2d(4, 4, 1), 0.4

    def forward(self, x):
        return Copying.apply(self.conv(x), self.coeff)


class _ReversalChange(Case):
    served = True

    def build(self):
        return Reversing()

    def inputs(self):
        return [(maps(),)]


class ItsScale(_ReversalChange):
    def change(self, model):
        model.coeff = -1.5


class ItsForward(_ReversalChange):
    def change(self, model):
        old = model.forward
        model.forward = lambda x: 2 * old(x)


class ItsClass(_ReversalChange):
    def everywhere(self, monkeypatch):
        monkeypatch.setattr(Reversing, "forward", lambda self, x: Copying.apply(x, 3.0))


class ItsName(_ReversalChange):
    """The name leads to something else."""

    def everywhere(self, monkeypatch):
        class Identity:
            apply = staticmethod(lambda x, coeff: x * coeff)

        monkeypatch.setitem(globals(), "Copying", Identity)


class ItsBackward(_ReversalChange):
    undoes = False

    def everywhere(self, monkeypatch):
        monkeypatch.setattr(Copying, "backward", staticmethod(lambda ctx, g: (g, None)))


class ItsDefault(_ReversalChange):
    def everywhere(self, monkeypatch):
        monkeypatch.setattr(Copying.forward, "__defaults__", (5.0,))

    def build(self):
        class Default(Reversing):
            def forward(self, x):
                return Copying.apply(self.conv(x))

        return Default()


OTHERS = [c for c in cases(globals()) if issubclass(c, (_LossChange, _ReversalChange))]


@pytest.mark.parametrize("case", OTHERS, ids=lambda c: c.__name__)
def test_what_changes_in_a_loss_or_a_reversal_counts(case, monkeypatch):
    check(case(), monkeypatch)
