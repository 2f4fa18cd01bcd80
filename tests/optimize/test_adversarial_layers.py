"""Convolutions with settings, weights and inputs that few have: torch's results or torch's errors."""

import copy
import gc
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastda
from tests.optimize.cases import F64, Case, cases, maps
from tests.optimize.checking import check, compare


class _Layer(Case):
    served = True
    settings = ()

    def build(self):
        return nn.Sequential(nn.Conv2d(4, 4, 3, **{"padding": 1, **dict(self.settings)}), nn.ReLU())

    def inputs(self):
        return [(maps(),), (maps(1, 4, 5, 4),)]


def _changed(name, attribute, value, **settings):
    """A setting that is exchanged after optimize, for one that torch takes or refuses."""

    def change(self, model):
        setattr(model[0], attribute, value)

    namespace = {"change": change, "settings": tuple(settings.items()), "__module__": __name__}
    return type(name, (_Layer,), namespace)


CHANGED = [
    _changed("PaddingAsAnInteger", "padding", 1),
    _changed("PaddingOfOne", "padding", (1,)),
    _changed("PaddingOfThree", "padding", (1, 1, 1)),
    _changed("PaddingOfNone", "padding", ()),
    _changed("NoPadding", "padding", None),
    _changed("PaddingAsAList", "padding", [1, 1]),
    _changed("PaddingOfFloats", "padding", (1.0, 1.0)),
    _changed("PaddingOfBools", "padding", (True, True)),
    _changed("PaddingAsATensor", "padding", torch.tensor([1, 1])),
    _changed("NegativePadding", "padding", (-1, -1)),
    _changed("UnevenPadding", "padding", (1, 0)),
    _changed("WidePadding", "padding", (3, 3)),
    _changed("PaddingInCapitals", "padding", "SAME"),
    _changed("StrideAsAnInteger", "stride", 1),
    _changed("StrideTwo", "stride", 2),
    _changed("StrideZero", "stride", (0, 0)),
    _changed("DilationAsAnInteger", "dilation", 2),
    _changed("DilationOfOne", "dilation", (2,)),
    _changed("GroupsAsAFloat", "groups", 1.0),
    _changed("GroupsAsABool", "groups", True),
    _changed("GroupsZero", "groups", 0),
    _changed("UnknownPaddingMode", "padding_mode", "mirror"),
    _changed("CircularAfterwards", "padding_mode", "circular"),
    _changed("ThreeSides", "_reversed_padding_repeated_twice", [1, 1, 1], padding_mode="reflect"),
    _changed("SixSides", "_reversed_padding_repeated_twice", [1] * 6, padding_mode="replicate"),
    _changed("NegativeSides", "_reversed_padding_repeated_twice", [-1] * 4, padding_mode="circular"),
    _changed("UnevenSides", "_reversed_padding_repeated_twice", [1, 1, 0, 0], padding_mode="reflect"),
    _changed("KernelSizeOnPaper", "kernel_size", (5, 5)),
    _changed("ChannelsOnPaper", "in_channels", 7),
]
globals().update({case.__name__: case for case in CHANGED})


def _option(name, served=True, **settings):
    return type(
        name, (_Layer,), {"settings": tuple(settings.items()), "served": served, "__module__": __name__}
    )


OPTIONS = [
    _option("Same", padding="same"),
    _option("Valid", padding="valid"),
    _option("WithoutBias", bias=False),
    _option("Reflected", padding_mode="reflect"),
    _option("Replicated", padding_mode="replicate"),
    _option("Circular", padding_mode="circular"),
    _option("SameReflected", padding="same", padding_mode="reflect"),
    _option("ValidCircular", padding="valid", padding_mode="circular"),
    _option("Strided", served=False, stride=2),
    _option("Dilated", dilation=2, padding=2),
    _option("SameDilated", dilation=3, padding="same"),
    _option("DilatedReflected", served=False, dilation=2, padding=2, padding_mode="reflect"),
    _option("Grouped", served=False, groups=2),
    _option("Depthwise", served=False, groups=4),
    _option("PaddedByTwo", served=False, padding=2),
    _option("PaddedUnevenly", served=False, padding=(1, 0)),
]
globals().update({case.__name__: case for case in OPTIONS})


