"""Served normalisation after a later change, under tools, and undone."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.optimize.helpers import outcome, served
from tests.optimize.twins import NORMS, Own, assert_same, assert_same_or_raises_so, image, twins

pytestmark = pytest.mark.isa_independent


def exchange(model, i, layer):
    model[i] = layer


def patched(model, i):
    before = model[i].forward
    model[i].forward = lambda x: 2 * before(x)


def views(model):
    both = torch.ones(2, 4, dtype=torch.float64)
    model[0].running_mean, model[0].running_var = both[0], both[1]


def shared(model):
    model[0].running_mean = model[0].running_var


CHANGES = {
    "momentum": lambda m: setattr(m[0], "momentum", 0.9),
    "no momentum": lambda m: setattr(m[0], "momentum", None),
    "an integer momentum": lambda m: setattr(m[0], "momentum", 1),
    "eps": lambda m: setattr(m[0], "eps", 0.5),
    "eps of 0": lambda m: setattr(m[0], "eps", 0.0),
    "a tensor as eps": lambda m: setattr(m[0], "eps", torch.tensor(0.5)),
    "evaluation": lambda m: m.eval(),
    "evaluation of the norm": lambda m: m[0].eval(),
    "untracked": lambda m: setattr(m[0], "track_running_stats", False),
    "tracked": lambda m: setattr(m[0], "track_running_stats", True),
    "frozen": lambda m: m.requires_grad_(False),
    "half frozen": lambda m: m[0].bias.requires_grad_(False),
    "no weight": lambda m: setattr(m[0], "weight", None),
    "no bias": lambda m: setattr(m[0], "bias", None),
    "no statistics": lambda m: (setattr(m[0], "running_mean", None), setattr(m[0], "running_var", None)),
    "no mean": lambda m: setattr(m[0], "running_mean", None),
    "no count": lambda m: setattr(m[0], "num_batches_tracked", None),
    "statistics as views": views,
    "one tensor for both statistics": shared,
    "new statistics": lambda m: setattr(m[0], "running_mean", torch.full((4,), 3.0, dtype=torch.float64)),
    "statistics of another dtype": lambda m: setattr(m[0], "running_mean", torch.zeros(4)),
    "statistics as parameters": lambda m: setattr(m[0].running_mean, "requires_grad", True),
    "strided statistics": lambda m: setattr(m[0], "running_mean", torch.zeros(8, dtype=torch.float64)[::2]),
    "a bias that is the running mean": lambda m: setattr(m[0].bias, "data", m[0].running_mean),
    "reset": lambda m: m[0].reset_running_stats(),
    "a hook": lambda m: m[0].register_forward_hook(lambda module, inputs, y: y + 1),
    "a pre-hook": lambda m: m[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
    "a backward hook": lambda m: m[0].register_full_backward_hook(lambda module, i, o: (3 * i[0],)),
    "a hook of the activation": lambda m: m[1].register_forward_hook(lambda module, inputs, y: y + inputs[0]),
    "a pre-hook of the activation": lambda m: m[1].register_forward_pre_hook(lambda module, i: (i[0] * 2,)),
    "a backward hook of the activation": lambda m: m[1].register_full_backward_pre_hook(
        lambda module, o: (3 * o[0],)
    ),
    "its forward": lambda m: patched(m, 0),
    "the activation's forward": lambda m: patched(m, 1),
    "the Sequential's forward": lambda m: setattr(m, "forward", lambda x: 2 * type(m).forward(m, x)),
    "_check_input_dim": lambda m: setattr(m[0], "_check_input_dim", lambda x: x.detach().zero_()),
    "_call_impl": lambda m: setattr(m[1], "_call_impl", lambda x: x * 5),
    "another activation": lambda m: exchange(m, 1, nn.Tanh()),
    "another slope": lambda m: exchange(m, 1, nn.LeakyReLU(0.7)),
    "a slope of 0": lambda m: exchange(m, 1, nn.LeakyReLU(0.0)),
    "a negative slope": lambda m: exchange(m, 1, nn.LeakyReLU(-0.3)),
    "an activation of its own": lambda m: exchange(
        m, 1, type("Own", (nn.ReLU,), {"forward": lambda s, x: x * 7})()
    ),
    "another norm": lambda m: exchange(m, 0, nn.InstanceNorm2d(4)),
    "a group norm": lambda m: exchange(m, 0, nn.GroupNorm(2, 4).double()),
    "SyncBatchNorm": lambda m: exchange(m, 0, nn.SyncBatchNorm(4).double().eval()),
    "something between": lambda m: m.insert(1, nn.Tanh()),
    "the norm twice": lambda m: m.append(m[0]),
    "the pair twice": lambda m: m.extend([m[0], m[1]]),
    "no activation": lambda m: m.__delitem__(1),
    "another class": lambda m: setattr(m[0], "__class__", Own),
    "float": lambda m: m.float(),
}


@pytest.mark.parametrize("norm", ["batch", "instance, affine"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_later_change_does_what_it_does_to_the_original(norm, change):
    model, original, report = twins(NORMS[norm](), nn.ReLU())
    assert_same(model, original, image())
    assert served(report) == 2
    said = [outcome(lambda m=m: change(m)) for m in (model, original)]
    assert isinstance(said[1], tuple) == isinstance(said[0], tuple)
    assert_same_or_raises_so(model, original)


def test_global_hooks_see_every_layer():
    model, original, report = twins(nn.BatchNorm2d(4), nn.ReLU())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, inputs, y: seen.append(type(m).__name__)
    )
    try:
        torch.testing.assert_close(model(image()), original(image()))
    finally:
        handle.remove()
    assert seen == 2 * ["BatchNorm2d", "ReLU", "Sequential"]
    assert report.calls()[""] == (0, 0)


def test_patches_of_torch_are_honoured(monkeypatch):
    for make, names in ((nn.BatchNorm2d, ["batch_norm"]), (nn.InstanceNorm2d, ["instance_norm"])):
        model, original, report = twins(make(4), nn.ReLU())
        for owner, name in [(F, n) for n in (*names, "relu")] + [(k, "forward") for k in (make, nn.ReLU)]:
            with monkeypatch.context() as patched:
                before = getattr(owner, name)
                patched.setattr(owner, name, lambda *a, before=before, **o: before(*a, **o) + 1)
                torch.testing.assert_close(model(image()), original(image()))
        with monkeypatch.context() as patched:
            before = nn.Module.__call__
            patched.setattr(nn.Module, "__call__", lambda *a, before=before, **o: before(*a, **o) + 1)
            torch.testing.assert_close(model(image()), original(image()))
        assert report.calls()[""].served == 0


def test_modes_transforms_and_traces_see_pytorchs_own():
    model, original, report = twins(nn.BatchNorm2d(4), nn.ReLU(), nn.InstanceNorm2d(4), dtype=torch.float32)
    model.eval(), original.eval()
    x, seen = torch.randn(2, 4, 6, 6), []

    class Log(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    with Log():
        model(x)
    assert {"batch_norm", "instance_norm", "relu"} <= set(seen)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), original(x))
        assert torch.equal(model(x.bfloat16()), original(x.bfloat16()))
    close = torch.testing.assert_close
    close(torch.func.vmap(model)(x[None]), original(x)[None])
    close(*(torch.func.jvp(m, (x,), (torch.ones_like(x),))[1] for m in (model, original)))
    assert served(report) == 0
    close(torch.jit.trace(model, x)(x), original(x))
    for strict in (False, True):
        assert torch.equal(torch.export.export(model, (x,), strict=strict).module()(x), original(x))
    close(torch.fx.symbolic_trace(model)(x), original(x))
    close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), original(x))


def test_several_gradients_at_once():
    model, original, report = twins(nn.BatchNorm2d(4), nn.ReLU())
    grads = torch.randn(3, 2, 4, 6, 5, dtype=torch.float64)
    found = [
        torch.autograd.grad(m(x), x, grads, is_grads_batched=True)[0]
        for m, x in ((model, image()), (original, image()))
    ]
    torch.testing.assert_close(*found)
    assert served(report) == 2


def test_checkpoints_and_inference_mode():
    model, original, report = twins(nn.BatchNorm2d(4), nn.ReLU())
    for reentrant in (False, True):
        for each in (model, original):
            each.zero_grad()
            torch.utils.checkpoint.checkpoint(each, image(), use_reentrant=reentrant).pow(3).sum().backward()
        torch.testing.assert_close(model[0].weight.grad, original[0].weight.grad)
        torch.testing.assert_close(model.state_dict(), original.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(model(image()), original(image()))
        for each in (model, original):
            each[0].running_mean = torch.zeros(4, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(image()), original(image()))
    torch.testing.assert_close(model.state_dict(), original.state_dict())
    assert served(report) > 0


def test_copies_pickles_replicas_and_undo():
    model, original, report = twins(nn.BatchNorm2d(4), nn.ReLU())
    for again in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert vars(again)["forward"].module is again and vars(again[0])["forward"].module is again[0]
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again[0].weight.data.fill_(2.0)
        twin = copy.deepcopy(original)
        twin[0].weight.data.fill_(2.0)
        assert_same(again, twin, image())
    replica = model[0]._replicate_for_data_parallel()
    assert "forward" not in vars(replica) and "_replicate_for_data_parallel" not in vars(replica)
    report.undo()
    assert vars(model).keys() == vars(original).keys() and vars(model[0]).keys() == vars(original[0]).keys()
    assert_same(model, original, image())
