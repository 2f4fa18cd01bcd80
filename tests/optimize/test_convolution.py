"""Served convolutions: every setting, every change made later, and where something is gained."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import fastda
from tests.optimize.helpers import assert_same, image, outcome, pair, results, served

pytestmark = pytest.mark.isa_independent
module = importlib.import_module("fastda.optimize.convolution")


SETTINGS = {
    "same size": {"padding": 1},
    "no bias": {"padding": 1, "bias": False},
    "no padding": {"padding": 0},
    "valid": {"padding": "valid"},
    "same": {"padding": "same"},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
    "replicated": {"padding": "same", "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "5×5 padded by 1": {"kernel_size": 5, "padding": 1},
    "every other pixel": {"padding": 2, "dilation": 2},
    "every third pixel, same": {"padding": "same", "dilation": 3},
    "7×7 mirrored by 2": {"kernel_size": 7, "padding": 2, "padding_mode": "reflect"},
}


@pytest.mark.parametrize(
    "weights", [torch.contiguous_format, torch.channels_last], ids=["weights", "weights last"]
)
@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["images", "images last"]
)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_every_setting(setting, layout, weights):
    model, original, report = pair(nn.Conv2d(8, 6, **{"kernel_size": 3, **setting}))
    assert [e.what for e in report.replaced] == ["convolution → conv_same"]
    model, original = (m.to(memory_format=weights) for m in (model, original))
    for shape in ((2, 8, 9, 7), (1, 8, 8, 8), (3, 8, 12, 5)):
        assert_same(model, original, image(*shape).to(memory_format=layout))
    last = weights is torch.channels_last
    mixed = last and (layout is torch.contiguous_format or "padding_mode" in setting)
    assert served(report) == (0 if mixed else 3)


SETTINGS_OF_A_STRIDE = {
    "padded by 1": {"padding": 1},
    "no bias": {"padding": 1, "bias": False},
    "no padding": {},
    "padded by 3": {"padding": 3},
    "valid": {"padding": "valid"},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
    "reflected by 2": {"padding": 2, "padding_mode": "reflect"},
}


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["images", "images last"]
)
@pytest.mark.parametrize("setting", SETTINGS_OF_A_STRIDE.values(), ids=SETTINGS_OF_A_STRIDE.keys())
def test_every_setting_of_a_stride(setting, layout):
    model, original, report = pair(nn.Conv2d(17, 18, 4, stride=2, **setting), dtype=torch.float32)
    assert [e.what for e in report.replaced] == ["convolution → conv_same"]
    for shape in ((2, 17, 19, 22), (1, 17, 8, 9)):
        assert_same(model, original, image(*shape, dtype=torch.float32).to(memory_format=layout))
    assert served(report) == 2


REFUSED = {
    "kernel (3, 5) is not square and odd": {"kernel_size": (3, 5)},
    "kernel (4, 4) is not square and odd": {"kernel_size": 4},
    "stride (2, 2)": {"stride": 2},
    "dilation (2, 1)": {"dilation": (2, 1), "padding": (2, 1)},
    "dilation (2, 2) of another kernel than 3×3, or without zeros up to the same size": {"dilation": 2},
    "dilation (3, 3) of another kernel than 3×3, or without zeros up to the same size": {
        "dilation": 3,
        "padding": 3,
        "padding_mode": "reflect",
    },
    "dilation (4, 4) of another kernel than 3×3, or without zeros up to the same size": {
        "dilation": 4,
        "padding": 8,
        "kernel_size": 5,
    },
    "groups 2": {"groups": 2},
    "stride (3, 3)": {"kernel_size": 3, "stride": 3},
    "kernel (4, 4) is not square and odd ": {"kernel_size": 4, "stride": 3},
    "no faster in torch.float64": {"kernel_size": 4, "stride": 2, "dtype": torch.float64},
    "dilation (2, 2)": {"kernel_size": 4, "stride": 2, "dilation": 2},
    "no faster from 8 to 8 channels with a padding of (4, 4)": {
        "kernel_size": 4,
        "stride": 2,
        "padding": 4,
    },
    "padding (2, 2) is more than half of the 3×3 kernel, or not the same on every side": {"padding": 2},
    "padding (1, 0) is more than half of the 3×3 kernel, or not the same on every side": {"padding": (1, 0)},
    "no faster in torch.complex64": {"dtype": torch.complex64},
    "no faster in torch.bfloat16": {"dtype": torch.bfloat16},
    "on meta, where nothing was measured": {"device": "meta"},
}


@pytest.mark.parametrize(("reason", "setting"), REFUSED.items(), ids=REFUSED.keys())
def test_what_is_left_and_why(reason, setting):
    report = fastda.optimize(nn.Conv2d(8, 8, **{"kernel_size": 3, **setting}))
    assert [e.what for e in report.left] == [reason.strip()]
    assert not report.replaced


def test_lazy_layers_and_other_classes():
    class Own(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight, bias) * 2

    class Copies(nn.Conv2d):
        def __deepcopy__(self, memo):
            return self

    class Standardized(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    layers = (nn.LazyConv2d(4, 3), Own(8, 8, 3), Copies(8, 8, 3), Standardized(8, 8, 3, padding=1))
    report = fastda.optimize(nn.ModuleList(layers))
    assert [e.path for e in report.replaced] == ["3"]
    assert [e.what for e in report.left] == [
        "has no weight yet: call the model once before fastda.optimize",
        "its class has a _conv_forward of its own",
        "its class has a __deepcopy__ of its own",
    ]
    assert_same(*pair(Standardized(8, 8, 3, padding=1))[:2], image())


# -- what is changed later -----------------------------------------------------------------------------------


def adds_one(module, inputs, output):
    return output + 1


def replace_weight(conv):
    conv.weight = nn.Parameter(conv.weight.detach()[:, :, 1:2, 1:2].clone())
    conv.padding = (0, 0)


def patch_forward(conv):
    conv.forward = lambda x: F.conv2d(x, conv.weight) * 2


def patch_conv_forward(conv):
    conv._conv_forward = lambda x, weight, bias: F.conv2d(x, weight) * 3


def halve(conv):
    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    torch.nn.utils.parametrize.register_parametrization(conv, "weight", Half())


CHANGES = {
    "hook": lambda conv: conv.register_forward_hook(adds_one),
    "pre-hook": lambda conv: conv.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
    "stride": lambda conv: setattr(conv, "stride", (2, 2)),
    "float stride": lambda conv: setattr(conv, "stride", (1.0, 1.0)),
    "dilation": lambda conv: setattr(conv, "dilation", (2, 2)),
    "dilation of the same size": lambda conv: conv.__dict__.update(dilation=(2, 2), padding=(2, 2)),
    "no dilation": lambda conv: setattr(conv, "dilation", (0, 0)),
    "groups": lambda conv: setattr(conv, "groups", 2),
    "bool groups": lambda conv: setattr(conv, "groups", True),
    "padding": lambda conv: setattr(conv, "padding", (0, 0)),
    "int padding": lambda conv: setattr(conv, "padding", 1),
    "three paddings": lambda conv: setattr(conv, "padding", (1, 1, 1)),
    "negative padding": lambda conv: setattr(conv, "padding", (-1, -1)),
    "padding mode": lambda conv: setattr(conv, "padding_mode", "circular"),
    "frozen": lambda conv: conv.requires_grad_(False),
    "no bias": lambda conv: setattr(conv, "bias", None),
    "wrong bias": lambda conv: setattr(conv, "bias", nn.Parameter(torch.ones(5, dtype=torch.float64))),
    "a bias of another dtype": lambda conv: setattr(conv, "bias", nn.Parameter(torch.ones(8))),
    "another kernel": replace_weight,
    "forward": patch_forward,
    "_conv_forward": patch_conv_forward,
    "pruning": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "the older spectral norm": torch.nn.utils.spectral_norm,
    "another parametrization": halve,
    "dtype": lambda conv: conv.float(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_later_change_does_what_it_does_to_the_original(change):
    model, original, _ = pair(nn.Conv2d(8, 8, 3, padding=1))
    x = image()
    model(x)
    for each in (model, original):
        torch.manual_seed(0)
        change(each[0])
    for dtype in (torch.float64, torch.float32):
        inputs = x.to(dtype)
        got, expected = (outcome(lambda m=m, x=inputs: results(m, x)) for m in (model, original))
        if isinstance(expected[0], type):
            assert got == expected
        else:
            assert_same(model, original, inputs)
    for name, value in original.state_dict().items():  # the power iteration went on by as many steps
        torch.testing.assert_close(model.state_dict()[name], value)


def test_the_weight_of_a_parametrized_layer_is_computed_once_a_call():
    computed = []

    class Counts(nn.Module):
        def forward(self, weight):
            computed.append(1)
            return weight * 2

    conv = nn.Conv2d(8, 8, 3, padding=1)
    torch.nn.utils.parametrize.register_parametrization(conv, "weight", Counts())
    computed.clear()
    report = fastda.optimize(conv)
    assert [e.what for e in report.replaced] == ["convolution → conv_same"]
    assert computed == []
    conv(torch.randn(1, 8, 6, 6))
    assert computed == [1]
    assert served(report) == 1


def test_patches_of_torch_are_honoured(monkeypatch):
    model, original, report = pair(nn.Conv2d(8, 8, 3, padding=1))
    x = image()
    for owner, name in ((F, "conv2d"), (nn.Conv2d, "_conv_forward"), (nn.Conv2d, "forward")):
        with monkeypatch.context() as patched:
            before = getattr(owner, name)
            patched.setattr(owner, name, lambda *args, before=before: before(*args) + 1)
            torch.testing.assert_close(model(x), original(x))
    assert served(report) == 1  # forward was patched around it
    monkeypatch.setattr(module, "_CONV2D", lambda *args: None)
    (entry,) = fastda.optimize(nn.Conv2d(8, 8, 3)).left
    assert entry.what == "torch's convolution was patched before fastda was imported"


class Sees(TorchFunctionMode):
    def __init__(self):
        self.functions = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.functions.append(function)
        return function(*args, **(kwargs or {}))


def test_modes_see_torchs_operators():
    model, original, report = pair(nn.Conv2d(8, 8, 3, padding=1), dtype=torch.float32)
    x = torch.randn(2, 8, 9, 7)
    with Sees() as mode:
        model(x)
    assert F.conv2d in mode.functions
    flops = []
    for each in (model, original):
        with FlopCounterMode(display=False) as counter:
            each(x).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert model(fake.from_tensor(x)).shape == x.shape
    assert served(report) == 0


@pytest.mark.parametrize(
    "odd",
    [
        lambda: image(8, 6, 5),
        lambda: image(2, 7, 6, 5),
        lambda: image(0, 8, 6, 5),
        lambda: image(2, 8, 0, 5),
        lambda: torch.randn(2, 8, 6, 5),
        lambda: torch.ones(2, 8, 6, 5, dtype=torch.int64),
        lambda: image(2, 8, 6, 5).to_sparse(),
        lambda: torch.randn(2, 8, 6, 5, device="meta", dtype=torch.float64),
        lambda: None,
    ],
    ids=["unbatched", "channels", "no images", "no rows", "dtype", "int", "sparse", "meta", "None"],
)
def test_inputs_that_do_not_fit_do_what_they_did(odd):
    model, original, _ = pair(nn.Conv2d(8, 8, 3, padding=1))
    x = odd()
    got, expected = outcome(lambda: model(x)), outcome(lambda: original(x))
    if isinstance(expected, torch.Tensor) and not expected.is_meta:
        assert torch.equal(got, expected)
    elif not isinstance(expected, torch.Tensor):
        assert got == expected


# -- where something is gained -------------------------------------------------------------------------------


@pytest.mark.gain
def test_only_what_gains_is_replaced():
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 5, padding=2)),
        *(nn.Conv2d(16, 16, 7, padding=3), nn.Conv2d(16, 16, 1)),
    )
    report = fastda.optimize(model)
    assert [e.path for e in report.replaced] == ["1", "2", "3"]
    assert [e.what for e in report.left] == [
        "no faster with less than 16 channels",
        "no faster with less than 64 channels",
    ]


@pytest.mark.gain
@pytest.mark.parametrize(
    ("channels", "out", "k", "dtype", "is_served"),
    [
        *((c, 32, 5, "float32", c > 2) for c in (2, 3, 4)),
        *((c, 16, 7, "float32", c > 1) for c in (1, 2, 4)),
        *((64, k, 3, "float32", True) for k in (1, 4)),
        *((16, 3, k, "float32", True) for k in (5, 7)),
        *((3, 16, 5, "float32", False), (5, 32, 5, "float32", False), (3, 64, 3, "float32", False)),
        *((64, 5, 3, "float32", False), (8, 3, 3, "float32", False)),
        *((3, 32, 5, "float64", False), (64, 3, 3, "float64", False)),
    ],
)
def test_first_and_last_layers(channels, out, k, dtype, is_served):
    layer = nn.Conv2d(channels, out, k, padding=k // 2).to(getattr(torch, dtype))
    report = fastda.optimize(layer)
    layer(torch.randn(2, channels, 64, 64, dtype=layer.weight.dtype))
    assert served(report) == is_served


@pytest.mark.gain
@pytest.mark.parametrize(
    ("channels", "out", "size", "padding", "dtype", "is_served"),
    [
        *((10, 20, size, 0, "float32", size > 9) for size in (12, 10, 9)),
        (10, 20, 12, 2, "float32", False),
        (10, 20, 12, 0, "float64", False),
        (9, 20, 12, 0, "float32", False),
        (10, 19, 12, 0, "float32", False),
    ],
)
def test_5x5_of_few_channels_without_padding(channels, out, size, padding, dtype, is_served):
    layer = nn.Conv2d(channels, out, 5, padding=padding).to(getattr(torch, dtype))
    report = fastda.optimize(layer)
    layer(torch.randn(64, channels, size, size, dtype=layer.weight.dtype))
    assert served(report) == is_served


@pytest.mark.gain
@pytest.mark.parametrize(
    ("channels", "k", "dtype", "shape", "padding", "is_served"),
    [
        (64, 3, "float32", (1, 8, 8), 1, True),
        (16, 3, "float32", (1, 8, 8), 1, False),
        (16, 3, "float32", (16, 8, 8), 1, True),
        (64, 3, "float32", (64, 3, 3), 1, False),
        (64, 3, "float32", (16, 5, 5), 1, False),  # four tiles for 25 pixels
        (64, 3, "float32", (16, 6, 6), 1, True),
        (64, 3, "float32", (16, 7, 7), 0, False),
        (64, 3, "float32", (16, 10, 10), 0, True),
        (64, 3, "float32", (1, 18, 18), 0, True),
        (512, 3, "float32", (1, 7, 7), 1, True),
        (64, 3, "float64", (1, 32, 32), 1, False),
        (64, 3, "float64", (2, 32, 32), 1, True),
        (264, 3, "float64", (2, 32, 32), 1, False),
        (64, 7, "float32", (1, 16, 16), 3, False),
        (64, 7, "float32", (8, 16, 16), 3, True),
        (64, 7, "float32", (32, 8, 8), 3, False),
        (136, 7, "float32", (8, 16, 16), 3, False),
        (64, 5, "float32", (8, 10, 10), 0, True),
        (64, 5, "float32", (7, 10, 10), 0, False),
        (192, 5, "float32", (64, 7, 7), 0, True),
        (136, 5, "float32", (56, 7, 7), 0, False),
        (64, 5, "float32", (128, 8, 8), 0, False),  # four tiles for 16 pixels
        (64, 5, "float32", (1, 20, 20), 2, True),
        (64, 5, "float32", (3, 10, 13), 2, True),
        (128, 5, "float32", (2, 16, 16), 2, True),
        (128, 5, "float32", (1, 20, 20), 2, False),
        (64, 5, "float32", (29, 6, 6), 2, True),
        (64, 5, "float32", (28, 6, 6), 2, False),
        (64, 5, "float32", (128, 7, 7), 2, False),
        (64, 5, "float32", (128, 5, 5), 2, False),
        (32, 5, "float32", (16, 20, 20), 2, True),
        (16, 5, "float32", (16, 20, 20), 2, True),
        (16, 5, "float32", (64, 15, 20), 2, False),
        (64, 5, "float64", (16, 32, 32), 2, False),
    ],
)
def test_a_convolution_of_little_work_takes_pytorchs(channels, k, dtype, shape, padding, is_served):
    with torch.no_grad():
        dtype = getattr(torch, dtype)
        model = nn.Conv2d(channels, channels, k, padding=padding, bias=False, dtype=dtype)
        report = fastda.optimize(model)
        model(torch.zeros(shape[0], channels, *shape[1:], dtype=dtype))
    assert report.calls() == {"": (int(is_served), 1)}


@pytest.mark.gain
@pytest.mark.parametrize(
    ("channels", "out", "shape", "is_served"),
    [
        (64, 128, (1, 64, 64), True),
        (64, 128, (1, 56, 64), False),  # 56 tiles
        (128, 256, (1, 64, 64), True),
        (16, 16, (4, 32, 32), True),
        (16, 16, (64, 10, 10), False),  # four tiles for 25 pixels
    ],
)
def test_a_convolution_with_a_stride_of_little_work_takes_pytorchs(channels, out, shape, is_served):
    with torch.no_grad():
        model = nn.Conv2d(channels, out, 4, stride=2, padding=1)
        report = fastda.optimize(model)
        model(torch.zeros(shape[0], channels, *shape[1:]))
    assert report.calls() == {"": (int(is_served), 1)}


@pytest.mark.gain
@pytest.mark.parametrize(
    ("layer", "shape", "threads", "is_served"),
    [
        ((64, 128), (1, 128, 128), 1, True),
        ((64, 128), (1, 128, 127), 1, False),
        ((63, 256), (4, 128, 128), 1, False),
        ((256, 63), (4, 128, 128), 1, False),
        ((512, 2048), (6, 7, 7), 1, True),
        ((512, 2048), (5, 7, 7), 1, False),
        ((512, 2048), (15, 7, 6), 1, False),
        ((512, 2048), (15, 7, 7), 2, False),
        ((512, 2048), (16, 7, 7), 1, False),
        ((256, 1024), (16, 14, 14), 2, True),
        ((256, 1025), (16, 14, 14), 2, False),
        ((2048, 2048), (20, 7, 7), 1, False),
        ((4096, 4096), (4, 32, 32), 1, True),
        ((4096, 4096), (1, 63, 65), 1, False),
    ],
)
def test_a_1x1_convolution_of_little_work_takes_pytorchs(layer, shape, threads, is_served, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with torch.no_grad():
        model = nn.Conv2d(*layer, 1, bias=False)
        report = fastda.optimize(model)
        model(torch.zeros(shape[0], layer[0], *shape[1:]))
    assert report.calls() == ({"": (int(is_served), 1)} if min(layer) >= 64 else {})


@pytest.mark.gain
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "a part", "float64"])
def test_of_1x1_convolutions_contiguous_images_in_float32_are_served(layout):
    model = nn.Conv2d(64, 64, 1)
    x = torch.randn(2, 64, 130, 130)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "a part":
        x = x[..., 1:, 1:]
    if layout == "float64":
        x, model = x.double(), model.double()
    with torch.no_grad():
        original = model(x)
        report = fastda.optimize(model)
        torch.testing.assert_close(model(x), original, rtol=1e-5, atol=1e-5)
    assert model(x).stride() == original.stride()
    assert served(report) == (2 if layout == "contiguous" else 0)


@pytest.mark.gain
@pytest.mark.parametrize(
    ("channels", "dilation", "shape", "is_served"),
    [
        (63, 2, (1, 24, 24), False),
        (64, 2, (1, 24, 24), True),
        (64, 8, (1, 64, 64), True),
        (64, 8, (1, 65, 65), False),  # nine tiles in each of 64 images, for 66 pixels
        (64, 8, (4, 24, 24), False),  # images of 3×3
    ],
)
def test_a_dilated_convolution_that_does_not_fill_its_tiles_takes_pytorchs(
    channels, dilation, shape, is_served
):
    model = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)
    report = fastda.optimize(model)
    assert bool(report.replaced) == (channels >= 64)
    model(torch.zeros(shape[0], channels, *shape[1:]))
    assert report.calls() == ({"": (int(is_served), 1)} if report.replaced else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_under_autocast_torchs_convolution_runs(dtype):
    model, original, report = pair(nn.Conv2d(8, 8, 3, padding=1), dtype=torch.float32)
    x = torch.randn(2, 8, 9, 7, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = outcome(lambda: model(x)), outcome(lambda: original(x))
    assert torch.equal(got, expected) if isinstance(expected, torch.Tensor) else got == expected
    assert served(report) == 0
