"""Blocks that compute other things than a residual block where nobody looked."""

import contextlib
import functools
import itertools
import os
import random
import types
import warnings
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.optimize.cases import F64, Block, Case, cases, maps
from tests.optimize.checking import check

SIZES = [(2, 4, 9, 7), (1, 4, 8, 8), (3, 4, 33, 40)]


class _Block(Case):
    """A residual block with another forward. `settings` are set on the instance, `shared` on its class."""

    served = True  # its convolutions, whatever it makes of them
    settings: ClassVar = {}
    shared: ClassVar = {}
    sizes = SIZES

    def build(self):
        class Written(Block):
            pass

        if "forward" in vars(type(self)):
            Written.forward = vars(type(self))["forward"]
        for name, value in self.shared.items():
            setattr(Written, name, value)
        model = Written()
        for name, value in self.settings.items():
            setattr(model, name, value() if callable(value) and not isinstance(value, nn.Module) else value)
        return model

    def inputs(self):
        return [(maps(*sizes),) for sizes in self.sizes]


class Benign(_Block):
    pass


class BenignWithFunctions(_Block):
    def forward(self, x):
        return F.relu(x + self.convs(x))


class BenignWithSingleLayers(_Block):
    def forward(self, x):
        h = self.convs[0](x)
        h = self.convs[1](h)
        return torch.relu(torch.add(self.convs[2](h), x))


class BenignInPlace(_Block):
    def forward(self, x):
        out = self.convs(x)
        out += x
        return F.relu(out, inplace=True)


# -- what the input is ---------------------------------------------------------------------------------------


class OddSizes(_Block):
    sizes: ClassVar = [(2, 4, 6, 8), (2, 4, 6, 7)]

    def forward(self, x):
        y = self.convs(x)
        return self.relu(y + x) if x.shape[-1] % 2 == 0 else self.relu(y - x)


class LargeSizes(_Block):
    sizes: ClassVar = [(1, 4, 6, 9), (1, 4, 64, 64)]

    def forward(self, x):
        return self.relu(self.convs(x) + (x if x.size(2) < 50 else 2 * x))


class SingleImages(_Block):
    sizes: ClassVar = [(2, 4, 6, 9), (1, 4, 6, 9)]

    def forward(self, x):
        y = self.convs(x)
        if len(x) == 1:
            y = y * 0.5
        return self.relu(y + x)


class MemoryFormat(_Block):
    def forward(self, x):
        y = self.convs(x)
        return self.relu(y + x) if x.is_contiguous() else self.relu(y + x + 1)

    def inputs(self):
        x = maps().detach()
        return [(x,), (x.to(memory_format=torch.channels_last).requires_grad_(),), (x.transpose(2, 3),)]


class Dtypes(_Block):
    tolerance = 1e-4
    second = False

    def forward(self, x):
        return self.relu(self.convs(x) + x) if x.dtype == torch.float64 else self.convs(x)

    def change(self, model):
        model.float()

    def before(self, model):
        return [(maps(),)]

    def inputs(self):
        return [(maps(dtype=torch.float32),)]


class WhetherItWantsAGradient(_Block):
    def forward(self, x):
        return self.relu(self.convs(x) + x) if x.requires_grad else self.relu(self.convs(x) - x)

    def inputs(self):
        return [(maps(),), (maps().detach(),)]


class Values(_Block):
    def forward(self, x):
        return self.relu(self.convs(x) + (x if x.abs().max() < 1e6 else 0 * x))

    def inputs(self):
        return [(maps(),), (maps(scale=1e8),)]


class RaisesOnNaN(_Block):
    def forward(self, x):
        if torch.isnan(x).any():
            raise ValueError("x is NaN")
        return self.relu(self.convs(x) + x)

    def inputs(self):
        return [(maps(),), (maps(scale=float("nan")),)]


