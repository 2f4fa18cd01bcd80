"""Served normalisation: every setting, pairs with an activation, and what is left."""

import pytest
import torch
from torch import nn

import fastda
from tests.optimize.helpers import outcome, served
from tests.optimize.twins import NORMS, Own, assert_same, image, twins

pytestmark = pytest.mark.isa_independent
ACTIVATIONS = {
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "LeakyReLU in place": lambda: nn.LeakyReLU(inplace=True),
}


# -- what is served ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS.keys())
def test_every_norm_in_training_and_evaluation(make, layout):
    model, original, report = twins(make())
    for training in (True, True, False, True):
        model.train(training)
        original.train(training)
        for shape in ((2, 4, 6, 5), (3, 4, 2, 9)):
            assert_same(model, original, image(*shape, layout=layout))
    instance = type(original[0]) is nn.InstanceNorm2d
    assert served(report) == (8 if instance or layout is torch.contiguous_format else 0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS.keys())
def test_every_pair(make, activation, layout):
    model, original, report = twins(nn.Conv2d(4, 4, 1), make(), activation(), nn.Tanh())
    for training in (True, False):
        model.train(training)
        original.train(training)
        assert_same(model, original, image(layout=layout))
        assert_same(model, original, image(3, 4, 3, 3, layout=layout))
    assert report.calls()[""] == (4, 4) and report.calls()["1"] == (4, 4)


@pytest.mark.parametrize("special", [torch.nan, torch.inf, 64.0, 0.0], ids=str)
def test_values_that_are_none(special):
    for layers in ((nn.BatchNorm2d(4), nn.ReLU()), (nn.InstanceNorm2d(4), nn.LeakyReLU(0.2))):
        model, original, report = twins(*layers, dtype=torch.float32)
        x = image(dtype=torch.float32).detach()
        x[0, 1, 2, 3] = special
        x[1, 2] = special
        got, expected = [], []
        for each, found in ((model, got), (original, expected)):
            leaf = x.clone().requires_grad_()
            y = each(leaf)
            found += [y, torch.autograd.grad(y, leaf, torch.ones_like(y))[0], *each.state_dict().values()]
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3, equal_nan=True)
        assert served(report) > 0


