"""A reflection padding and the convolution behind it: served as one, and what each is changed to later."""

import copy
import importlib
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import fastda
from tests.optimize.helpers import outcome, served
from tests.optimize.twins import assert_same, assert_same_or_raises_so, image, twins

pytestmark = pytest.mark.isa_independent
module = importlib.import_module("fastda.optimize.convolution")

PAIRS = {
    "3×3": lambda: [nn.ReflectionPad2d(1), nn.Conv2d(4, 3, 3)],
    "5×5": lambda: [nn.ReflectionPad2d((2, 2, 2, 2)), nn.Conv2d(4, 5, 5, padding="valid")],
    "7×7 without bias": lambda: [nn.ReflectionPad2d(3), nn.Conv2d(4, 4, 7, bias=False)],
    "behind a ReLU": lambda: [nn.ReLU(), nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3)],
    "before a norm": lambda: [nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4), nn.ReLU(True)],
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS.keys())
def test_every_pair(make, layout):
    model, original, report = twins(*make())
    for training in (True, False):
        model.train(training)
        original.train(training)
        for shape in ((2, 4, 6, 5), (3, 4, 9, 4)):
            assert_same(model, original, image(*shape, layout=layout))
    conv = next(i for i, layer in enumerate(model) if isinstance(layer, nn.Conv2d))
    assert report.calls()[str(conv)] == (4, 4)
    norms = any(isinstance(layer, nn.InstanceNorm2d) for layer in model)
    assert report.calls()[""] == (8, 8) if norms else (4, 4)


OTHERS = {
    "other sides": lambda: [nn.ReflectionPad2d((1, 1, 1, 2)), nn.Conv2d(4, 4, 3)],
    "one side": lambda: [nn.ReflectionPad2d((1, 0, 1, 0)), nn.Conv2d(4, 4, 2)],
    "no padding": lambda: [nn.ReflectionPad2d(0), nn.Conv2d(4, 4, 1)],
    "cropped": lambda: [nn.ReflectionPad2d(-1), nn.Conv2d(4, 4, 3)],
    "more": lambda: [nn.ReflectionPad2d(2), nn.Conv2d(4, 4, 3)],
    "less": lambda: [nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 5)],
    "padded again": lambda: [nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3, padding=1)],
    "mirrored again": lambda: [nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")],
    "stride": lambda: [nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3, stride=2)],
    "dilation": lambda: [nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3, dilation=2)],
    "groups": lambda: [nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3, groups=2)],
    "zeros": lambda: [nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3)],
    "replicated": lambda: [nn.ReplicationPad2d(1), nn.Conv2d(4, 4, 3)],
    "two paddings": lambda: [nn.ReflectionPad2d(1), nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 5)],
    "the other way": lambda: [nn.Conv2d(4, 4, 3), nn.ReflectionPad2d(1)],
    "transposed": lambda: [nn.ReflectionPad2d(1), nn.ConvTranspose2d(4, 4, 3)],
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_what_is_no_pair(make):
    model, original, report = twins(*make())
    assert_same(model, original, image())
    assert report.calls().get("", (0, 0))[0] == 0


INPUTS = {
    "no batch": lambda: torch.randn(4, 6, 5),
    "too small": lambda: torch.randn(2, 4, 1, 5, requires_grad=True),
    "channels": lambda: torch.randn(2, 3, 6, 5),
    "double": lambda: torch.randn(2, 4, 6, 5).double(),
    "half": lambda: torch.randn(2, 4, 6, 5).bfloat16(),
    "empty": lambda: torch.randn(0, 4, 6, 5),
    "meta": lambda: torch.empty(2, 4, 6, 5, device="meta"),
    "no tensor": lambda: [[1.0]],
    "a subclass": lambda: torch.randn(2, 4, 6, 5).as_subclass(type("Own", (torch.Tensor,), {})),
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())
def test_other_inputs_of_a_padding_are_pytorchs(make):
    model, original, report = twins(nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3), dtype=torch.float32)
    x = make()
    got, expected = outcome(lambda: model(x)), outcome(lambda: original(x))
    if isinstance(expected, torch.Tensor):
        assert got.shape == expected.shape and got.dtype == expected.dtype and type(got) is type(expected)
        assert expected.is_meta or torch.equal(got, expected)
    else:
        assert got == expected
    assert report.calls()[""].served == 0


OTHER = nn.Conv2d(4, 2, 3).double()


def patched(layer):
    before = layer.forward
    layer.forward = lambda x: 2 * before(x)