class ClampsFarOut(_Block):
    def forward(self, x):
        return self.relu((self.convs(x) + x).clamp(-1e4, 1e4))

    def inputs(self):
        return [(maps(),), (maps(scale=1e6),)]


class AssertsTheSize(_Block):
    def forward(self, x):
        assert x.shape[2] < 30, "too high"
        return self.relu(self.convs(x) + x)


class TriesFirst(_Block):
    def forward(self, x):
        try:
            return self.relu(self.convs(x) + x.view(2, 4, 9, 7))
        except RuntimeError:
            return x


# -- modes and flags of torch --------------------------------------------------------------------------------


def _mode(name, forward, around, **more):
    """A block whose forward looks at a flag of torch, and is called again where that differs."""
    namespace = {"forward": forward, "around": lambda self: around(), "__module__": __name__}
    return type(name, (_Block,), namespace | more)


@contextlib.contextmanager
def flag(get, put, value):
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def default_dtype():
    return flag(torch.get_default_dtype, torch.set_default_dtype, torch.float64)


def deterministic():
    return flag(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True)


def seven_threads():
    return flag(torch.get_num_threads, torch.set_num_threads, 7)


def without_mkldnn():
    return torch.backends.mkldnn.flags(enabled=False)


def anomalies():
    return torch.autograd.set_detect_anomaly(True)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@contextlib.contextmanager
def environment():
    os.environ["WRITTEN_BLOCK_GAIN"] = "2"
    try:
        yield
    finally:
        del os.environ["WRITTEN_BLOCK_GAIN"]


MODES = [
    _mode(
        "GradMode",
        lambda self, x: self.relu(self.convs(x) + x) if torch.is_grad_enabled() else self.convs(x),
        torch.no_grad,
    ),
    _mode(
        "InferenceMode",
        lambda self, x: (
            self.relu(self.convs(x) + x) if not torch.is_inference_mode_enabled() else self.convs(x)
        ),
        torch.inference_mode,
    ),
    _mode(
        "Autocast",
        lambda self, x: (
            self.relu(self.convs(x) + x) if not torch.is_autocast_enabled("cpu") else self.convs(x)
        ),
        autocast,
        second=False,
        tolerance=2e-2,
    ),
    _mode(
        "DefaultDtype",
        lambda self, x: (
            self.relu(self.convs(x) + x) if torch.get_default_dtype() == torch.float32 else self.convs(x)
        ),
        default_dtype,
    ),
    _mode(
        "Deterministic",
        lambda self, x: (
            self.relu(self.convs(x) + x)
            if not torch.are_deterministic_algorithms_enabled()
            else self.convs(x)
        ),
        deterministic,
    ),
    _mode(
        "EnvironmentVariable",
        lambda self, x: (
            self.relu(self.convs(x) + x) if "WRITTEN_BLOCK_GAIN" not in os.environ else self.convs(x)
        ),
        environment,
    ),
    _mode(
        "Mkldnn",
        lambda self, x: self.relu(self.convs(x) + x) if torch.backends.mkldnn.enabled else self.convs(x),
        without_mkldnn,
    ),
    _mode(
        "Threads",
        lambda self, x: self.relu(self.convs(x) + x) if torch.get_num_threads() < 7 else self.convs(x),
        seven_threads,
    ),
    _mode(
        "Cuda",
        lambda self, x: self.relu(self.convs(x) + x) if not torch.cuda.is_available() else self.convs(x),
        contextlib.nullcontext,
    ),
    _mode(
        "Compiling",
        lambda self, x: self.relu(self.convs(x) + x) if not torch.compiler.is_compiling() else self.convs(x),
        contextlib.nullcontext,
    ),
    _mode(
        "Anomaly",
        lambda self, x: self.relu(self.convs(x) + x) if not torch.is_anomaly_enabled() else self.convs(x),
        anomalies,
    ),
]
globals().update({case.__name__: case for case in MODES})


