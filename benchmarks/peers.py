"""Contenders that need further packages: inference engines, and published gradient-reversal layers.

Each is a provider (see fastda.tools.bench). A missing package is a note in the results, not an error.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastda.tools.bench import Contenders, Frozen, Provider, Task
from fastda.tools.workloads import Case


def _inference_of_refiner(task: Task) -> bool:
    case = task.case
    refiner = task.workload.family == "refiner"
    return refiner and case.mode == "forward" and case.dtype == "float32" and task.device == "cpu"


def _onnx(task: Task) -> tuple[bytes, Tensor]:
    """The eager formula as an ONNX model, and its input."""
    x = next(v for v in task.arguments().values() if isinstance(v, Tensor))
    return _exported(task.case, task.seed), x


@functools.lru_cache(1)
def _exported(case: Case, seed: int) -> bytes:
    task = Task(case, seed=seed)
    arguments = task.arguments()
    model = Frozen(task.workload.formulas["eager"], arguments).eval()
    program = torch.onnx.export(model, (arguments[model.first],), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString()


def _onnxruntime(task: Task) -> Contenders:
    if not _inference_of_refiner(task):
        return
    import onnxruntime as ort

    model, x = _onnx(task)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = task.case.threads, 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input(session.get_inputs()[0].name, x.numpy())
    output = torch.empty(task.workload.formulas["eager"](**task.arguments()).shape).numpy()
    name = session.get_outputs()[0].name
    binding.bind_output(name, "cpu", 0, output.dtype.type, output.shape, output.ctypes.data)

    def run(*alive: object) -> None:  # the binding holds addresses only
        session.run_with_iobinding(binding)

    yield "ONNX Runtime", checked(task, functools.partial(run, x, output), lambda: output)


def _openvino(task: Task) -> Contenders:
    if not _inference_of_refiner(task):
        return
    import openvino as ov

    model, x = _onnx(task)
    core = ov.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": task.case.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))

    def run(*alive: object) -> None:
        request.infer()

    yield "OpenVINO", checked(task, functools.partial(run, x), lambda: request.get_output_tensor().data)


def _ncnn(task: Task) -> Contenders:
    if not _inference_of_refiner(task):
        return
    import ncnn
    import numpy as np

    arguments = {n: v.numpy() for n, v in task.arguments().items() if isinstance(v, Tensor)}
    x = arguments.pop("x")
    layers, order = _ncnn_layers(arguments)
    net = ncnn.Net()
    net.opt.num_threads = task.case.threads
    net.opt.use_vulkan_compute = False
    for name in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{name}", False)
    blobs = {blob for line in layers for blob in line.split("|")[1].split()}
    lines = [line.replace("|", " ") for line in layers]
    with tempfile.TemporaryDirectory() as folder:
        param, weights = Path(folder, "model.param"), Path(folder, "model.bin")
        param.write_text("\n".join(["7767517", f"{len(lines)} {len(blobs)}", *lines]) + "\n")
        # A weight has a flag in front, zero for float32; a bias has none.
        flag = {False: b"", True: bytes(4)}
        data = (flag["weight" in n] + np.ascontiguousarray(arguments[n]).tobytes() for n in order)
        weights.write_bytes(b"".join(data))
        if net.load_param(str(param)) or net.load_model(str(weights)):
            raise RuntimeError("ncnn did not take the model")
    images = [ncnn.Mat(image).clone() for image in x]  # it has no batch

    def run() -> list[Any]:
        out = []
        for image in images:
            extractor = net.create_extractor()
            extractor.input("in", image)
            out.append(extractor.extract("out")[1])
        return out

    yield "ncnn", checked(task, run, lambda: np.stack([np.array(m) for m in run()]))


def _ncnn_layers(arguments: dict[str, Any]) -> tuple[list[str], list[str]]:
    """ncnn's description of the model, blobs between bars; and the parameters in the order it reads them."""
    lines, order = ["Input in 0 1 |in|"], []

    def conv(prefix: str, suffix: str, source: str, target: str, relu: bool) -> None:
        names = [f"{prefix}{what}{suffix}" for what in ("weight", "bias")]
        k, _, size, _ = arguments[names[0]].shape
        order.extend(names)
        lines.append(
            f"Convolution {target} 1 1 |{source} {target}| 0={k} 1={size} 4={size // 2} 5=1 "
            f"6={arguments[names[0]].size} 9={int(relu)}"
        )

    def block(names: tuple[tuple[str, str], tuple[str, str]], source: str, target: str) -> None:
        a, b, c, d, e = (f"{target}_{i}" for i in "abcde")
        lines.append(f"Split {a} 1 2 |{source} {a} {b}|")
        conv(*names[0], a, c, True)
        conv(*names[1], c, d, False)
        lines.append(f"BinaryOp {e} 2 1 |{d} {b} {e}| 0=0")
        lines.append(f"ReLU {target} 1 1 |{e} {target}|")

    if "weight1" in arguments:
        block((("", "1"), ("", "2")), "in", "out")
        return lines, order
    conv("first_", "", "in", "h0", True)
    count = sum(name.endswith("conv1_weight") for name in arguments)
    for i in range(count):
        block(((f"blocks_{i}_conv1_", ""), (f"blocks_{i}_conv2_", "")), f"h{i}", f"h{i + 1}")
    conv("last_", "", f"h{count}", "out", False)
    return lines, order


def checked(task: Task, call: Callable[[], object], output: Callable[[], Any]) -> Callable[[], object]:
    """`call`, after its result was compared with the formula's: an engine that computes something else is no
    contender."""
    expected = task.workload.formulas["eager"](**task.arguments())
    call()
    got = torch.from_numpy(output()).reshape(expected.shape)
    error = ((got - expected).norm() / expected.norm()).item()
    if not error < 1e-3:
        raise RuntimeError(f"its result is off by {error:.1e}")
    return call


def _published(task: Task) -> Contenders:
    """Gradient-reversal layers people install."""
    if task.workload.family != "grad_reverse" or task.case.mode != "backward":
        return
    scale = task.workload.options["scale"]
    weight = torch.tensor([scale])
    yield "tllib's layer", _with_layer(task, lambda x: TllibReversal.apply(x, scale))
    yield "pytorch-adapt's layer", _with_layer(task, lambda x: _AdaptReversal.apply(x, weight))
    from pytorch_revgrad import RevGrad

    yield "pytorch-revgrad", _with_layer(task, RevGrad(alpha=scale))


def _with_layer(task: Task, layer: Callable[[Tensor], Tensor]) -> Callable[[], object]:
    if task.workload.op == "grad_reverse":
        return task.call(lambda x, scale: layer(x))
    return task.call(lambda x, weight, bias, scale: F.linear(layer(x), weight, bias))


class TllibReversal(torch.autograd.Function):
    """As in tllib (Transfer Learning Library), which no package index has: a copy forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, coefficient: float) -> Tensor:
        ctx.coefficient = coefficient
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.neg() * ctx.coefficient, None


class _AdaptReversal(torch.autograd.Function):
    """As in pytorch-adapt 0.0.83, which does not import beside a current setuptools."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * grad, None


PEERS: dict[str, Provider] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "ncnn": _ncnn,
    "published": _published,
}
