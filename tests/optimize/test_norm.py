"""Served normalisation: every setting, every change made later, pairs with an activation."""

import copy
import importlib
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import fastda
from tests.optimize.helpers import outcome, served

pytestmark = pytest.mark.isa_independent
module = importlib.import_module("fastda.optimize.norm")


def without_bias():
    """As BatchNorm2d(4, bias=False), which torch 2.11 does not know yet."""
    layer = nn.BatchNorm2d(4)
    layer.bias = None
    return layer


NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch, plain": lambda: nn.BatchNorm2d(4, affine=False),
    "batch, no bias": without_bias,
    "batch, average": lambda: nn.BatchNorm2d(4, momentum=None, eps=1e-3),
    "batch, untracked": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm2d(4),
    "instance, affine": lambda: nn.InstanceNorm2d(4, affine=True, eps=1e-3),
}
ACTIVATIONS = {
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "LeakyReLU in place": lambda: nn.LeakyReLU(inplace=True),
}


def twins(*layers, dtype=torch.float64):
    """A Sequential optimized, its original and the report; parameters and buffers as after a training."""
    torch.manual_seed(0)
    original = nn.Sequential(*layers).to(dtype)
    for name, t in original.state_dict().items():
        if t.is_floating_point():
            nn.init.uniform_(t, 0.5 if name.endswith("var") else -0.5, 1.5)
    model = copy.deepcopy(original)
    return model, original, fastda.optimize(model)


def image(*shape, dtype=torch.float64, layout=torch.contiguous_format):
    x = torch.randn(*(shape or (2, 4, 6, 5)), dtype=dtype, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=layout).requires_grad_()


def step(model, x):
    """All that a training step with a gradient penalty computes."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).requires_grad_()
    first = torch.autograd.grad(y, wanted, weights, create_graph=True)
    second = torch.autograd.grad(
        sum(g.pow(3).sum() for g in first), [*wanted, weights], materialize_grads=True
    )
    state = [t.clone() for t in model.state_dict().values()]
    return [y, *first, *second, *state], (y.stride(), first[0].stride(), y.requires_grad)


def assert_same(model, original, x):
    (got, facts), (expected, right) = step(model, x), step(original, x)
    assert facts == right
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


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


class Own(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) * 2


@pytest.mark.parametrize("make", [lambda: Own(4), lambda: nn.SyncBatchNorm(4), lambda: nn.BatchNorm3d(4)])
def test_other_classes_are_not_looked_at(make):
    report = fastda.optimize(nn.Sequential(make(), nn.ReLU()))
    assert not report.replaced and not report.left


# -- what is changed later -----------------------------------------------------------------------------------


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
    for dtype in (torch.float64, torch.float32):
        x = image(dtype=dtype)
        got, expected = (outcome(lambda m=m, x=x: step(m, x)) for m in (model, original))
        if isinstance(expected[0], type):
            assert got == expected
            continue
        assert got[1] == expected[1]
        bounds = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
        for a, b in zip(got[0], expected[0], strict=True):
            torch.testing.assert_close(a, b, **bounds)


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