class Training(_Block):
    def forward(self, x):
        return self.relu(self.convs(x) + x) if self.training else self.convs(x)

    def change(self, model):
        model.eval()


class TrainingOfALayer(Training):
    def forward(self, x):
        return self.relu(self.convs(x) + x) if self.relu.training else self.convs(x)


class ServedUnderAutocast(_Block):
    second = False
    tolerance = 2e-2

    def around(self):
        return autocast()


class ServedWithoutGradients(_Block):
    def around(self):
        return torch.no_grad()


# -- what the code reads -------------------------------------------------------------------------------------

GAIN = 1.0
TABLE = {"gain": 1.0}


class _Gain(_Block):
    """x times a gain, which changes after optimize."""

    def everywhere(self, monkeypatch):
        monkeypatch.setitem(globals(), "GAIN", 2.0)
        monkeypatch.setitem(TABLE, "gain", 2.0)


class AGlobal(_Gain):
    def forward(self, x):
        return self.relu(self.convs(x) + (x if GAIN == 1.0 else x * GAIN))


class ATableThatIsGlobal(_Gain):
    def forward(self, x):
        return self.relu(self.convs(x) + (x if TABLE["gain"] == 1.0 else x * TABLE["gain"]))


class AStaticMethod(_Gain):
    shared: ClassVar = {"skip": staticmethod(lambda x: x if GAIN == 1.0 else x * GAIN)}

    def forward(self, x):
        return self.relu(self.convs(x) + self.skip(x))


class AClassMethod(_Gain):
    shared: ClassVar = {"skip": classmethod(lambda cls, x: x if GAIN == 1.0 else x * GAIN)}

    def forward(self, x):
        return self.relu(self.convs(x) + self.skip(x))


class APropertyThatReads(_Gain):
    shared: ClassVar = {"gain": property(lambda self: GAIN)}

    def forward(self, x):
        return self.relu(self.convs(x) + x if self.gain == 1.0 else self.convs(x))


def skip(x):
    return x if GAIN == 1.0 else x * GAIN


class AFunction(_Gain):
    def forward(self, x):
        return self.relu(self.convs(x) + skip(x))


class AFunctionExchangedLater(_Block):
    def forward(self, x):
        return self.relu(self.convs(x) + same(x))

    def everywhere(self, monkeypatch):
        monkeypatch.setitem(globals(), "same", lambda x: 3 * x)


def same(x):
    return x


class AFunctionAttribute(_Gain):
    def forward(self, x):
        return self.relu(
            self.convs(x) + (x if getattr(skip, "gain", 1.0) == 1.0 else x * getattr(skip, "gain", 1.0))
        )

    def everywhere(self, monkeypatch):
        monkeypatch.setattr(skip, "gain", 4.0, raising=False)


class AClosure(_Block):
    def build(self):
        model = super().build()
        self.cells = [*getattr(self, "cells", []), [1.0]]
        gain = self.cells[-1]
        type(model).forward = lambda self, x: self.relu(
            self.convs(x) + (x if gain[0] == 1.0 else x * gain[0])
        )
        return model

    def change(self, model):
        for gain in self.cells:
            gain[0] = 2.0


class ACellRebound(_Block):
    def build(self):
        model = super().build()
        gain = 1.0

        def forward(self, x):
            return self.relu(self.convs(x) + x if gain == 1.0 else self.convs(x))

        def put(value):
            nonlocal gain
            gain = value

        type(model).forward, model.put = forward, put
        return model

    def change(self, model):
        model.put(2.0)


class AnImportInside(_Block):
    def forward(self, x):
        from tests.optimize.test_adversarial_blocks import GAIN

        return self.relu(self.convs(x) + (x if GAIN == 1.0 else x * GAIN))

    everywhere = _Gain.everywhere


class AMutableDefault(_Block):
    def forward(self, x, table=TABLE):
        return self.relu(self.convs(x) + (x if table["gain"] == 1.0 else x * table["gain"]))

    everywhere = _Gain.everywhere


