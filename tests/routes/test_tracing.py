"""Every module through traces, exporters and symbolic tracing: a table of module × route."""

import io
import logging

import pytest
import torch
from torch import nn

import fastda
from fastda import backend, compatibility
from tests.routes.cases import MODULES, assert_same, expected, results

pytestmark = [
    pytest.mark.isa_independent,
    pytest.mark.filterwarnings("ignore:`torch.jit.trace"),
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export"),
]
every_module = pytest.mark.parametrize("name", MODULES)


def made(name):
    make, arguments = MODULES[name]
    return make(), arguments()


def test_every_name_is_in_the_table():
    names = {name.split(",")[0].split(".")[0] for name in MODULES}
    stateful = {"ImageHistoryBuffer", "ImagePool"}
    assert names | stateful == set(fastda.nn.__all__) | set(compatibility.__all__)


@every_module
@pytest.mark.parametrize("gradients", [True, False], ids=["jit", "jit without gradients"])
def test_jit(name, gradients):
    module, arguments = made(name)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(module, arguments, check_trace=False)
    assert {node.kind().split("::")[0] for node in traced.inlined_graph.nodes()} <= {"aten", "prim"}
    assert "PythonOp" not in str(traced.inlined_graph)
    for seed in range(2):
        torch.manual_seed(seed)
        arguments = MODULES[name][1]()
        right = expected(module, arguments)
        assert_same(results(traced, arguments), right)


@every_module
def test_fx(name):
    module, arguments = made(name)
    traced = torch.fx.symbolic_trace(module)
    right = expected(module, arguments)
    assert_same(results(traced, arguments), right)


@every_module
@pytest.mark.parametrize("gradients", [True, False], ids=["export", "export without gradients"])
def test_export(name, gradients):
    module, arguments = made(name)
    arguments = tuple(a.detach() for a in arguments)
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(module, arguments)
    if gradients:
        assert "fastda" not in str(program.graph)
        arguments = MODULES[name][1]()
    again = program.module()
    with torch.set_grad_enabled(gradients):
        right = expected(module, arguments)  # first, since the program shares the buffers
        assert_same(results(again, arguments), right)


@pytest.mark.skipif(backend.native is None, reason="the native extension is not built")
@pytest.mark.parametrize("name", ["Refiner", "RefinerBlock", "PatchDiscriminatorLoss"])
def test_what_is_exported_without_gradients_has_the_kernels(name):
    module, arguments = made(name)
    with torch.no_grad():
        assert "fastda" in str(torch.export.export(module, arguments).graph)


# -- ONNX ----------------------------------------------------------------------------------------------------


def run_onnx(model, arguments):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    assert {node.domain for node in onnx.load_from_string(model).graph.node} <= {"", "ai.onnx"}
    session = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
    feed = zip(session.get_inputs(), arguments, strict=True)
    return [torch.as_tensor(o) for o in session.run(None, {i.name: a.detach().numpy() for i, a in feed})]


@every_module
def test_onnx_by_trace(name):
    pytest.importorskip("onnx", reason="onnx is not installed")
    module, arguments = made(name)
    module.eval()
    file = io.BytesIO()
    torch.onnx.export(module, arguments, file, dynamo=False)
    with torch.no_grad():
        assert_same(run_onnx(file.getvalue(), arguments), expected(module, arguments))


class Together(nn.Module):
    def __init__(self, modules):
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, arguments):
        return [part(*a) for part, a in zip(self.parts, arguments, strict=True)]


@pytest.fixture(scope="module")
def exported_together():
    """One export for all modules, since each costs seconds: by name the outputs and the right ones."""
    pytest.importorskip("onnxscript", reason="onnxscript, which torch exports with, is not installed")
    modules = {name: make().eval() for name, (make, _) in MODULES.items()}
    arguments = {name: MODULES[name][1]() for name in MODULES}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = torch.onnx.export(
        Together(modules.values()).eval(), (list(arguments.values()),), dynamo=True, verbose=False
    )
    outputs = run_onnx(
        program.model_proto.SerializeToString(), [a for group in arguments.values() for a in group]
    )
    with torch.no_grad():
        right = {name: expected(modules[name], arguments[name]) for name in MODULES}
    return {name: ([outputs.pop(0) for _ in right[name]], right[name]) for name in MODULES}


@every_module
def test_onnx_by_export(name, exported_together):
    assert_same(*exported_together[name])


# -- what keeps a state --------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["jit", "fx", "export", "onnx"])
def test_a_history_says_that_it_cannot_be_recorded(route):
    history, batch = fastda.nn.ImageHistoryBuffer(4), torch.rand(2, 1, 3, 3)
    routes = {
        "jit": lambda: torch.jit.trace(history, batch),
        "fx": lambda: torch.fx.symbolic_trace(history),
        "export": lambda: torch.export.export(history, (batch,)),
        "onnx": lambda: torch.onnx.export(history, (batch,), io.BytesIO(), dynamo=False),
    }
    with pytest.raises(RuntimeError, match="ImageHistoryBuffer: its state and its draws cannot be traced"):
        routes[route]()
    assert len(history) == 0
    # In torch 2.11 an export that raises leaves a hook on this module's buffers, for fake tensors alone.
    torch.nn.modules.module._global_buffer_registration_hooks.clear()
    torch._dynamo.reset()
    torch.compile(history, backend="eager")(batch)
    assert len(history) == 2
