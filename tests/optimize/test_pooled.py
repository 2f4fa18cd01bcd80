"""A convolution, a ReLU that may be there, and a max-pool: served as one, and what is changed later."""

import copy
import importlib
import pickle

import pytest
import torch
from torch import nn

from tests.optimize.helpers import outcome, served
from tests.optimize.twins import assert_same, assert_same_or_raises_so, image, twins

pytestmark = pytest.mark.isa_independent
convolution = importlib.import_module("fastda.optimize.convolution")

RUNS = {
    "ReLU": lambda: [nn.Conv2d(4, 3, 3), nn.ReLU(), nn.MaxPool2d(2)],
    "ReLU in place, padded": lambda: [nn.Conv2d(4, 5, 5, padding=2), nn.ReLU(True), nn.MaxPool2d(2, 2)],
    "no ReLU": lambda: [nn.Conv2d(4, 4, 3, padding="same", bias=False), nn.MaxPool2d((2, 2))],
    "ReLU last": lambda: [nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(True)],
    "behind a norm": lambda: [nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(2)],
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS.keys())
def test_every_run(make, layout):
    model, original, report = twins(*make())
    for shape in ((2, 4, 9, 8), (3, 4, 6, 7)):
        assert_same(model, original, image(*shape, layout=layout))
    conv = next(i for i, layer in enumerate(model) if isinstance(layer, nn.Conv2d))
    pool = next(i for i, layer in enumerate(model) if isinstance(layer, nn.MaxPool2d))
    assert report.calls()[str(conv)] == report.calls()[str(pool)] == (2, 2)
    assert report.calls()[""].served >= 2


OTHERS = {
    "overlapping": lambda: [nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 2)],
    "gaps": lambda: [nn.Conv2d(4, 4, 3), nn.MaxPool2d(1, 2)],
    "oblong": lambda: [nn.Conv2d(4, 4, 3), nn.MaxPool2d((1, 2))],
    "padded pool": lambda: [nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2, padding=1)],
    "ceil": lambda: [nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)],
    "dilated pool": lambda: [nn.Conv2d(4, 4, 3), nn.MaxPool2d(2, dilation=2)],
    "mirrored": lambda: [nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.MaxPool2d(2)],
    "dilated": lambda: [nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.ReLU(), nn.MaxPool2d(2)],
    "stride": lambda: [nn.Conv2d(4, 4, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2)],
    "leaky": lambda: [nn.Conv2d(4, 4, 3), nn.LeakyReLU(), nn.MaxPool2d(2)],
    "something between": lambda: [nn.Conv2d(4, 4, 3), nn.Identity(), nn.MaxPool2d(2)],
    "a norm between": lambda: [nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4), nn.MaxPool2d(2)],
    "average": lambda: [nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AvgPool2d(2)],
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_what_is_no_run(make):
    model, original, report = twins(*make())
    assert_same(model, original, image(2, 4, 9, 8))
    assert report.calls().get("", (0, 0))[0] == 0


INPUTS = {
    "no batch": lambda: torch.randn(4, 6, 5),
    "too small": lambda: torch.randn(2, 4, 3, 5, requires_grad=True),
    "channels": lambda: torch.randn(2, 3, 6, 5),
    "double": lambda: torch.randn(2, 4, 6, 5).double(),
    "half": lambda: torch.randn(2, 4, 6, 5).bfloat16(),
    "meta": lambda: torch.empty(2, 4, 6, 5, device="meta"),
    "no tensor": lambda: [[1.0]],
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())
def test_other_inputs_of_a_run_are_pytorchs(make):
    model, original, report = twins(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2), dtype=torch.float32)
    x = make()
    got, expected = outcome(lambda: model(x)), outcome(lambda: original(x))
    if isinstance(expected, torch.Tensor):
        assert got.shape == expected.shape and got.dtype == expected.dtype
    else:
        assert got == expected
    assert report.calls()[""].served == 0


