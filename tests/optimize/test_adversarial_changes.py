"""Forwards, classes, functions and layers that are exchanged after fastda.optimize."""

import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.optimize.cases import (
    MODELS,
    Apart,
    Block,
    Change,
    cases,
    convolutions,
    first,
    replace,
)
from tests.optimize.checking import check

# -- forwards patched on an instance -------------------------------------------------------------------------


class ForwardOfTheModel(Change):
    """As Accelerate does it."""

    def change(self, model):
        model._old_forward = old = model.forward

        @functools.wraps(old)
        def new_forward(*args, **kwargs):
            return 2 * old(*args, **kwargs)

        model.forward = new_forward


class ForwardOfAConvolution(Change):
    def change(self, model):
        ForwardOfTheModel.change(self, first(model))


class ForwardOfTheLastConvolution(Change):
    def change(self, model):
        ForwardOfTheModel.change(self, convolutions(model)[-1])


class ForwardAsABoundMethod(Change):
    def change(self, model):
        def forward(self, input):
            return F.conv2d(input, self.weight, self.bias, padding=self.padding) + 1

        first(model).forward = types.MethodType(forward, first(model))


class ConvForwardOfAConvolution(Change):
    """What `_conv_forward` is patched for: weights that are standardised or fake-quantised."""

    undoes = False

    def change(self, model):
        conv = first(model)
        old = conv._conv_forward
        conv._conv_forward = lambda x, weight, bias: old(
            x, weight - weight.mean((1, 2, 3), keepdim=True), bias
        )


class ForwardOfAReLU(Change):
    models = ("block", "single layers", "chain", "blocks in a chain")

    def change(self, model):
        relus = [m for m in model.modules() if isinstance(m, nn.ReLU)]
        relus[0].forward = lambda x: F.leaky_relu(x, 0.3)


class ForwardOfASequential(Change):
    models = ("block", "chain", "blocks in a chain")

    def change(self, model):
        sequential = [m for m in model.modules() if isinstance(m, nn.Sequential)][-1]
        old = sequential.forward
        sequential.forward = lambda x: old(x) + 1


class CallOfAConvolution(Change):
    """An attribute that only an instance that is called by hand would see: nothing changes."""

    def change(self, model):
        first(model).__dict__["__call__"] = lambda x: x


class AMethodOfTheModel(Change):
    models = ("single layers",)

    def change(self, model):
        old = model.inner
        model.inner = lambda x: 3 * old(x)


# -- classes patched -----------------------------------------------------------------------------------------


def _patched(name, cls, method, wrap, models=("block", "chain")):
    def everywhere(self, monkeypatch):
        monkeypatch.setattr(cls, method, wrap(getattr(cls, method)))

    return type(name, (Change,), {"everywhere": everywhere, "models": models, "__module__": __name__})


def plus_one(old):
    return lambda self, *args: old(self, *args) + 1


PATCHES = [
    _patched("ForwardOfBlock", Block, "forward", plus_one, ("block", "blocks in a chain")),
    _patched("ForwardOfApart", Apart, "forward", plus_one, ("single layers", "blocks in a chain")),
    _patched("InnerOfApart", Apart, "inner", plus_one, ("single layers", "blocks in a chain")),
    _patched("ForwardOfConv2d", nn.Conv2d, "forward", plus_one),
    _patched("ConvForwardOfConv2d", nn.Conv2d, "_conv_forward", plus_one),
    _patched("ForwardOfReLU", nn.ReLU, "forward", plus_one, ForwardOfAReLU.models),
    _patched("ForwardOfSequential", nn.Sequential, "forward", plus_one, ForwardOfASequential.models),
    _patched("CallOfModule", nn.Module, "__call__", plus_one),
    _patched("CallImplOfModule", nn.Module, "_call_impl", plus_one),
    _patched("CallOfReLU", nn.ReLU, "__call__", plus_one, ForwardOfAReLU.models),
    _patched("CallOfConv2d", nn.Conv2d, "__call__", plus_one),
]
globals().update({case.__name__: case for case in PATCHES})


# -- functions patched ---------------------------------------------------------------------------------------


