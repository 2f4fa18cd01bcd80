"""What changes after fastda.optimize: forwards, layers, hooks, modes, settings, parametrisations."""

import contextlib
import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.optimize.cases import F64, Apart, Block, Case, Copying, Functional, GANLoss, cases, chain, maps
from tests.optimize.checking import check

MODELS = {
    "block": Block,
    "single layers": Apart,
    "functions": Functional,
    "chain": chain,
    "valid": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()),
    "blocks in a chain": lambda: nn.Sequential(Block(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), Apart()),
}


class _Change(Case):
    """Every model of the table is served before, and does what the changed original does afterwards."""

    served = True
    make = Block
    models = ("block", "chain")

    def build(self):
        return self.make()

    def inputs(self):
        return [(maps(),), (maps(1, 4, 6, 5),)]


def convolutions(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def first(model):
    return convolutions(model)[0]


def replace(model, old, new):
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


# -- forwards patched on an instance -------------------------------------------------------------------------


class ForwardOfTheModel(_Change):
    """As Accelerate does it."""

    def change(self, model):
        model._old_forward = old = model.forward

        @functools.wraps(old)
        def new_forward(*args, **kwargs):
            return 2 * old(*args, **kwargs)

        model.forward = new_forward


class ForwardOfAConvolution(_Change):
    def change(self, model):
        ForwardOfTheModel.change(self, first(model))


class ForwardOfTheLastConvolution(_Change):
    def change(self, model):
        ForwardOfTheModel.change(self, convolutions(model)[-1])


class ForwardAsABoundMethod(_Change):
    def change(self, model):
        def forward(self, input):
            return F.conv2d(input, self.weight, self.bias, padding=self.padding) + 1

        first(model).forward = types.MethodType(forward, first(model))


class ConvForwardOfAConvolution(_Change):
    """What `_conv_forward` is patched for: weights that are standardised or fake-quantised."""

    undoes = False

    def change(self, model):
        conv = first(model)
        old = conv._conv_forward
        conv._conv_forward = lambda x, weight, bias: old(
            x, weight - weight.mean((1, 2, 3), keepdim=True), bias
        )


class ForwardOfAReLU(_Change):
    models = ("block", "single layers", "chain", "blocks in a chain")

    def change(self, model):
        relus = [m for m in model.modules() if isinstance(m, nn.ReLU)]
        relus[0].forward = lambda x: F.leaky_relu(x, 0.3)


class ForwardOfASequential(_Change):
    models = ("block", "chain", "blocks in a chain")

    def change(self, model):
        sequential = [m for m in model.modules() if isinstance(m, nn.Sequential)][-1]
        old = sequential.forward
        sequential.forward = lambda x: old(x) + 1


class CallOfAConvolution(_Change):
    """An attribute that only an instance that is called by hand would see: nothing changes."""

    def change(self, model):
        first(model).__dict__["__call__"] = lambda x: x


class AMethodOfTheModel(_Change):
    models = ("single layers",)

    def change(self, model):
        old = model.inner
        model.inner = lambda x: 3 * old(x)


# -- classes patched -----------------------------------------------------------------------------------------


def _patched(name, cls, method, wrap, models=("block", "chain")):
    def everywhere(self, monkeypatch):
        monkeypatch.setattr(cls, method, wrap(getattr(cls, method)))

    return type(name, (_Change,), {"everywhere": everywhere, "models": models, "__module__": __name__})


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

    return type(name, (_Change,), {"everywhere": everywhere, "models": models, "__module__": __name__})


FUNCTIONS = [
    _function("FunctionalRelu", F, "relu"),
    _function("TorchRelu", torch, "relu"),
    _function("FunctionalConv2d", F, "conv2d"),
    _function("TorchAdd", torch, "add"),
    _function("FunctionalPad", F, "pad"),
]
globals().update({case.__name__: case for case in FUNCTIONS})


class PadBesidesAConvolutionThatPadsNothing(_Change):
    """torch pads nothing there, so that nobody may see a call of F.pad."""

    models = ("valid",)
    everywhere = vars(FUNCTIONS[-1])["everywhere"]


class AddOfTensors(_Change):
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


class AnAdapter(_Change):
    def change(self, model):
        replace(model, first(model), LoRA(first(model)))


class AdaptersOfAll(_Change):
    def change(self, model):
        for conv in convolutions(model):
            replace(model, conv, LoRA(conv))


class ASubclass(_Change):
    def change(self, model):
        class Standardised(nn.Conv2d):
            def forward(self, x):
                return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=self.padding)

        first(model).__class__ = Standardised


class AnotherLayer(_Change):
    def change(self, model):
        torch.manual_seed(2)
        replace(model, first(model), nn.Conv2d(4, 4, 5, padding=2).double())


class AnotherActivation(_Change):
    models = ForwardOfAReLU.models

    def change(self, model):
        replace(model, next(m for m in model.modules() if isinstance(m, nn.ReLU)), nn.ELU())