class ADefaultChangedLater(_Block):
    def forward(self, x, gain=1.0):
        return self.relu(self.convs(x) + x * gain)

    def everywhere(self, monkeypatch):
        monkeypatch.setattr(vars(ADefaultChangedLater)["forward"], "__defaults__", (3.0,))


class ADefaultOverridden(_Block):
    def forward(self, x, gain=1.0):
        return self.relu(self.convs(x) + (x if gain == 1.0 else x * gain))

    def inputs(self):
        return [(maps(),), (maps(), 1.0), (maps(), 2.0)]


class AClassAttribute(_Block):
    shared: ClassVar = {"gain": 1.0}

    def forward(self, x):
        return self.relu(self.convs(x) + (x if self.gain == 1.0 else x * self.gain))

    def change(self, model):
        [base for base in type(model).__mro__ if "gain" in vars(base)][-1].gain = 2.0


class AClassAttributeOnTheInstance(AClassAttribute):
    def change(self, model):
        model.gain = 2.0


class AnAttribute(AClassAttributeOnTheInstance):
    shared: ClassVar = {}
    settings: ClassVar = {"gain": 1.0}


class AFlag(AnAttribute):
    def forward(self, x):
        return self.relu(self.convs(x) + x) if self.gain == 1.0 else self.convs(x)


class ALayerInAFlag(_Block):
    settings: ClassVar = {"shortcut": None}

    def forward(self, x):
        return self.relu(self.convs(x) + (x if self.shortcut is None else self.shortcut(x)))

    def change(self, model):
        torch.manual_seed(1)
        model.shortcut = nn.Conv2d(4, 4, 1).double()


class AListOnTheInstance(_Block):
    settings: ClassVar = {"gains": lambda: [1.0]}

    def forward(self, x):
        return self.relu(self.convs(x) + (x if self.gains[0] == 1.0 else x * self.gains[0]))

    def change(self, model):
        model.gains[0] = 2.0


class ATensorOnTheInstance(_Block):
    settings: ClassVar = {"gain": lambda: torch.ones((), dtype=F64)}

    def forward(self, x):
        return self.relu(self.convs(x) + (x if self.gain == 1.0 else x * self.gain))

    def change(self, model):
        model.gain.fill_(2.0)


class ABuffer(_Block):
    def build(self):
        model = super().build()
        model.register_buffer("gain", torch.ones(()))
        return model

    forward = ATensorOnTheInstance.forward
    change = ATensorOnTheInstance.change


class AModuleNamespace(_Gain):
    space = types.SimpleNamespace(gain=1.0)

    def forward(self, x):
        return self.relu(
            self.convs(x) + (x if AModuleNamespace.space.gain == 1.0 else x * AModuleNamespace.space.gain)
        )

    def everywhere(self, monkeypatch):
        monkeypatch.setattr(self.space, "gain", 2.0)


# -- what the code keeps, says and draws ---------------------------------------------------------------------


class Prints(_Block):
    def forward(self, x):
        print("forward", tuple(x.shape))
        return self.relu(self.convs(x) + x)


class Warns(_Block):
    def forward(self, x):
        warnings.warn("as slow as ever", stacklevel=2)
        return self.relu(self.convs(x) + x)

    def call(self, model, x):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = model(x)
        return y, len(caught)


class CountsItself(_Block):
    settings: ClassVar = {"calls": 0}

    def forward(self, x):
        self.calls += 1
        return self.relu(self.convs(x) + x)


class CountsOnItsClass(_Block):
    shared: ClassVar = {"calls": 0}

    def forward(self, x):
        type(self).calls += 1
        return self.relu(self.convs(x) + x)

    def call(self, model, x):
        before = type(model).calls
        return model(x), type(model).calls - before


