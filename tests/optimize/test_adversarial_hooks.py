"""Settings, hooks, modes and parametrisations that come after fastda.optimize."""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.optimize.cases import (
    F64,
    MODELS,
    Change,
    cases,
    convolutions,
    first,
)
from tests.optimize.checking import check

# -- parameters and settings ---------------------------------------------------------------------------------


class BiasAdded(Change):
    models = ("chain",)

    def change(self, model):
        model[2].bias = nn.Parameter(torch.linspace(-1, 1, 4, dtype=F64))


class BiasRemoved(Change):
    def change(self, model):
        first(model).bias = None


class AnotherKernel(Change):
    """The convolution's setting stays, so that the maps shrink where a residual cannot follow."""

    def change(self, model):
        torch.manual_seed(3)
        first(model).weight = nn.Parameter(torch.randn(4, 4, 5, 5, dtype=F64))


class AnotherKernelAndPadding(Change):
    def change(self, model):
        AnotherKernel.change(self, model)
        first(model).padding = (2, 2)


class FewerChannels(Change):
    def change(self, model):
        a, b = convolutions(model)[:2]
        a.weight, b.weight = nn.Parameter(a.weight[:2].detach()), nn.Parameter(b.weight[:, :2].detach())
        if a.bias is not None:
            a.bias = nn.Parameter(a.bias[:2].detach())


class ASubclassOfTensorsAsWeight(Change):
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


class ASubclassOfTensorsAsInput(Change):
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
        f"Setting{name.title().replace('_', '')}", (Change,), {"change": change, "__module__": __name__}
    )


SETTINGS = [
    *(_setting("stride", (2, 2)), _setting("dilation", (2, 2)), _setting("groups", 2)),
    *(_setting("padding", (0, 0)), _setting("padding_mode", "reflect"), _setting("padding", "same")),
]
globals().update({f"{case.__name__}{i}": case for i, case in enumerate(SETTINGS)})


class PaddedOtherwise(Change):
    """The private list that padding modes are served by."""

    def build(self):
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU())

    models = ("chain",)

    def change(self, model):
        model[0]._reversed_padding_repeated_twice = [1, 1, 2, 0]


class WeightOfAnotherDtype(Change):
    def change(self, model):
        first(model).float()


class FrozenAndUnfrozen(Change):
    def change(self, model):
        first(model).requires_grad_(False)


# -- hooks ---------------------------------------------------------------------------------------------------


def _hook(name, register, who=lambda model: model, second=True):
    def change(self, model):
        register(who(model))

    return type(name, (Change,), {"change": change, "second": second, "__module__": __name__})


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

    return type(name, (Change,), {"around": around, "__module__": __name__})


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


class AFunctionMode(Change):
    def around(self):
        class Mode(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                y = function(*args, **(kwargs or {}))
                return y + 1 if function in (F.conv2d, torch.conv2d) else y

        return Mode()


class ACountingMode(Change):
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

    return type(name, (Change,), {"change": change, "second": False, "__module__": __name__} | more)


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


class SpectralNormOfAll(Change):
    second = False

    def change(self, model):
        for conv in convolutions(model):
            torch.manual_seed(5)
            parametrizations.spectral_norm(conv)


class _Before(Change):
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


CHANGES = [c for c in cases(globals()) if issubclass(c, Change)]


@pytest.mark.parametrize(
    ("case", "name"), [(c, n) for c in CHANGES for n in c.models], ids=lambda v: getattr(v, "__name__", v)
)
def test_what_is_added_later_counts(case, name, monkeypatch):
    check(case(), monkeypatch, make=MODELS[name])