CHANGES = {
    "another padding": lambda m: setattr(m[0], "padding", (2, 2, 2, 2)),
    "other sides": lambda m: setattr(m[0], "padding", (0, 2, 1, 1)),
    "a list": lambda m: setattr(m[0], "padding", [1, 1, 1, 1]),
    "the convolution pads": lambda m: setattr(m[1], "padding", (1, 1)),
    "a stride": lambda m: setattr(m[1], "stride", (2, 2)),
    "a dilation": lambda m: setattr(m[1], "dilation", (2, 2)),
    "a hook": lambda m: m[0].register_forward_hook(lambda module, inputs, y: y + 1),
    "a pre-hook": lambda m: m[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
    "a backward hook": lambda m: m[0].register_full_backward_hook(lambda module, i, o: (3 * i[0],)),
    "a hook of the convolution": lambda m: m[1].register_forward_hook(lambda s, i, y: y + i[0].sum()),
    "a pre-hook of the convolution": lambda m: m[1].register_forward_pre_hook(lambda s, i: (i[0] * 2,)),
    "a backward hook of the convolution": lambda m: m[1].register_full_backward_pre_hook(
        lambda s, o: (3 * o[0],)
    ),
    "its forward": lambda m: patched(m[0]),
    "the convolution's forward": lambda m: patched(m[1]),
    "_conv_forward": lambda m: setattr(m[1], "_conv_forward", lambda x, weight, bias: x[..., 1:-1, 1:-1] * 5),
    "_call_impl": lambda m: setattr(m[0], "_call_impl", lambda x: F.pad(x, (1,) * 4)),
    "a padding with zeros": lambda m: m.__setitem__(0, nn.ZeroPad2d(1)),
    "a padding of its own": lambda m: m.__setitem__(
        0, type("Own", (nn.ReflectionPad2d,), {"forward": lambda s, x: F.pad(x, (1,) * 4)})(1)
    ),
    "another convolution": lambda m: m.__setitem__(1, copy.deepcopy(OTHER)),
    "another weight": lambda m: setattr(m[1], "weight", nn.Parameter(torch.ones(4, 4, 3, 3).double())),
    "no bias": lambda m: setattr(m[1], "bias", None),
    "a parametrized weight": lambda m: nn.utils.parametrizations.weight_norm(m[1]),
    "pruned": lambda m: prune.l1_unstructured(m[1], "weight", 0.5),
    "frozen": lambda m: m.requires_grad_(False),
    "something between": lambda m: m.insert(1, nn.Tanh()),
    "the padding twice": lambda m: m.extend([m[0]]),
    "the pair twice": lambda m: m.extend([m[0], m[1]]),
    "no padding": lambda m: m.__delitem__(0),
    "float": lambda m: m.float(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_later_change_does_what_it_does_to_the_original(change):
    model, original, report = twins(nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3))
    assert_same(model, original, image())
    assert served(report) == 2
    for each in (model, original):
        change(each)
    assert_same_or_raises_so(model, original)


@pytest.mark.parametrize("mode", ["a padding in front", "of the layer"])
@pytest.mark.parametrize("recorded", [True, False], ids=["with x", "of the weight alone"])
def test_what_changes_x_between_forward_and_backward(recorded, mode):
    """PyTorch's padding keeps x where it has a gradient; otherwise its convolution has a copy."""
    layers = [nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3)]
    if mode == "of the layer":
        layers = [nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")]
    model, original, report = twins(*layers)
    found = []
    for each in (model, original):
        x = image() * 2
        x = x if recorded else x.detach()
        y = each(x)
        x.add_(3)
        found.append(outcome(y.sum().backward) or each[-1].weight.grad)
    if recorded:
        assert all(error is RuntimeError and "inplace operation" in text for error, text in found)
    else:
        torch.testing.assert_close(*found)
    assert served(report) > 0


def test_hooks_of_all_modules_and_patches_see_both(monkeypatch):
    model, original, report = twins(nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, y: seen.append(type(m).__name__))
    try:
        torch.testing.assert_close(model(image()), original(image()))
    finally:
        handle.remove()
    assert seen == 2 * ["ReflectionPad2d", "Conv2d", "Sequential"]
    for owner, name in ((F, "pad"), (F, "conv2d"), (nn.ReflectionPad2d, "forward"), (nn.Conv2d, "forward")):
        with monkeypatch.context() as patch:
            before = getattr(owner, name)
            patch.setattr(owner, name, lambda *a, before=before, **o: before(*a, **o) + 1)
            torch.testing.assert_close(model(image()), original(image()))
    assert report.calls()[""].served == 0


def test_copies_pickles_and_undo():
    model, original, report = twins(
        nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4), nn.ReLU()
    )
    assert model.state_dict().keys() == original.state_dict().keys() and repr(model) == repr(original)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            each[1].weight.mul_(-2)
        changed = copy.deepcopy(original)
        changed.load_state_dict(each.state_dict())
        assert_same(each, changed, image())
        assert type(vars(each)["forward"]) is type(vars(model)["forward"])
    assert_same(model, original, image())
    report.undo()
    assert "forward" not in vars(model) and torch.equal(model(image()), original(image()))


@pytest.mark.gain
@pytest.mark.parametrize(("channels", "out", "pairs"), [(64, 64, 1), (64, 3, 0), (3, 64, 0)])
def test_a_copy_is_spared_only_where_that_gains(channels, out, pairs):
    model = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(channels, out, 7))
    report = fastda.optimize(model)
    model(torch.randn(1, channels, 64, 64, requires_grad=True))
    assert report.calls()[""].served == pairs and report.calls()["1"] == (1, 1)