def _function(name, module, function, models=("block", "chain")):
    def everywhere(self, monkeypatch):
        old = getattr(module, function)

        def patched(*args, **kwargs):
            print(function)
            y = old(*args, **kwargs)
            return y if y.dim() == 0 else y + 1

        monkeypatch.setattr(module, function, patched)

    return type(name, (Change,), {"everywhere": everywhere, "models": models, "__module__": __name__})


FUNCTIONS = [
    _function("FunctionalRelu", F, "relu"),
    _function("TorchRelu", torch, "relu"),
    _function("FunctionalConv2d", F, "conv2d"),
    _function("TorchAdd", torch, "add"),
    _function("FunctionalPad", F, "pad"),
]
globals().update({case.__name__: case for case in FUNCTIONS})


class PadBesidesAConvolutionThatPadsNothing(Change):
    """torch pads nothing there, so that nobody may see a call of F.pad."""

    models = ("valid",)
    everywhere = vars(FUNCTIONS[-1])["everywhere"]


class AddOfTensors(Change):
    models = ("block", "single layers", "functions")

    def everywhere(self, monkeypatch):
        old = torch.Tensor.__add__
        monkeypatch.setattr(torch.Tensor, "__add__", lambda a, b: torch.sub(old(a, b), 1.0))


# -- layers exchanged ----------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """A low-rank adapter around a convolution, as PEFT writes it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        torch.manual_seed(1)
        self.lora_A = nn.Conv2d(base.in_channels, 2, base.kernel_size, padding=base.padding, bias=False)
        self.lora_B = nn.Conv2d(2, base.out_channels, 1, bias=False)
        self.to(base.weight)

    def forward(self, x):
        return self.base_layer(x) + 0.5 * self.lora_B(self.lora_A(x))


class AnAdapter(Change):
    def change(self, model):
        replace(model, first(model), LoRA(first(model)))


class AdaptersOfAll(Change):
    def change(self, model):
        for conv in convolutions(model):
            replace(model, conv, LoRA(conv))


class ASubclass(Change):
    def change(self, model):
        class Standardised(nn.Conv2d):
            def forward(self, x):
                return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=self.padding)

        first(model).__class__ = Standardised


class AnotherLayer(Change):
    def change(self, model):
        torch.manual_seed(2)
        replace(model, first(model), nn.Conv2d(4, 4, 5, padding=2).double())


class AnotherActivation(Change):
    models = ForwardOfAReLU.models

    def change(self, model):
        replace(model, next(m for m in model.modules() if isinstance(m, nn.ReLU)), nn.ELU())


class AppendedInside(Change):
    models = ("block", "chain")

    def change(self, model):
        getattr(model, "convs", model).append(nn.Tanh())


class InsertedInside(Change):
    models = ("block", "chain")

    def change(self, model):
        getattr(model, "convs", model).insert(1, nn.Tanh())


class DeletedInside(Change):
    models = ("block", "chain")

    def change(self, model):
        del getattr(model, "convs", model)[1]


class SharedAfterwards(Change):
    """Both convolutions become one."""

    def change(self, model):
        replace(model, convolutions(model)[1], first(model))


class AppendedToAList(Change):
    models = ("block",)

    def build(self):
        class Listed(nn.Module):
            def __init__(self):
                super().__init__()
                layers = [nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)]
                self.layers = nn.ModuleList(layers)

            def forward(self, x):
                y = x
                for layer in self.layers:
                    y = layer(y)
                return F.relu(y + x)

        return Listed()

    def change(self, model):
        model.layers.append(nn.Tanh())


class AddedBesides(Change):
    """A submodule that nothing calls."""

    def change(self, model):
        model.add_module("extra", nn.Identity())


CHANGES = [c for c in cases(globals()) if issubclass(c, Change)]


@pytest.mark.parametrize(
    ("case", "name"), [(c, n) for c in CHANGES for n in c.models], ids=lambda v: getattr(v, "__name__", v)
)
def test_what_changes_later_counts(case, name, monkeypatch):
    check(case(), monkeypatch, make=MODELS[name])
