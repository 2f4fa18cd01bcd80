"""torch's losses, served where the target is one number or one class, and nowhere else."""

import copy
import importlib
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastda
from tests.optimize.helpers import outcome, served

pytestmark = pytest.mark.isa_independent
module = importlib.import_module("fastda.optimize.loss")


def compare(loss, original, x, target):
    """Value, gradient and its square's derivative: as near as one sum in another order can be."""
    found = []
    for each in (loss, original):
        leaf = x.detach().clone().requires_grad_()
        value = each(leaf, target)
        (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
        again = torch.autograd.grad(grad.square().sum(), leaf)[0] if grad.requires_grad else grad
        found.append((value.detach(), grad.detach(), again))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= (1e-5 if x.dtype == torch.float32 else 1e-12) * b.norm()


def pair(make):
    original, loss = make(), make()
    return loss, original, fastda.optimize(loss)


BCE, CE = nn.BCEWithLogitsLoss, nn.CrossEntropyLoss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("label", [0.0, 1.0, 0.9, 0.1, 0.5, 1.0000001, -0.1, 2.0])
def test_expanded_labels(label, dtype):
    loss, original, report = pair(BCE)
    for shape in ((3, 1, 9, 7), (5,), (2, 3)):
        x = torch.randn(shape, dtype=dtype)
        compare(loss, original, x, torch.tensor(label, dtype=dtype).expand_as(x))
    assert served(report) == (3 if 0 <= label <= 1 else 0)


@pytest.mark.parametrize("shape", [(70, 2), (3, 2, 5, 4), (3, 2, 5)])
@pytest.mark.parametrize("label", [0, 1])
def test_labels_of_one_class(label, shape):
    loss, original, report = pair(CE)
    x, target = torch.randn(shape), torch.full((shape[0], *shape[2:]), label)
    compare(loss, original, x, target)
    x = torch.randn(3, 2, 5, 4).permute(0, 2, 3, 1).reshape(-1, 2)
    compare(loss, original, x, torch.full((60,), label))
    assert served(report) == 2
    target.view(-1)[-1] = 1 - label
    compare(loss, original, torch.randn(shape), target)
    assert served(report) == 2


def test_labels_are_read_in_every_call():
    class GANLoss(nn.Module):
        """As in CycleGAN's repository."""

        def __init__(self):
            super().__init__()
            self.register_buffer("real_label", torch.tensor(1.0))
            self.register_buffer("fake_label", torch.tensor(0.0))
            self.loss = nn.BCEWithLogitsLoss()

        def forward(self, prediction, target_is_real):
            target = self.real_label if target_is_real else self.fake_label
            return self.loss(prediction, target.expand_as(prediction))

    loss = GANLoss()
    original = copy.deepcopy(loss)
    report = fastda.optimize(loss)
    assert [(e.path, e.type) for e in report.replaced] == [("loss", "BCEWithLogitsLoss")]
    x = torch.randn(2, 1, 6, 5)
    changes = (
        lambda each: None,
        lambda each: each.real_label.data.fill_(0.8),
        lambda each: each.fake_label.numpy().fill(0.25),
        lambda each: each.load_state_dict({"real_label": torch.tensor(0.9), "fake_label": torch.tensor(0.1)}),
    )
    for change in changes:
        for each in (loss, original):
            change(each)
        for flag in (True, False):
            compare(lambda x, t: loss(x, t), lambda x, t: original(x, t), x, flag)
    assert served(report) == 8
    assert str(report.calls()["loss"]) == "served 8 of 8 calls"


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 1e30, 200.0, -200.0])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_extreme_logits_give_what_torch_gives(value, label):
    for make in (BCE, CE):
        loss, original, _ = pair(make)
        x = torch.randn(40, 2)
        x[3, 1] = value
        target = torch.full((40,), int(label)) if make is CE else torch.tensor(label).expand_as(x)
        with torch.no_grad():
            torch.testing.assert_close(
                loss(x, target), original(x, target), rtol=1e-6, atol=0, equal_nan=True
            )


X = torch.linspace(-2, 3, 24).view(12, 2)
ODD = {
    "dense labels": (BCE, lambda: (X, torch.ones_like(X))),
    "two labels": (BCE, lambda: (X, torch.tensor([0.0, 1.0]).expand_as(X))),
    "a label that learns": (BCE, lambda: (X, torch.tensor(0.5, requires_grad=True).expand_as(X))),
    "another shape": (BCE, lambda: (X, torch.ones(3))),
    "another dtype": (BCE, lambda: (X, torch.tensor(1.0, dtype=torch.float64).expand_as(X))),
    "half precision": (BCE, lambda: (X.bfloat16(), torch.tensor(1.0).bfloat16().expand_as(X))),
    "not contiguous": (BCE, lambda: (X.t(), torch.tensor(1.0).expand(2, 12))),
    "no logits": (BCE, lambda: (X[:0], torch.tensor(1.0).expand(0, 2))),
    "probabilities": (CE, lambda: (X, torch.full((12, 2), 0.5))),
    "three classes": (CE, lambda: (X.view(8, 3), torch.ones(8, dtype=torch.long))),
    "one pixel": (CE, lambda: (X[0], torch.tensor(1))),
    "ignored": (CE, lambda: (X, torch.full((12,), -100))),
    "beyond": (CE, lambda: (X, torch.full((12,), 2))),
    "int32": (CE, lambda: (X, torch.ones(12, dtype=torch.int32))),
    "None": (CE, lambda: (X, None)),
}


