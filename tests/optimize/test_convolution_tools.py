"""Copies of served convolutions, and what other tools do with such a model."""

import copy
import importlib
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.optimize.helpers import assert_same, image, pair, results, served

pytestmark = pytest.mark.isa_independent
module = importlib.import_module("fastda.optimize.convolution")


def shallow(model):
    again = copy.copy(model)
    again._modules = {name: copy.copy(child) for name, child in model._modules.items()}
    return again


@pytest.mark.parametrize("copied", [copy.deepcopy, shallow, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_are_served_by_their_own(copied):
    model, original, report = pair(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=0))
    again = copied(model)
    x = image()
    assert_same(again, original, x)
    assert served(report) == 0
    assert again[0]._conv_forward.served == 1
    for each in (again, original):
        each[0].stride = (2, 2)
        each[1].padding = (1, 1)
    assert_same(again, original, x)
    assert model[0].stride == (1, 1)
    expected = model(x)
    del model, report
    assert_same(again, original, x)
    assert not torch.equal(expected[:, :, :1, :1], again(x)[:, :, :1, :1])


def test_replicas_of_data_parallel_use_their_own_weights():
    model, original, _ = pair(nn.Conv2d(8, 8, 3, padding=1))
    x = image()
    replica = model[0]._replicate_for_data_parallel()
    replica.weight = original[0].weight.detach() * 2
    replica.bias = original[0].bias.detach()
    torch.testing.assert_close(replica(x), F.conv2d(x, replica.weight, replica.bias, padding=1))


def test_types_names_and_state_stay_what_they_were():
    model, original, report = pair(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    before = list(model.parameters())
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert str(model) == str(original)
    assert list(model.state_dict()) == list(original.state_dict())
    report.undo()
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in original.modules()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", ["script", "trace", "export", "fx", "compile"])
def test_compilers_and_exporters(tool):
    model, original, report = pair(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), dtype=torch.float32)
    x = torch.randn(2, 8, 9, 7)
    made = {
        "script": lambda: torch.jit.script(model),
        "trace": lambda: torch.jit.trace(model, x),
        "export": lambda: torch.export.export(model, (x,)).module(),
        "fx": lambda: torch.fx.symbolic_trace(model),
        "compile": lambda: torch.compile(model, fullgraph=True, backend="aot_eager"),
    }[tool]()
    torch.testing.assert_close(made(x), original(x), rtol=1e-5, atol=1e-5)
    if tool in ("script", "trace", "export"):
        assert "fastda" not in str(made.graph)
        assert "PythonOp" not in str(made.graph)
    if tool == "fx":
        made(x)
        assert served(report) == 2


@pytest.mark.filterwarnings("ignore")
def test_quantization_fusion_and_low_rank_adapters():
    layers = (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    model, original, _ = pair(*layers, dtype=torch.float32)
    x = torch.randn(2, 8, 9, 7)
    results_ = []
    for each in (model, original):
        fused = torch.ao.quantization.fuse_modules(copy.deepcopy(each).eval(), [["0", "1", "2"]])
        prepared = copy.deepcopy(each).train()
        prepared.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
        prepared = torch.ao.quantization.prepare_qat(prepared)
        kinds = [type(m) for m in (*fused.modules(), *prepared.modules())]
        results_.append((kinds, fused(x)))
    assert results_[0][0] == results_[1][0]
    torch.testing.assert_close(results_[0][1], results_[1][1])

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.down, self.up = base, nn.Conv2d(8, 2, 3, padding=1), nn.Conv2d(2, 8, 1)
            nn.init.ones_(self.up.weight)
            nn.init.ones_(self.down.weight)
            nn.init.zeros_(self.down.bias), nn.init.zeros_(self.up.bias)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    for each in (model, original):
        each[0] = Adapter(each[0])
        each.eval()
    assert_same(model, original, x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_in_float32_only_gates_differ_by_more_than_rounding(layout):
    """Smooth activations in the place of ReLUs: there is nothing that could fall to the other side."""
    layers = [m for _ in range(6) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Softplus())]
    model, original, report = pair(*layers, dtype=torch.float32)
    exact = copy.deepcopy(original).double()
    x = torch.randn(4, 8, 12, 10)
    model, original = (m.to(memory_format=layout) for m in (model, original))
    found = [results(m, x.to(memory_format=layout)) for m in (model, original)] + [results(exact, x.double())]
    (got, expected), right = [torch.cat([g.flatten() for g in grads]) for _, grads in found[:2]], found[2][1]
    right = torch.cat([g.flatten() for g in right])
    assert served(report) == (12 if layout is torch.contiguous_format else 6)
    assert (got - right).norm() <= 10 * (expected - right).norm() <= 1e-4 * right.norm()


def test_second_derivatives():
    model, original, report = pair(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())
    x = image(1, 4, 5, 6)
    penalties = []
    for each in (model, original):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(each(leaf).sum(), leaf, create_graph=True)
        penalties.append(torch.autograd.grad(grad.square().sum(), list(each.parameters())))
    assert served(report) == 1
    for actual, expected in zip(*penalties, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
