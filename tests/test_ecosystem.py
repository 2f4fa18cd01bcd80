"""A model that `fastda.optimize` has served, in what surrounds models: compilers, exporters, trainers.

Single operators under torch.compile, export, autocast and DDP stand in their families' tests.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastda
from fastda import backend
from fastda.compatibility import GANLoss, RevGrad
from fastda.optimize.convolution import _pays as pays
from tests.common import compiled

pytestmark = pytest.mark.isa_independent
ROOT = Path(__file__).resolve().parents[1]
native = pytest.mark.skipif(backend.native is None, reason="the native extension is not built")


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


class Refiner(nn.Module):
    """Residual blocks, a convolution with its ReLU, one without, and a reversal before a head."""

    def __init__(self, channels=64, blocks=2):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, channels, 1), nn.Tanh())
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(blocks)))
        self.third = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, 1, 1)
        self.domain = nn.Sequential(RevGrad(0.5), nn.Flatten(), nn.LazyLinear(1))

    def forward(self, x):
        h = self.third(self.blocks(self.second(self.first(x))))
        return self.last(h), self.domain(h.mean((2, 3)))


def pair(**options):
    """The model as its author wrote it, and a copy that is served."""
    original = Refiner(**options)
    original(torch.randn(1, 1, 8, 8))  # the lazy layer takes its shape
    model = copy.deepcopy(original)
    report = fastda.optimize(model)
    assert len(report.replaced) == 2 + 2 * len(model.blocks)
    assert pays(
        (1, 64, 8, 8), model.third.weight.shape, 0, torch.float32
    )  # so that the smallest calls are served, too
    return model, original


def gradients(model, x):
    x = x.detach().clone().requires_grad_()
    refined, domain = model(x)
    weight = torch.linspace(-1, 2, refined.numel(), dtype=refined.dtype, device=refined.device)
    loss = (refined * weight.view(refined.shape)).sum() + domain.square().sum()
    return [refined.detach(), *torch.autograd.grad(loss, [x, *model.parameters()])]


def assert_same(actual, expected, rtol=2e-4):
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() <= rtol * e.norm() + 1e-6


# -- compilers and exporters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend_name", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_without_a_break_and_with_dynamic_shapes(backend_name):
    model, original = pair()
    fast, _ = compiled(model, backend_name, dynamic=True)

    def call(x):
        return fast(x)

    call.parameters = model.parameters
    # The number of the backend's calls says nothing: torch 2.11 makes two for one graph, as it leaves the
    # scale of the reversal open, finds it in no tensor's computation, and begins again with it as a constant.
    # Inductor compiles again, the original model too: it binds height and width in a convolution's backward.
    again = "default" if backend_name == "inductor" else "fail_on_recompile"
    for shape, stance in (((2, 1, 9, 8), "default"), ((3, 1, 12, 10), again)):
        x = torch.randn(shape)
        with torch.compiler.set_stance(stance):
            assert_same(gradients(call, x), gradients(original, x))


@native
@pytest.mark.parametrize(
    ("n", "size", "dynamic", "served"), [(2, 8, False, True), (16, 5, False, False), (2, 8, True, True)]
)
def test_compiled_convolutions_are_served_unless_they_are_known_to_be_small(n, size, dynamic, served):
    model = nn.Conv2d(64, 64, 3, padding=1)
    assert fastda.optimize(model).replaced
    graphs = []

    def keep(module, inputs):
        graphs.append(module)
        return module

    torch._dynamo.reset()
    x = torch.randn(n, 64, size, size)
    with torch.no_grad():
        y = torch.compile(model, backend=keep, fullgraph=True, dynamic=dynamic)(x)
        torch.testing.assert_close(y, F.conv2d(x, model.weight, model.bias, padding=1), rtol=1e-4, atol=1e-5)
    (graph,) = graphs
    assert ("fastda" in str(graph.code)) == served


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("trace", ["jit", "jit without gradients", "fx"])
def test_traced_models_keep_the_reversal(trace):
    model, original = pair()
    if trace == "fx":
        traced = torch.fx.symbolic_trace(model)
        assert "grad_reverse" in traced.code
    else:
        with torch.set_grad_enabled(trace == "jit"):
            traced = torch.jit.trace(model, (torch.randn(2, 1, 9, 8),))
        kinds = {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()}
        assert kinds == {"aten", "prim"}
        assert "PythonOp" not in str(traced.inlined_graph)
    for shape in ((2, 1, 9, 8), (3, 1, 12, 10)):
        x = torch.randn(shape)
        assert_same(gradients(traced, x), gradients(original, x))


@native
def test_aotinductor_packages_load_and_run(tmp_path):
    """The package calls fastda's operators, in this process, where they are registered."""
    model = fastda.nn.Refiner(channels=16, blocks=1)
    x = torch.randn(2, 1, 8, 9)
    with torch.no_grad():
        program = torch.export.export(model.eval(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("n")}})
        assert "fastda" in str(program.graph)
        options = {"aot_inductor.compile_wrapper_opt_level": "O0"}
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "refiner.pt2"), inductor_configs=options
        )
        loaded = torch._inductor.aoti_load_package(path)
        for n in (2, 5):
            x = torch.randn(n, 1, 8, 9)
            torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