class AppendedInside(_Change):
    models = ("block", "chain")

    def change(self, model):
        getattr(model, "convs", model).append(nn.Tanh())


class InsertedInside(_Change):
    models = ("block", "chain")

    def change(self, model):
        getattr(model, "convs", model).insert(1, nn.Tanh())


class DeletedInside(_Change):
    models = ("block", "chain")

    def change(self, model):
        del getattr(model, "convs", model)[1]


class SharedAfterwards(_Change):
    """Both convolutions become one."""

    def change(self, model):
        replace(model, convolutions(model)[1], first(model))


class AppendedToAList(_Change):
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


class AddedBesides(_Change):
    """A submodule that nothing calls."""

    def change(self, model):
        model.add_module("extra", nn.Identity())


# -- parameters and settings ---------------------------------------------------------------------------------


class BiasAdded(_Change):
    models = ("chain",)

    def change(self, model):
        model[2].bias = nn.Parameter(torch.linspace(-1, 1, 4, dtype=F64))


class BiasRemoved(_Change):
    def change(self, model):
        first(model).bias = None


class AnotherKernel(_Change):
    """The convolution's setting stays, so that the maps shrink where a residual cannot follow."""

    def change(self, model):
        torch.manual_seed(3)
        first(model).weight = nn.Parameter(torch.randn(4, 4, 5, 5, dtype=F64))


class AnotherKernelAndPadding(_Change):
    def change(self, model):
        AnotherKernel.change(self, model)
        first(model).padding = (2, 2)


class FewerChannels(_Change):
    def change(self, model):
        a, b = convolutions(model)[:2]
        a.weight, b.weight = nn.Parameter(a.weight[:2].detach()), nn.Parameter(b.weight[:, :2].detach())
        if a.bias is not None:
            a.bias = nn.Parameter(a.bias[:2].detach())


class ASubclassOfTensorsAsWeight(_Change):
    def change(self, model):
        class Loud(nn.Parameter):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                if function.__name__ == "conv2d":
                    print("conv2d")
                return super().__torch_function__(function, types, args, kwargs or {})

        conv = first(model)
        conv.weight = Loud(conv.weight.detach())


class Loud(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        print(getattr(function, "__name__", function))
        return super().__torch_function__(function, types, args, kwargs or {})


class ASubclassOfTensorsAsInput(_Change):
    def call(self, model, x):
        y = model(x.as_subclass(Loud) if self.loud else x)
        return y.as_subclass(torch.Tensor), type(y)

    loud = False

    @contextlib.contextmanager
    def around(self):
        self.loud = True
        yield
        self.loud = False


def _setting(name, value):
    def change(self, model):
        setattr(first(model), name, value)

    return type(
        f"Setting{name.title().replace('_', '')}", (_Change,), {"change": change, "__module__": __name__}
    )


SETTINGS = [
    *(_setting("stride", (2, 2)), _setting("dilation", (2, 2)), _setting("groups", 2)),
    *(_setting("padding", (0, 0)), _setting("padding_mode", "reflect"), _setting("padding", "same")),
]
globals().update({f"{case.__name__}{i}": case for i, case in enumerate(SETTINGS)})


class PaddedOtherwise(_Change):
    """The private list that padding modes are served by."""

    def build(self):
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU())

    models = ("chain",)

    def change(self, model):
        model[0]._reversed_padding_repeated_twice = [1, 1, 2, 0]


class WeightOfAnotherDtype(_Change):
    def change(self, model):
        first(model).float()


class FrozenAndUnfrozen(_Change):
    def change(self, model):
        first(model).requires_grad_(False)


# -- hooks ---------------------------------------------------------------------------------------------------


def _hook(name, register, who=lambda model: model, second=True):
    def change(self, model):
        register(who(model))

    return type(name, (_Change,), {"change": change, "second": second, "__module__": __name__})


def last(model):
    return list(model.modules())[-1]


def forward_hook(module):
    module.register_forward_hook(lambda module, inputs, output: output + 1)


def pre_hook(module):
    module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def hook_with_kwargs(module):
    module.register_forward_hook(lambda m, args, kwargs, y: (print(len(args)), y)[1], with_kwargs=True)


def backward_hook(module):
    module.register_full_backward_hook(lambda module, gi, go: tuple(None if g is None else 2 * g for g in gi))


def backward_pre_hook(module):
    module.register_full_backward_pre_hook(lambda module, go: tuple(3 * g for g in go))


def parameter_hook(module):
    for p in module.parameters():
        p.register_hook(lambda grad: 2 * grad)


WHO = {"Model": lambda model: model, "First": first, "Last": last}
HOOKS = [
    _hook(f"{hook.__name__.title().replace('_', '')}On{where}", hook, who)
    for where, who in WHO.items()
    for hook in (forward_hook, pre_hook, hook_with_kwargs, backward_hook, backward_pre_hook, parameter_hook)
]
globals().update({case.__name__: case for case in HOOKS})