class AnEvenKernel(_Layer):
    served = False
    why = r"kernel \(2, 2\)|2×2|even"

    def build(self):
        return nn.Conv2d(4, 4, 2)


class ADilatedKernel(_Layer):
    """The reason is the dilation, not a padding that goes with it."""

    served = False
    why = r"^dilation"

    def build(self):
        return nn.Conv2d(4, 4, 5, padding=4, dilation=2)


# -- weights that are no usual parameters --------------------------------------------------------------------


class ATensorAsWeight(_Layer):
    def build(self):
        class Hyper(nn.Conv2d):
            def __init__(self):
                super().__init__(4, 4, 3, padding=1, bias=False)
                weight = self.weight.detach()
                del self.weight
                self.register_buffer("weight", weight)

        return Hyper()

    served = False


class AWeightByProperty(_Layer):
    served = False

    def build(self):
        class Scaled(nn.Conv2d):
            gain = 2.0

            def forward(self, x):
                return self._conv_forward(x, self.weight * self.gain, None)

        return Scaled(4, 4, 3, padding=1)

    def change(self, model):
        model.gain = 0.5


class OwnConvForward(_Layer):
    served = False
    why = r"own"

    def build(self):
        class Own(nn.Conv2d):
            def _conv_forward(self, x, weight, bias):
                return F.conv2d(x, weight.abs(), bias, padding=1)

        return Own(4, 4, 3, padding=1)


class OwnConvForwardLater(_Layer):
    """The class of the layer gets one after optimize."""

    def build(self):
        class Own(nn.Conv2d):
            pass

        return Own(4, 4, 3, padding=1)

    def change(self, model):
        type(model)._conv_forward = lambda self, x, weight, bias: F.conv2d(x, weight.abs(), bias, padding=1)


class OwnGetattribute(_Layer):
    served = False

    def build(self):
        class Own(nn.Conv2d):
            def __getattribute__(self, name):
                if name == "_conv_forward":
                    print("asked")
                return super().__getattribute__(name)

        return Own(4, 4, 3, padding=1)


class AChannelsLastWeight(_Layer):
    served = False

    def prepare(self, model):
        model.to(memory_format=torch.channels_last)


class AFrozenWeight(_Layer):
    def prepare(self, model):
        model[0].weight.requires_grad_(False)


class AFloatWeightUnderAutocast(_Layer):
    second = False
    tolerance = 2e-2

    def prepare(self, model):
        model.float()

    def before(self, model):
        return [(maps(dtype=torch.float32),)]

    def inputs(self):
        return [(maps(dtype=dtype),) for dtype in (torch.float32, torch.bfloat16, torch.float64)]

    def around(self):
        return torch.autocast("cpu", torch.bfloat16)


# -- inputs --------------------------------------------------------------------------------------------------


class _Inputs(_Layer):
    second = False

    def before(self, model):
        return [(maps(),)]


def _input(name, make, **more):
    namespace = {"inputs": lambda self: [(make(),)], "__module__": __name__}
    return type(name, (_Inputs,), namespace | more)


def plain(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=F64)


INPUTS = [
    _input("NoImages", lambda: plain(0, 4, 5, 5).requires_grad_()),
    _input("NoRows", lambda: plain(2, 4, 0, 5)),
    _input("OneImage", lambda: plain(4, 5, 6).requires_grad_()),
    _input("FiveDimensions", lambda: plain(2, 4, 5, 5, 5)),
    _input("OtherChannels", lambda: plain(2, 3, 5, 5)),
    _input("OtherDtype", lambda: plain(2, 4, 5, 5).float()),
    _input("Integers", lambda: torch.ones(2, 4, 5, 5, dtype=torch.long)),
    _input("ComplexNumbers", lambda: plain(2, 4, 5, 5) + 1j),
    _input("ChannelsLast", lambda: plain(2, 4, 5, 6).to(memory_format=torch.channels_last).requires_grad_()),
    _input("Turned", lambda: plain(2, 4, 5, 6).mT.requires_grad_()),
    _input("PermutedBatch", lambda: plain(4, 2, 6, 5).transpose(0, 1).requires_grad_()),
    _input("EverySecond", lambda: plain(2, 8, 5, 6)[:, ::2].requires_grad_()),
    _input("Expanded", lambda: plain(1, 4, 1, 1).expand(2, 4, 5, 6)),
    _input("Overlapping", lambda: plain(300).as_strided((2, 4, 5, 5), (20, 5, 2, 1))),
    _input("NegativeBit", lambda: torch.complex(plain(2, 4, 5, 5), plain(2, 4, 5, 5)).conj().imag),
    _input("OnePixel", lambda: plain(2, 4, 1, 1).requires_grad_()),
    _input("Sparse", lambda: plain(2, 4, 5, 5).to_sparse()),
    _input("Nested", lambda: torch.nested.nested_tensor([plain(4, 5, 5), plain(4, 5, 5)])),
    _input("Mkldnn", lambda: plain(2, 4, 5, 5).float().to_mkldnn()),
    _input("Zeros", lambda: torch._efficientzerotensor((2, 4, 5, 5), dtype=F64)),
    _input("Infinite", lambda: plain(1, 4, 5, 5) * float("inf")),
    _input("AList", lambda: [1, 2, 3]),
    _input("Nothing", lambda: None),
]
globals().update({case.__name__: case for case in INPUTS})