class CountsInAList(_Block):
    settings: ClassVar = {"shapes": list}

    def forward(self, x):
        self.shapes.append(x.shape)
        return self.relu(self.convs(x) + x)


class CountsByAnIterator(_Block):
    settings: ClassVar = {"numbers": itertools.count}

    def forward(self, x):
        return self.relu(self.convs(x) + x * (next(self.numbers) < 2))


class KeepsItsFeatures(_Block):
    def forward(self, x):
        self.features = self.convs(x)
        return self.relu(self.features + x)

    def call(self, model, x):
        y = model(x)
        return y, model.features


class DropsPaths(_Block):
    def forward(self, x):
        return self.relu(self.convs(x) * (random.random() < 0.5) + x)

    def call(self, model, x):
        random.seed(3)
        return tuple(model(x) for _ in range(6))


class DropsOut(_Block):
    def forward(self, x):
        return self.relu(F.dropout(self.convs(x), 0.5, self.training) + x)


class RegistersAGradientHook(_Block):
    def forward(self, x):
        y = self.relu(self.convs(x) + x)
        if y.requires_grad:
            y.register_hook(lambda grad: 2 * grad)
        return y


class StopsGradients(_Block):
    def forward(self, x):
        return self.relu(self.convs(x) + x.detach())


class StopsGradientsInside(_Block):
    def forward(self, x):
        with torch.no_grad():
            y = self.convs[0](x)
        return self.relu(self.convs[2](self.convs[1](y)) + x)


class StopsTheWeight(_Block):
    def forward(self, x):
        first = self.convs[0]
        y = F.conv2d(x, first.weight.detach(), first.bias, padding=1)
        return self.relu(self.convs[2](F.relu(y)) + x)


class ChangesItsInput(_Block):
    def forward(self, x):
        return self.relu(self.convs(F.relu_(x * 1.0)) + x)


class ReluFirst(_Block):
    """A shortcut behind the ReLU in place that comes first, as pre-activation blocks have."""

    def forward(self, x):
        x = x * 1.0
        y = self.convs(F.relu_(x))
        return self.relu(y + x)


class InPlaceOnItsInput(_Block):
    served = False  # an error: x is a leaf

    def forward(self, x):
        x.mul_(1.0)
        return self.relu(self.convs(x) + x)


class Checkpointed(_Block):
    def forward(self, x):
        y = torch.utils.checkpoint.checkpoint(self.convs, x, use_reentrant=False)
        return self.relu(y + x)


class Loops(_Block):
    settings: ClassVar = {"rounds": 1}

    def forward(self, x):
        for _ in range(self.rounds):
            x = self.relu(self.convs(x) + x)
        return x

    def change(self, model):
        model.rounds = 3


class LoopsOverItsLayers(_Block):
    def forward(self, x):
        y = x
        for layer in self.convs:
            y = layer(y)
        return self.relu(y + x)

    def change(self, model):
        model.convs.append(nn.Tanh())


class ByGetattr(_Block):
    settings: ClassVar = {"name": "convs"}

    def forward(self, x):
        return self.relu(getattr(self, self.name)(x) + x)

    def change(self, model):
        model.name = "relu"


class Partial(_Block):
    settings: ClassVar = {"add": lambda: functools.partial(torch.add, alpha=2.0)}

    def forward(self, x):
        return self.relu(self.add(self.convs(x), x))


class CallsAnotherForward(_Block):
    def forward(self, x):
        return super(type(self).__mro__[-3], self).forward(x) if GAIN > 5 else Block.forward(self, x)


class OneConvolutionTwice(_Block):
    def forward(self, x):
        return self.relu(self.convs[0](self.convs[1](self.convs[0](x))) + x)


BLOCKS = cases(globals())


@pytest.mark.parametrize("case", BLOCKS, ids=lambda c: c.__name__)
def test_a_block_computes_what_its_code_says(case, monkeypatch):
    check(case(), monkeypatch)
