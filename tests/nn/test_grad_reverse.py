"""The modules of gradient reversal, their schedule, and domain classifiers."""

import copy
import io
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastda
from fastda.nn import DomainClassifier, GradientReversal, ScheduledGradientReversal
from tests.common import (
    both_routes,
    check_error,
    compiled,
)
from tests.ops.grad_reverse import ROOT, grads_of, independent, leaf


def reversal_of(layer, x):
    """The factor by which `layer` multiplies a gradient."""
    (dx,) = grads_of(layer(x), x)
    return dx.unique().item()


@independent
def test_module_with_a_float_scale():
    layer, x = fastda.nn.GradientReversal(0.5), leaf(4, 3)
    assert reversal_of(layer, x) == -0.5
    assert layer.state_dict() == {}
    assert repr(layer) == "GradientReversal(scale=0.5)"
    layer.scale = 0.25
    assert reversal_of(layer, x) == -0.25
    assert reversal_of(GradientReversal(), x) == -1.0


@independent
def test_module_with_a_tensor_scale():
    layer, x = GradientReversal(torch.tensor(0.5)), leaf(4, 3)
    assert reversal_of(layer, x) == -0.5
    assert list(layer.state_dict()) == ["scale"]
    layer.scale.fill_(0.25)
    assert reversal_of(layer, x) == -0.25
    assert repr(layer) == "GradientReversal(scale=0.25)"
    assert layer.double().scale.dtype == torch.float64
    layer = GradientReversal(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(grads_of(layer(x), x)[0][:, 0], -layer.scale)


@independent
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: GradientReversal(torch.tensor(1.0, requires_grad=True)),
            ValueError,
            "GradientReversal: scale is a constant and must not require grad; "
            "pass scale.detach() if that is meant",
        ),
        (
            lambda: GradientReversal("1"),
            TypeError,
            "GradientReversal: scale must be a float or a tensor, got str",
        ),
        (
            lambda: ScheduledGradientReversal(0),
            ValueError,
            "ScheduledGradientReversal: max_steps must be at least 1, got 0",
        ),
        (
            lambda: ScheduledGradientReversal(1.5),
            TypeError,
            "ScheduledGradientReversal: max_steps must be an int, got float",
        ),
        (
            lambda: ScheduledGradientReversal(True),
            TypeError,
            "ScheduledGradientReversal: max_steps must be an int, got bool",
        ),
        (
            lambda: ScheduledGradientReversal(5, gamma=0.0),
            ValueError,
            "ScheduledGradientReversal: gamma must be positive and finite, got 0.0",
        ),
        (
            lambda: ScheduledGradientReversal(5, gamma=math.nan),
            ValueError,
            "ScheduledGradientReversal: gamma must be positive and finite, got nan",
        ),
        (
            lambda: DomainClassifier(0),
            ValueError,
            "DomainClassifier: in_features must be at least 1, got 0",
        ),
        (
            lambda: DomainClassifier(3, num_domains=0),
            ValueError,
            "DomainClassifier: num_domains must be at least 1, got 0",
        ),
        (
            lambda: DomainClassifier(3, num_layers=-1),
            ValueError,
            "DomainClassifier: num_layers must be at least 0, got -1",
        ),
    ],
)
def test_errors_of_modules(make, error, message):
    check_error(make, {}, error, message)


def dann_scale(step, max_steps, gamma=10.0, low=0.0, high=1.0):
    p = min(step / max_steps, 1.0)
    return low + (high - low) * (2 / (1 + math.exp(-gamma * p)) - 1)


@independent
@both_routes
@pytest.mark.parametrize(
    "options", [{}, {"gamma": 5.0, "low": 0.1, "high": 2.0}, {"low": 1.0, "high": 0.0}], ids=str
)
def test_schedule_is_that_of_dann(options):
    layer, x = ScheduledGradientReversal(20, **options), leaf(2)
    for step in range(25):
        assert reversal_of(layer, x) == pytest.approx(-dann_scale(step, 20, **options), abs=1e-6)
        assert layer.steps.item() == step
        layer.step()


@independent
@both_routes
def test_schedule_moves_on_between_forward_and_backward():
    layer, x = ScheduledGradientReversal(10), leaf(3)
    for step in range(5):
        y = layer(x)
        layer.step()
        assert grads_of(y, x)[0][0].item() == pytest.approx(-dann_scale(step, 10), abs=1e-6)