def _global_hook(name, register, hook):
    @contextlib.contextmanager
    def around(self):
        handle = register(hook)
        try:
            yield
        finally:
            handle.remove()

    return type(name, (_Change,), {"around": around, "__module__": __name__})


modules = torch.nn.modules.module
GLOBAL_HOOKS = [
    _global_hook(
        "GlobalForwardHook",
        modules.register_module_forward_hook,
        lambda m, inputs, y: y + 1 if isinstance(m, nn.Conv2d) else None,
    ),
    _global_hook(
        "GlobalPreHook",
        modules.register_module_forward_pre_hook,
        lambda m, inputs: (inputs[0] - 1,) if isinstance(m, nn.Conv2d) else None,
    ),
    _global_hook(
        "GlobalBackwardHook",
        modules.register_module_full_backward_hook,
        lambda m, gi, go: print(type(m).__name__),
    ),
    _global_hook(
        "GlobalBackwardPreHook",
        modules.register_module_full_backward_pre_hook,
        lambda m, go: tuple(2 * g for g in go) if isinstance(m, nn.Conv2d) else None,
    ),
]
globals().update({case.__name__: case for case in GLOBAL_HOOKS})


# -- modes ---------------------------------------------------------------------------------------------------


class AFunctionMode(_Change):
    def around(self):
        class Mode(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                y = function(*args, **(kwargs or {}))
                return y + 1 if function in (F.conv2d, torch.conv2d) else y

        return Mode()


class ACountingMode(_Change):
    """What FLOP counters and profilers are: they see the operators of torch."""

    def around(self):
        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if function in (torch.ops.aten.convolution.default, torch.ops.aten.relu.default):
                    print(function)
                return function(*args, **(kwargs or {}))

        return Mode()


# -- parametrised afterwards ---------------------------------------------------------------------------------


class Counted(nn.Module):
    """A parametrisation that tells how often it is computed."""

    def forward(self, weight):
        print("computed")
        return weight * 1.5


def _parametrised(name, apply, **more):
    def change(self, model):
        torch.manual_seed(4)
        apply(first(model))

    return type(name, (_Change,), {"change": change, "second": False, "__module__": __name__} | more)


PARAMETRISED = [
    _parametrised("ACountedOne", lambda m: parametrize.register_parametrization(m, "weight", Counted())),
    _parametrised("SpectralNorm", parametrizations.spectral_norm),
    _parametrised("WeightNorm", parametrizations.weight_norm),
    _parametrised("Orthogonal", parametrizations.orthogonal),
    _parametrised("LegacySpectralNorm", nn.utils.spectral_norm),
    _parametrised("LegacyWeightNorm", nn.utils.weight_norm),
    _parametrised("Pruned", lambda m: prune.l1_unstructured(m, "weight", 0.5)),
    _parametrised("PrunedInStructure", lambda m: prune.ln_structured(m, "weight", 0.5, n=2, dim=0)),
    _parametrised("ABiasOfItsOwn", lambda m: parametrize.register_parametrization(m, "bias", Counted())),
]
globals().update({case.__name__: case for case in PARAMETRISED})


class SpectralNormOfAll(_Change):
    second = False

    def change(self, model):
        for conv in convolutions(model):
            torch.manual_seed(5)
            parametrizations.spectral_norm(conv)


class _Before(_Change):
    """Parametrised before optimize: what it leaves or serves, the power iteration takes one step a call."""

    served = False
    second = False

    def prepare(self, model):
        for conv in convolutions(model):
            torch.manual_seed(6)
            type(self).apply(conv)


class SpectralNormBefore(_Before):
    apply = staticmethod(parametrizations.spectral_norm)


class LegacySpectralNormBefore(_Before):
    apply = staticmethod(nn.utils.spectral_norm)


class WeightNormBefore(_Before):
    apply = staticmethod(parametrizations.weight_norm)


class LegacyWeightNormBefore(_Before):
    apply = staticmethod(nn.utils.weight_norm)


class PrunedBefore(_Before):
    apply = staticmethod(functools.partial(prune.l1_unstructured, name="weight", amount=0.5))


class CountedBefore(_Before):
    @staticmethod
    def apply(conv):
        parametrize.register_parametrization(conv, "weight", Counted())


class HookedBefore(_Before):
    """Hooks are not run by optimize either."""

    @staticmethod
    def apply(conv):
        conv.register_forward_hook(lambda module, inputs, y: print("hook") or y * 2)


CHANGES = [c for c in cases(globals()) if issubclass(c, _Change)]


@pytest.mark.parametrize(
    ("case", "name"), [(c, n) for c in CHANGES for n in c.models], ids=lambda v: getattr(v, "__name__", v)
)
def test_what_changes_later_counts(case, name, monkeypatch):
    check(case(), monkeypatch, make=MODELS[name])


# -- losses and reversals ------------------------------------------------------------------------------------


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
        handle = modules.register_module_forward_hook(lambda m, inputs, y: y * 2)
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