LAYERS = cases(globals())


@pytest.mark.filterwarnings("ignore:.*(nested|ested)")
@pytest.mark.parametrize("case", LAYERS, ids=lambda c: c.__name__)
def test_a_layer_does_what_torchs_does(case, monkeypatch):
    check(case(), monkeypatch)


# -- copies and patches that came before ---------------------------------------------------------------------


class OwnDeepcopy(nn.Conv2d):
    """It copies its attributes one by one, as code before nn.Module had a protocol does."""

    def __deepcopy__(self, memo):
        new = type(self).__new__(type(self))
        new.__dict__.update({name: copy.deepcopy(value) for name, value in vars(self).items()})
        return new


def test_a_deepcopy_of_the_authors_own():
    torch.manual_seed(0)
    model = OwnDeepcopy(4, 4, 3, padding=1).double()
    original = copy.deepcopy(model)
    fastda.optimize(model)
    again = copy.deepcopy(model)
    for changed in (again, original):
        changed.padding = (0, 0)
    compare(again, original, (maps(),), "the copy")


def test_a_shallow_copy_computes_the_same_after_the_model_is_gone():
    model = nn.Conv2d(4, 4, 3, padding=1).double()
    original = copy.deepcopy(model)
    fastda.optimize(model)
    again = copy.copy(model)
    compare(again, original, (maps(),), "the copy")
    del model
    gc.collect()
    compare(again, original, (maps(),), "the copy that outlived")


def test_a_shallow_copy_with_settings_of_its_own():
    model = nn.Conv2d(4, 4, 3, padding=1).double()
    original = copy.deepcopy(model)
    fastda.optimize(model)
    again = copy.copy(model)
    for changed in (again, original):
        changed.stride = (2, 2)
    compare(again, original, (maps(),), "the copy")


PATCH = """
import torch, torch.nn.functional as F
from torch import nn
old = {old}
{old} = lambda *args, **kwargs: old(*args, **kwargs) + 1
import importlib
import fastda
convolution = importlib.import_module("fastda.optimize.convolution")
loss = importlib.import_module("fastda.optimize.loss")
convolution.LEAST_CHANNELS = convolution.LEAST_SIZE = 1
convolution.WANTED_OF, convolution.LEAST_PRODUCTS = 1 << 20, 0
loss.LEAST_PATCHES = dict.fromkeys(loss.LEAST_PATCHES, 0)
model, x = nn.Conv2d(4, 4, 3, padding=1), torch.randn(2, 4, 6, 5)
losses = nn.ModuleList([nn.BCEWithLogitsLoss()])
def call():
    return model(x).sum() + sum(l(x, torch.ones(()).expand_as(x)) for l in losses)
before = call()
for each in (model, losses):
    fastda.optimize(each)
assert torch.allclose(call(), before, rtol=1e-4), (call(), before)
"""


@pytest.mark.isa_independent
@pytest.mark.parametrize(
    "old",
    [
        *("F.conv2d", "nn.Conv2d._conv_forward"),
        *("F.binary_cross_entropy_with_logits", "nn.BCEWithLogitsLoss.forward"),
    ],
)
def test_what_was_patched_before_fastda_was_imported(old):
    done = subprocess.run([sys.executable, "-c", PATCH.format(old=old)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-600:]