def test_one_image_in_channels_last_where_pytorchs_gradient_is_wrong():
    """PyTorch's instance norm of one image reads an output gradient in channels_last as if contiguous."""
    model, original, report = twins(nn.InstanceNorm2d(4))
    x = image(1, 4, 6, 5)
    grad = torch.randn(1, 4, 6, 5, dtype=x.dtype)
    (right,) = torch.autograd.grad(original(x), x, grad)
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.detach().contiguous(memory_format=layout).requires_grad_()
        (got,) = torch.autograd.grad(model(leaf), leaf, grad.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(got, right)
    assert served(report) == 2


def test_autograd_does_not_notice_the_running_statistics():
    """As with PyTorch: a graph that holds them outlives the next batch."""
    model, original, report = twins(nn.BatchNorm2d(4))
    gradients = []
    for each in (model, original):
        weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
        penalty = (weight * each[0].running_var * each[0].running_mean).sum()
        each(image())
        gradients.append(torch.autograd.grad(penalty, weight)[0])
        assert each[0].running_mean._version == original[0].running_mean._version
    torch.testing.assert_close(*gradients)
    assert served(report) == 1


MEANWHILE = {
    "bias": lambda m: m[0].bias.data.add_(3),
    "bias in place": lambda m: m[0].bias.add_(3),
    "weight": lambda m: m[0].weight.data.mul_(-2),
    "weight in place": lambda m: m[0].weight.mul_(-2),
    "running variance": lambda m: m[0].running_var.data.mul_(4),
    "running variance in place": lambda m: m[0].running_var.mul_(4),
    "a training batch": lambda m: m.train()(image(3, 4, 2, 2)),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("change", MEANWHILE.values(), ids=MEANWHILE.keys())
@pytest.mark.parametrize("last", [nn.Identity, nn.ReLU], ids=["alone", "pair"])
def test_what_changes_between_forward_and_backward(last, change, training):
    """Other optimizers, exponential averages, clipped weights: what PyTorch's backward makes of them."""
    model, original, report = twins(nn.BatchNorm2d(4), last())
    found = []
    for each in (model, original):
        each.train(training)
        x = image()
        y = each(x)
        with torch.no_grad():
            change(each)
        weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
        found.append(outcome(lambda y=y, x=x, e=each, w=weights: torch.autograd.grad(y, [x, e[0].weight], w)))
    got, expected = found
    if training and change is MEANWHILE["running variance in place"]:
        assert expected[0] is RuntimeError  # and the right gradient here, which does not depend on it
    elif isinstance(expected[0], type):
        assert got[0] is expected[0] and "modified by an inplace operation" in got[1]
    else:
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert served(report) > 0


# -- what is not ---------------------------------------------------------------------------------------------

INPUTS = {
    "no batch": lambda: torch.randn(4, 6, 5),
    "channels": lambda: torch.randn(2, 3, 6, 5),
    "a view": lambda: torch.randn(2, 4, 6, 10)[..., ::2],
    "half": lambda: torch.randn(2, 4, 6, 5).bfloat16(),
    "double": lambda: torch.randn(2, 4, 6, 5).double(),
    "integers": lambda: torch.arange(240).view(2, 4, 6, 5),
    "one pixel": lambda: torch.randn(1, 4, 1, 1),
    "empty": lambda: torch.randn(0, 4, 6, 5),
    "meta": lambda: torch.empty(2, 4, 6, 5, device="meta"),
    "no tensor": lambda: [[1.0]],
    "a subclass": lambda: torch.randn(2, 4, 6, 5).as_subclass(type("Own", (torch.Tensor,), {})),
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())
@pytest.mark.parametrize("norm", ["batch", "instance, affine"])
def test_other_inputs_of_a_norm_are_pytorchs(norm, make):
    model, original, report = twins(NORMS[norm](), nn.ReLU(), dtype=torch.float32)
    x = make()
    got, expected = outcome(lambda: model(x)), outcome(lambda: original(x))
    if isinstance(expected, torch.Tensor) and not expected.is_meta:
        assert torch.equal(got, expected) and got.stride() == expected.stride()
        assert type(got) is type(expected)
    elif not isinstance(expected, torch.Tensor):
        assert got == expected
    assert served(report) == 0


LEFT = {
    "has running statistics": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "on meta, where nothing was measured": lambda: nn.BatchNorm2d(4, device="meta"),
}


@pytest.mark.parametrize(("reason", "make"), LEFT.items(), ids=LEFT.keys())
def test_which_norm_is_left_and_why(reason, make):
    assert [e.what for e in fastda.optimize(make()).left] == [reason]


@pytest.mark.parametrize("make", [lambda: Own(4), lambda: nn.SyncBatchNorm(4), lambda: nn.BatchNorm3d(4)])
def test_other_classes_are_not_looked_at(make):
    report = fastda.optimize(nn.Sequential(make(), nn.ReLU()))
    assert not report.replaced and not report.left


@pytest.mark.gain
@pytest.mark.parametrize(
    ("make", "shape", "layout", "calls"),
    [
        (nn.BatchNorm2d, (8, 32, 28, 28), torch.contiguous_format, (1, 1)),
        (nn.BatchNorm2d, (64, 128, 4, 4), torch.contiguous_format, (1, 1)),
        (nn.BatchNorm2d, (64, 127, 4, 4), torch.contiguous_format, (0, 1)),
        (nn.BatchNorm2d, (64, 512, 3, 4), torch.contiguous_format, (0, 1)),
        (nn.BatchNorm2d, (64, 64, 16, 16), torch.channels_last, (1, 1)),
        (nn.BatchNorm2d, (63, 64, 16, 16), torch.channels_last, (0, 1)),
        (nn.InstanceNorm2d, (16, 64, 14, 14), torch.contiguous_format, (1, 1)),
        (nn.InstanceNorm2d, (16, 64, 14, 14), torch.channels_last, (1, 1)),
        (nn.InstanceNorm2d, (64, 64, 13, 14), torch.contiguous_format, (0, 1)),
    ],
)
def test_a_small_batch_takes_pytorchs(make, shape, layout, calls):
    model = nn.Sequential(make(shape[1]), nn.ReLU())
    report = fastda.optimize(model)
    model(torch.randn(shape).contiguous(memory_format=layout))
    assert report.calls() == {"": calls, "0": calls if calls[0] else (0, 1)}