@independent
def test_schedule_goes_with_the_module():
    layer = ScheduledGradientReversal(10, high=0.5)
    for _ in range(3):
        layer.step()
    assert list(layer.state_dict()) == ["scale", "steps"]
    assert layer.to("meta").scale.device.type == "meta"
    assert repr(layer) == "ScheduledGradientReversal(max_steps=10, gamma=10.0, low=0.0, high=0.5)"

    layer = ScheduledGradientReversal(10, high=0.5)
    for _ in range(3):
        layer.step()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    resumed = ScheduledGradientReversal(10, high=0.5)
    resumed.load_state_dict(torch.load(file))
    copies = [resumed, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    x = leaf(2)
    for other in (*copies, layer):
        other.step()
        assert reversal_of(other, x) == pytest.approx(-0.5 * dann_scale(4, 10), abs=1e-6)
        assert other.steps.item() == 4
    half = copy.deepcopy(layer).bfloat16()
    half.step()
    assert (half.scale.dtype, half.steps.dtype) == (torch.bfloat16, torch.int64)
    assert half.scale.item() == pytest.approx(0.5 * dann_scale(5, 10), rel=4e-3)


@independent
@pytest.mark.parametrize("make", [lambda: GradientReversal(0.5), lambda: GradientReversal(torch.tensor(0.5))])
def test_copies_of_modules(make):
    x = leaf(3)
    layer = make()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert reversal_of(other, x) == -0.5
        if isinstance(layer.scale, torch.Tensor):
            other.scale.fill_(3.0)
        assert reversal_of(layer, x) == -0.5


@independent
def test_one_compilation_serves_a_whole_schedule():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), ScheduledGradientReversal(10), DomainClassifier(8, 6, dropout=0.0)
    )
    plain = copy.deepcopy(net)
    fast, counter = compiled(net, "aot_eager")
    for _ in range(12):
        x = torch.randn(5, 4)
        for model, module in ((fast, net), (plain, plain)):
            module.zero_grad()
            model(x).square().sum().backward()
            module[2].step()
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    assert counter.frame_count == 1


@independent
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    for layer in (GradientReversal(0.5), ScheduledGradientReversal(10)):
        net = nn.Sequential(nn.Linear(3, 4), layer, DomainClassifier(4, 5)).eval()
        x = torch.randn(2, 3)
        program = torch.export.export(net, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), net(x))


DDP = """
import os, sys, torch, torch.distributed as dist
from torch import nn
from fastda.nn import DomainClassifier, GradientReversal, ScheduledGradientReversal
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.Tanh(), ScheduledGradientReversal(4), DomainClassifier(8, 6, dropout=0.0),
        nn.Tanh(), nn.Linear(1, 8), GradientReversal(0.3), nn.Linear(8, 1),
    )
data = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
alone, shared = net(), nn.parallel.DistributedDataParallel(net())
for step in range(3):
    for model, x in ((alone, data), (shared, data[rank::2])):
        module = getattr(model, "module", model)
        module[2].step()
        model.zero_grad()
        model(x).square().mean().backward()
    for p, q in zip(alone.parameters(), shared.module.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
        assert p.grad.abs().max() > 0
print("same gradients")
dist.destroy_process_group()
"""


@independent
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_ddp(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DDP]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], env=env, stdout=-1, stderr=-2, text=True
        )
        for rank in range(2)
    ]
    for process in running:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
        assert "same gradients" in out


@independent
def test_domain_classifier():
    net = DomainClassifier(7)
    assert [type(m).__name__ for m in net] == ["Linear", "ReLU", "Dropout"] * 2 + ["Linear"]
    assert [m.weight.shape for m in net if isinstance(m, nn.Linear)] == [(1024, 7), (1024, 1024), (1, 1024)]
    assert net[2].p == 0.5
    assert DomainClassifier(7, 5, num_layers=0)(torch.randn(3, 7)).shape == (3, 1)
    for domains in (1, 2, 3, 5):
        net = DomainClassifier(7, 5, num_layers=3, dropout=0.0, num_domains=domains)
        logits = net(torch.randn(4, 7))
        assert logits.shape == (4, domains)
        if domains > 1:
            F.cross_entropy(logits, torch.arange(4) % domains).backward()
        else:
            F.binary_cross_entropy_with_logits(logits[:, 0], torch.rand(4)).backward()
        assert all(p.grad.abs().sum() > 0 for p in net.parameters())


@independent
@both_routes
def test_domain_classifier_learns_and_the_features_unlearn():
    """Behind a reversal the loss of three domains falls for the classifier and rises for the features."""
    torch.manual_seed(0)
    domains = torch.arange(96) % 3
    x = torch.randn(96, 6) + F.one_hot(domains, 6) * 2
    features, classifier = nn.Linear(6, 6), DomainClassifier(6, 16, num_layers=1, dropout=0.0, num_domains=3)
    net = nn.Sequential(features, GradientReversal(1.0), classifier)

    def loss():
        return F.cross_entropy(net(x), domains)

    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.5)
    before = loss().item()
    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    learnt = loss().item()
    optimizer = torch.optim.SGD(features.parameters(), lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert learnt < 0.5 * before
    assert loss().item() > learnt
