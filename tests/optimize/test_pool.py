"""Served max-pooling: every setting, every change made later, and where something is gained."""

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
module = importlib.import_module("fastda.optimize.pool")

SETTINGS = {
    "2×2": {"kernel_size": 2},
    "3×3 by 2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "overlapping": {"kernel_size": 3, "stride": 1, "padding": (1, 0)},
    "pairs": {"kernel_size": (2, 3), "stride": (2, 1), "padding": [1, 0]},
    "ceil": {"kernel_size": 2, "ceil_mode": True},
}


def pair(**settings):
    original, pool = nn.MaxPool2d(**settings), nn.MaxPool2d(**settings)
    return pool, original, fastda.optimize(pool)


def compare(pool, original, x):
    """Values and which elements have the gradient exactly; sums of gradients in any order."""
    found = []
    for each in (pool, original):
        leaf = x.detach().clone().requires_grad_()
        y = each(leaf)
        grad = torch.randn(
            y.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype, requires_grad=True
        )
        (d_x,) = torch.autograd.grad(y, leaf, grad, create_graph=True)
        found.append((y.detach(), d_x.detach(), torch.autograd.grad(d_x.square().sum(), grad)[0]))
    (y, d_x, again), (right, d_right, again_right) = found
    assert torch.equal(y.nan_to_num(7), right.nan_to_num(7)) and y.stride() == right.stride()
    assert torch.equal(d_x == 0, d_right == 0)
    torch.testing.assert_close(d_x, d_right, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again, again_right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_every_setting_of_a_pool(setting, dtype):
    pool, original, report = pair(**setting)
    for shape in ((2, 3, 9, 7), (1, 2, 4, 5), (3, 2, 4, 4)):
        x = torch.randn(shape, dtype=dtype)
        compare(pool, original, x)
        compare(pool, original, x.round())
        x[:, :, ::3, ::2] = torch.nan
        compare(pool, original, x)
        compare(pool, original, torch.full_like(x, -torch.inf))
    assert served(report) == 12


UNSERVED = {
    "return_indices": {"kernel_size": 2, "return_indices": True},
    "dilation": {"kernel_size": 2, "dilation": 2},
    "stride": {"kernel_size": 3},
    "window": {"kernel_size": 16, "stride": 2},
    "padding": {"kernel_size": 2, "padding": 2},
    "float": {"kernel_size": 2.0},
    "bool": {"kernel_size": 2, "stride": True},
}


@pytest.mark.parametrize("setting", UNSERVED.values(), ids=UNSERVED.keys())
def test_other_settings_are_pytorchs(setting):
    pool, original, report = pair(**setting)
    assert not report.replaced and "forward" not in vars(pool)
    x = torch.randn(2, 3, 20, 20)
    same(outcome(lambda: pool(x)), outcome(lambda: original(x)))


def same(got, expected):
    tensors = [v for v in (expected if isinstance(expected, tuple) else (expected,)) if torch.is_tensor(v)]
    if not tensors:
        assert got == expected
        return
    for a, b in zip(got if isinstance(got, tuple) else (got,), tensors, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


INPUTS = {
    "no batch": lambda: torch.randn(3, 6, 6),
    "channels_last": lambda: torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last),
    "one channel": lambda: torch.randn(2, 1, 6, 6),
    "a view": lambda: torch.randn(2, 3, 6, 12)[..., ::2],
    "half": lambda: torch.randn(2, 3, 6, 6).bfloat16(),
    "integers": lambda: torch.arange(72).view(2, 1, 6, 6),
    "too small": lambda: torch.randn(2, 3, 1, 6),
    "empty": lambda: torch.randn(2, 0, 6, 6),
    "meta": lambda: torch.empty(2, 3, 6, 6, device="meta"),
    "no tensor": lambda: [[1.0]],
    "a subclass": lambda: torch.randn(2, 3, 6, 6).as_subclass(type("Own", (torch.Tensor,), {})),
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())
def test_other_inputs_are_pytorchs(make):
    pool, original, report = pair(kernel_size=2)
    x = make()
    got, expected = outcome(lambda: pool(x)), outcome(lambda: original(x))
    if isinstance(expected, torch.Tensor) and expected.is_meta:
        assert got.is_meta and got.shape == expected.shape
    else:
        same(got, expected)
    assert served(report) == 0


CHANGES = {
    "kernel_size": lambda pool: setattr(pool, "kernel_size", 3),
    "stride": lambda pool: setattr(pool, "stride", 1),
    "padding": lambda pool: setattr(pool, "padding", 1),
    "dilation": lambda pool: setattr(pool, "dilation", 2),
    "ceil_mode": lambda pool: setattr(pool, "ceil_mode", True),
    "return_indices": lambda pool: setattr(pool, "return_indices", True),
    "pre-hook": lambda pool: pool.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "hook": lambda pool: pool.register_forward_hook(lambda m, a, y: y + 1),
    "class": lambda pool: setattr(
        pool, "__class__", type("Twice", (nn.MaxPool2d,), {"forward": lambda s, x: x * 2})
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_later_changes_are_followed(change):
    pool, original, _ = pair(kernel_size=2)
    x = torch.randn(2, 3, 9, 9)
    pool(x)
    change(pool)
    change(original)
    same(pool(x), original(x))


def test_a_patched_function_is_called(monkeypatch):
    pool, _, _ = pair(kernel_size=2)
    monkeypatch.setattr(F, "max_pool2d", lambda x, *a, **o: "patched")
    assert pool(torch.randn(2, 3, 4, 4)) == "patched"


def test_modes_transforms_and_traces_see_pytorchs_own():
    pool, original, report = pair(kernel_size=2)
    x, seen = torch.randn(2, 3, 6, 6), []

    class Log(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    with Log():
        pool(x)
    assert any("max_pool2d" in name for name in seen)
    assert torch.equal(torch.func.vmap(pool)(x[None]), original(x)[None])
    (tangent,) = torch.func.jvp(pool, (x,), (torch.ones_like(x),))[1:]
    assert torch.equal(tangent, torch.ones(2, 3, 3, 3))
    assert served(report) == 0
    assert torch.equal(torch.jit.trace(pool, x)(x), original(x))
    for strict in (False, True):
        for within in (pool, nn.Sequential(pool)):
            assert torch.equal(torch.export.export(within, (x,), strict=strict).module()(x), original(x))
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(pool))(x), original(x))
    assert torch.equal(torch.compile(pool, backend="aot_eager", fullgraph=True)(x), original(x))


def test_copies_pickles_and_undo():
    pool, original, report = pair(kernel_size=2)
    x = torch.randn(2, 3, 6, 6)
    for again in (copy.deepcopy(pool), copy.copy(pool), pickle.loads(pickle.dumps(pool))):
        assert type(again) is nn.MaxPool2d and vars(again)["forward"].module is again
        compare(again, original, x)
    report.undo()
    assert "forward" not in vars(pool)
    same(pool(x), original(x))


@pytest.mark.gain
@pytest.mark.parametrize(
    ("shape", "is_served"), [((128, 32, 24, 24), True), ((1, 64, 32, 32), True), ((1, 63, 32, 32), False)]
)
def test_a_small_pooling_takes_pytorchs(shape, is_served):
    pool, original, report = pair(kernel_size=2)
    x = torch.randn(shape)
    same(pool(x), original(x))
    assert report.calls() == {"": (int(is_served), 1)}