def patched(layer):
    before = layer.forward
    layer.forward = lambda x: 2 * before(x)


CHANGES = {
    "a padding": lambda m: setattr(m[0], "padding", (1, 1)),
    "a stride": lambda m: setattr(m[0], "stride", (2, 2)),
    "a mode": lambda m: setattr(m[0], "padding_mode", "circular"),
    "the pool's size": lambda m: setattr(m[2], "kernel_size", 3),
    "the pool's stride": lambda m: setattr(m[2], "stride", 1),
    "the pool's indices": lambda m: setattr(m[2], "return_indices", True),
    "rounded up": lambda m: setattr(m[2], "ceil_mode", True),
    "a hook": lambda m: m[0].register_forward_hook(lambda module, inputs, y: y + 1),
    "a hook of the ReLU": lambda m: m[1].register_forward_hook(lambda module, inputs, y: y + 1),
    "a pre-hook of the pool": lambda m: m[2].register_forward_pre_hook(lambda module, x: (x[0] * 2,)),
    "a backward hook": lambda m: m[2].register_full_backward_hook(lambda module, i, o: (3 * i[0],)),
    "the convolution's forward": lambda m: patched(m[0]),
    "the ReLU's forward": lambda m: patched(m[1]),
    "the pool's forward": lambda m: patched(m[2]),
    "_conv_forward": lambda m: setattr(m[0], "_conv_forward", lambda x, weight, bias: x * 5),
    "another activation": lambda m: m.__setitem__(1, nn.Tanh()),
    "another pool": lambda m: m.__setitem__(2, nn.MaxPool2d(2)),
    "a pool of its own": lambda m: m.__setitem__(
        2, type("Own", (nn.MaxPool2d,), {"forward": lambda s, x: x * 3})(2)
    ),
    "another convolution": lambda m: m.__setitem__(0, copy.deepcopy(OTHER)),
    "no bias": lambda m: setattr(m[0], "bias", None),
    "a parametrized weight": lambda m: nn.utils.parametrizations.weight_norm(m[0]),
    "frozen": lambda m: m.requires_grad_(False),
    "no ReLU": lambda m: m.__delitem__(1),
    "twice": lambda m: m.extend([m[0]]),
}
OTHER = nn.Conv2d(4, 2, 3).double()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_later_change_does_what_it_does_to_the_original(change):
    model, original, report = twins(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    assert_same(model, original, image(2, 4, 9, 8))
    assert served(report) == 3
    for each in (model, original):
        change(each)
    assert_same_or_raises_so(model, original)


def test_copies_pickles_and_undo():
    model, original, report = twins(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(other, original, image(2, 4, 9, 8))
    report.undo()
    assert not any("forward" in vars(m) or "_conv_forward" in vars(m) for m in model.modules())
    assert_same(model, original, image(2, 4, 9, 8))


def test_the_result_may_be_changed_in_place():
    """Where the ReLU comes last, its backward reads the result, as PyTorch's does."""
    model, original, _ = twins(nn.Conv2d(4, 4, 3), nn.MaxPool2d(2), nn.ReLU())
    grads = []
    for m in (model, original):
        x = image(2, 4, 9, 8)
        y = m(x)
        y.data.sub_(0.5).relu_()
        grads.append(torch.autograd.grad(y.sum(), x)[0])
    torch.testing.assert_close(*grads)


def test_a_layer_that_is_left_makes_no_run():
    _, _, report = twins(nn.Conv2d(4, 4, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2))
    assert "" not in [path for path, *_ in report.replaced]


@pytest.mark.gain
def test_a_convolution_that_gains_nothing_is_pytorchs():
    model, original, report = twins(nn.Conv2d(3, 32, 5), nn.ReLU(), nn.MaxPool2d(2), dtype=torch.float32)
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(model(x), original(x)) and served(report) == 0
    model(torch.randn(64, 3, 28, 28))
    assert report.calls()[""] == (1, 2)