@pytest.mark.parametrize(("make", "inputs"), ODD.values(), ids=ODD.keys())
def test_every_other_call_is_torchs(make, inputs):
    loss, original, report = pair(make)
    got, expected = outcome(lambda: loss(*inputs())), outcome(lambda: original(*inputs()))
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert got == expected
    assert report.calls() == {"": (0, 1)}


CHANGES = {
    "reduction": (BCE, lambda loss: setattr(loss, "reduction", "sum")),
    "weight": (BCE, lambda loss: setattr(loss, "weight", torch.tensor([0.5, 2.0]))),
    "pos_weight": (BCE, lambda loss: setattr(loss, "pos_weight", torch.tensor([0.5, 2.0]))),
    "class weight": (CE, lambda loss: setattr(loss, "weight", torch.tensor([0.5, 2.0]))),
    "smoothing": (CE, lambda loss: setattr(loss, "label_smoothing", 0.2)),
    "ignore_index": (CE, lambda loss: setattr(loss, "ignore_index", 1)),
    "forward": (CE, lambda loss: setattr(loss, "forward", lambda x, t: x.sum())),
}


@pytest.mark.parametrize(("make", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_a_later_change_does_what_it_does_to_the_original(make, change):
    loss, original, report = pair(make)
    target = torch.ones(12, dtype=torch.long) if make is CE else torch.tensor(1.0).expand_as(X)
    for each in (loss, original):
        change(each)
    torch.testing.assert_close(loss(X, target), original(X, target), rtol=0, atol=0, equal_nan=True)
    assert served(report) == 0
    again = fastda.optimize(copy.deepcopy(original))
    assert not again.replaced


def test_patches_of_torch_are_honoured(monkeypatch):
    loss, _, report = pair(CE)
    target = torch.ones(12, dtype=torch.long)
    with monkeypatch.context() as patched:
        patched.setattr(F, "cross_entropy", lambda *args, **kwargs: "patched")
        assert loss(X, target) == "patched"
    with monkeypatch.context() as patched:
        patched.setattr(nn.CrossEntropyLoss, "forward", lambda *args: "patched")
        assert loss(X, target) == "patched"
    assert served(report) == 0


def test_transforms_modes_and_compilers_take_torchs():
    loss, original, report = pair(BCE)
    target = torch.tensor(1.0).expand_as(X)
    grads = [torch.func.grad(lambda x, each=each: each(x, target))(X) for each in (loss, original)]
    assert torch.equal(*grads)
    assert torch.equal(torch.compile(loss, backend="eager", fullgraph=True)(X, target), original(X, target))
    with torch.device("meta"):
        assert loss(X, target).item() == original(X, target).item()
    with pytest.raises(AttributeError, match=r"call report.undo\(\) before torch.jit.script"):
        torch.jit.script(loss)
    assert served(report) == 0
    assert inspect.signature(loss.forward) == inspect.signature(original.forward)
    again = copy.deepcopy(loss)
    again.reduction = "sum"
    assert torch.equal(again(X, target), F.binary_cross_entropy_with_logits(X, target, reduction="sum"))


def test_what_is_said_of_losses_that_are_left():
    model = nn.ModuleDict(
        {"bce": nn.BCELoss(), "sum": nn.CrossEntropyLoss(reduction="sum"), "mse": nn.MSELoss()}
    )
    report = fastda.optimize(model)
    assert {e.path: e.what for e in report.left} == {
        "bce": "clamps the logarithms of probabilities, as no loss of logits does; "
        "if the logits are at hand: nn.BCEWithLogitsLoss() or fastda.patch_discriminator_loss",
        "sum": "reduction 'sum'",
    }


@pytest.mark.gain
def test_a_small_map_takes_torchs_and_the_report_says_from_where():
    loss, original, report = pair(BCE)
    assert [e.what for e in report.replaced] == [
        "mean to one expanded label → patch loss bce, in calls of 16,384 patches or more"
    ]
    small, large = torch.randn(1, 1, 30, 30), torch.randn(16, 1, 32, 32)
    label = torch.tensor(1.0)
    assert torch.equal(loss(small, label.expand_as(small)), original(small, label.expand_as(small)))
    compare(loss, original, large, label.expand_as(large))
    assert report.calls() == {"": (1, 2)}