def test_onnx_has_standard_operators_alone(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript, which torch exports with, is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, original = pair()
    path = str(tmp_path / "refiner.onnx")
    x = torch.randn(2, 1, 9, 8)
    shapes = {"x": {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}}
    torch.onnx.export(model.eval(), (x,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    assert "Conv" in {node.op_type for node in graph.node}
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in ((2, 1, 9, 8), (1, 1, 35, 55)):
        x = torch.randn(shape)
        got = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for a, e in zip(got, original(x), strict=True):
            torch.testing.assert_close(torch.from_numpy(a), e.detach(), rtol=1e-4, atol=1e-5)
    assert backend.select(x) != "reference" or backend.native is None or backend._forced


# -- precision, memory, determinism --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_gradscaler(dtype):
    """As close to float32 as the original under the same autocast."""
    model, original = pair()
    exact = copy.deepcopy(original)
    criterion = GANLoss("lsgan")
    x = torch.rand(4, 1, 12, 10)

    def step(model, enabled):
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=2.0**8)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with torch.autocast("cpu", dtype, enabled=enabled):
            refined, domain = model(x)
            loss = criterion(refined, True) + domain.float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grads = [p.grad.clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert not enabled or refined.dtype == dtype
        return grads, [p.detach().clone() for p in model.parameters()]

    right, _ = step(exact, False)
    (got, after), (theirs, _) = step(model, True), step(original, True)

    def error(grads):
        return sum((a - e).norm() ** 2 for a, e in zip(grads, right, strict=True)).sqrt()

    assert error(got) <= 2 * error(theirs) + 1e-6
    assert all(a.isfinite().all() for a in after)


def test_activation_checkpointing():
    model, _ = pair()
    x = torch.randn(2, 1, 9, 8)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            for module in (self.inner.first, self.inner.second, *self.inner.blocks, self.inner.third):
                x = checkpoint(module, x, use_reentrant=False)
            h = x
            return self.inner.last(h), self.inner.domain(h.mean((2, 3)))

    for a, e in zip(gradients(Checkpointed(), x), gradients(model, x), strict=True):
        assert torch.equal(a, e)


def test_channels_last_from_end_to_end():
    model, original = pair()
    model = model.to(memory_format=torch.channels_last)
    layouts = []
    for module in (model.second, *model.blocks, model.third):
        module.register_forward_hook(
            lambda m, i, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    x = torch.randn(2, 1, 9, 8).to(memory_format=torch.channels_last)
    assert_same(gradients(model, x), gradients(original, x))
    assert layouts == [True] * 4


def test_deterministic_algorithms_are_all_there_are():
    model, original = pair()
    x = torch.randn(2, 1, 9, 8)
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        first = gradients(model, x)
        assert all(map(torch.equal, first, gradients(model, x)))
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
    assert_same(first, gradients(original, x))


# -- functional calls, copies, checkpoints -------------------------------------------------------------------


def test_torch_func_over_parameters_and_samples():
    model, original = pair()
    model, original = model.double(), original.double()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    x = torch.randn(3, 1, 8, 9, dtype=torch.float64)

    def loss(module):
        def call(parameters, sample):
            refined, domain = torch.func.functional_call(module, parameters, (sample[None],))
            return refined.square().sum() + domain.square().sum()

        return call

    def per_sample(module):
        return torch.func.vmap(torch.func.grad(loss(module)), in_dims=(None, 0))(parameters, x)

    def one_by_one():
        for sample in x:
            grads = torch.autograd.grad(
                loss(original)(dict(original.named_parameters()), sample), list(original.parameters())
            )
            yield dict(zip(parameters, grads, strict=True))

    got = per_sample(model)
    for i, expected in enumerate(one_by_one()):
        for name, value in expected.items():
            torch.testing.assert_close(got[name][i], value)


def test_checkpoints_go_both_ways_with_weights_only(tmp_path):
    model, original = pair()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    optimizer = torch.optim.Adam(model.parameters())
    gradients(model, torch.randn(1, 1, 8, 9))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pt")
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    original.load_state_dict(state["model"])
    x = torch.randn(2, 1, 9, 8)
    assert_same(gradients(model, x), gradients(original, x))
    fresh, _ = pair()
    fresh.load_state_dict(original.state_dict())
    assert all(map(torch.equal, gradients(fresh, x), gradients(model, x)))


def test_a_whole_model_saved_by_torch_save(tmp_path):
    model, _ = pair()
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    x = torch.randn(2, 1, 9, 8)
    assert all(map(torch.equal, gradients(again, x), gradients(model, x)))
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]


# -- several processes ---------------------------------------------------------------------------------------

PARALLEL = """
import sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tests.test_ecosystem import pair
kind, rank = sys.argv[1], int(sys.argv[2])
torch.use_deterministic_algorithms(False)
torch.manual_seed(0)
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=2)
model, alone = pair()
if kind == "ddp":
    model = DistributedDataParallel(model)
else:
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
data = torch.randn(4, 1, 9, 8)
for net, x in ((alone, data), (model, data[rank::2])):
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        refined, domain = net(x)
        (refined.square().mean() + domain.square().mean()).backward()
        optimizer.step()
for (name, p), q in zip(alone.named_parameters(), model.parameters(), strict=True):
    q = q.full_tensor() if kind == "fsdp" else q
    torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6, msg=lambda m: name + ": " + m)
third = (model.module if kind == "ddp" else model).third
assert third._conv_forward.served == 3, third._conv_forward.calls
print("same parameters")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_train_as_one(kind, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PARALLEL, kind]
    store = str(tmp_path / "store")
    running = [
        subprocess.Popen([*command, str(rank), store], env=env, stdout=-1, stderr=-2, text=True)
        for rank in range(2)
    ]
    for process in running:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
        assert "same parameters" in out
