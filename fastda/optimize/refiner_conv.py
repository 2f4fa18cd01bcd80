"""Convolutions and residual blocks in a model that exists."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastda import _torch
from fastda.ops.refiner_conv import conv_same, refiner_block
from fastda.optimize.common import Optimized, Refused, entry, of_torch, parts, prove, random
from fastda.optimize.report import Entry, Report

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Where the convolutions were measured to be faster than PyTorch's, on the CPU (docs/performance.md).
FAST_KERNELS = (3, 7)
LEAST_CHANNELS = 16
LEAST_SIZE = 4
# They go by tiles of 4×4 pixels, of which one pixel in so many must be wanted. And they have a fixed cost:
# a call must be of so many products of a tap.
WANTED_OF = 2
LEAST_PRODUCTS = 1 << 18


def serve(report: Report, path: str, module: nn.Module) -> None:
    """Serve a residual block, a convolution, or the pairs of convolution and ReLU in a Sequential."""
    if not of_torch(type(module)):
        _serve_block(report, path, module)
    if type(module) is nn.Conv2d:
        _serve_convolution(report, path, module)
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        _serve_chain(report, path, module)


def _is_real(x: Any) -> bool:
    """Whether x is a tensor; torch.fx has other things there, and torch.jit.trace notes every step."""
    return isinstance(x, Tensor) and not _torch.tracing()


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution of x is one that the operators serve; if not, the original knows what to do."""
    return (
        x.dim() == 4
        and x.shape[1] == weight.shape[1]
        and x.device == weight.device
        and x.dtype in _DTYPES
        and (x.dtype == weight.dtype or _torch.autocast_dtype(x.device.type) is not None)
    )


def _pays(x: Tensor, weight: Tensor, border: int = 0) -> bool:
    """Whether a convolution of x is faster than PyTorch's, where a border of the result is not wanted."""
    n, _, height, width = x.shape
    h, w = height - 2 * border, width - 2 * border
    tiles = n * (-(-height // 4)) * (-(-width // 4))
    # Sizes that are open to a compiler are taken to be large enough.
    return not (
        _torch.known(h < LEAST_SIZE)
        or _torch.known(w < LEAST_SIZE)
        or _torch.known(WANTED_OF * n * h * w < 16 * tiles)
        or _torch.known(n * h * w * weight.shape[0] * weight.shape[1] < LEAST_PRODUCTS)
    )


def _no_gain(*weights: tuple[int, ...]) -> str | None:
    """Why convolutions with weights of these shapes are no faster; None if they are."""
    for out_channels, in_channels, k, *_ in weights:
        if k not in FAST_KERNELS:
            return f"no faster with {k}×{k} kernels"
        if min(out_channels, in_channels) < LEAST_CHANNELS:
            return f"no faster with less than {LEAST_CHANNELS} channels"
    return None


def _padding(conv: nn.Conv2d) -> int | None:
    """How many pixels it pads on every side; None if not everywhere the same."""
    if conv.padding == "same":
        return conv.kernel_size[0] // 2
    sides = (0, 0) if conv.padding == "valid" else conv.padding
    return int(sides[0]) if sides[0] == sides[1] else None


def _refusal(conv: nn.Conv2d) -> str | None:
    """Why `conv_same` does not serve this layer; None if it does."""
    k = conv.kernel_size[0]
    if conv.kernel_size != (k, k) or k % 2 == 0:
        return f"kernel {conv.kernel_size} is not square and odd"
    if conv.stride != (1, 1):
        return f"stride {conv.stride}"
    padding = _padding(conv)
    if padding is None or padding > k // 2:
        return f"padding {conv.padding} with kernel {conv.kernel_size}"
    if conv.dilation != (1, 1):
        return f"dilation {conv.dilation}"
    if conv.groups != 1:
        return f"groups {conv.groups}"
    if conv.weight.dtype not in _DTYPES:
        return f"dtype {conv.weight.dtype}"
    if conv.weight.is_meta:
        return "on the meta device"
    return _no_gain(conv.weight.shape)


def _serves(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether this call of the layer is one for `_convolve`; nothing was measured away from the CPU."""
    border = conv.kernel_size[0] // 2 - (_padding(conv) or 0)
    return _fits(x, conv.weight) and x.device.type == "cpu" and _pays(x, conv.weight, border)


def _convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """The layer's result. What `conv_same` pads more than the layer does is a border that is cut off."""
    padding = _padding(conv) or 0
    border = conv.kernel_size[0] // 2 - padding
    if padding and conv.padding_mode != "zeros":
        x = F.pad(x, (padding,) * 4, mode=conv.padding_mode)
        border += padding
    y = conv_same(x, weight, bias, relu=relu)
    return F.pad(y, (-border,) * 4) if border else y


def _pair(module: Any, following: Any) -> bool:
    """Whether these two layers are a convolution and a ReLU that one operator can serve."""
    return (
        type(module) is nn.Conv2d
        and type(following) is nn.ReLU
        and _refusal(module) is None
        and not _torch.has_hooks(module)
        and not _torch.has_hooks(following)
    )


class _Chain(Optimized, nn.Sequential):
    """nn.Sequential, each convolution and the ReLU behind it in one operator."""

    def forward(self, input: Tensor) -> Tensor:
        if not _is_real(input):
            return super().forward(input)
        modules = [*self, None]
        i = 0
        while i < len(modules) - 1:
            module = modules[i]
            if _pair(module, modules[i + 1]) and _serves(module, input):
                input = _convolve(module, input, module.weight, module.bias, relu=True)
                i += 2
            else:
                input = module(input)
                i += 1
        return input

    def served(self) -> list[nn.Module]:
        return [layer for pair in itertools.pairwise(self) if _pair(*pair) for layer in pair]


class _Convolution(Optimized, nn.Conv2d):
    """nn.Conv2d by conv_same."""

    def forward(self, input: Tensor) -> Tensor:
        if _is_real(input) and _refusal(self) is None and _serves(self, input):
            return _convolve(self, input, self.weight, self.bias, relu=False)
        return super().forward(input)


def _prove_convolution(conv: nn.Conv2d, relu: bool) -> None:
    def original(x: Tensor, **parameters: Tensor) -> Tensor:
        y = torch.func.functional_call(conv, parameters, x)
        return F.relu(y) if relu else y

    def fast(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _convolve(conv, x, weight, bias, relu)

    k = conv.kernel_size[0]
    tensors = {"x": random(2, conv.in_channels, k + 3, k + 6), **dict(conv.named_parameters())}
    prove("conv_same", original, fast, tensors, conv.weight)


def _serve_convolution(report: Report, path: str, conv: nn.Conv2d) -> None:
    try:
        if reason := _refusal(conv):
            raise Refused(reason)
        _prove_convolution(conv, relu=False)
    except Refused as reason:
        report.left.append(Entry(path, "Conv2d", str(reason)))
    else:
        report.replaced.append(Entry(path, "Conv2d", "convolution → conv_same"))
        report.change(path, conv, "__class__", _Convolution.subclass(nn.Conv2d))


def _serve_chain(report: Report, path: str, chain: nn.Sequential) -> None:
    convolutions: list[Any] = [pair[0] for pair in itertools.pairwise(chain) if _pair(*pair)]
    name = type(chain).__name__
    try:
        for conv in convolutions:
            _prove_convolution(conv, relu=True)
    except Refused as reason:
        report.left.append(Entry(path, name, str(reason)))
        return
    if convolutions:
        report.replaced.append(Entry(path, name, f"convolution + ReLU → conv_same ({len(convolutions)}×)"))
        report.change(path, chain, "__class__", _Chain.subclass(type(chain)))


class _Block(Optimized):
    """A residual block by refiner_block, or by two conv_same where no ReLU follows the addition."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        unchanged, parameters, relu = self._plan
        x: Any = inputs[0] if len(inputs) == 1 and not named else None
        if _is_real(x) and all(part.holds(self) for part in unchanged):
            given = {name: _get(self, path) for name, path in parameters}
            if _fits(x, given["weight1"]) and _pays(x, given["weight1"]):
                return _block(x, **given, relu=relu)
        return super().forward(*inputs, **named)

    def served(self) -> list[nn.Module]:
        return list(self.modules())


def _block(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    *,
    relu: bool,
) -> Tensor:
    if relu:
        return refiner_block(x, weight1, bias1, weight2, bias2)
    return conv_same(conv_same(x, weight1, bias1, relu=True), weight2, bias2, residual=x)


def _get(module: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        module = getattr(module, name)
    return module


def _trace(module: nn.Module, channels: int) -> tuple[list[Any], list[Any]]:
    """Placeholders (parameters in their order, then the input) and operations of the module's graph."""
    from torch.fx.experimental.proxy_tensor import make_fx

    names, values = zip(*((n, p.detach()) for n, p in module.named_parameters()), strict=True)

    def run(values: list[Tensor], x: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    x = random(2, channels, 6, 9).to(values[0])
    graph = make_fx(torch.func.functionalize(run))(list(values), x).graph
    aten = torch.ops.aten
    operations = [n for n in graph.nodes if n.target not in (aten.alias.default, aten.detach.default)]
    return [n for n in operations if n.op == "placeholder"], [n for n in operations if n.op != "placeholder"]


def _read_block(module: nn.Module, channels: int) -> tuple[dict[str, str], bool]:
    """The names of weight1, bias1, weight2, bias2, and whether a ReLU is behind the addition."""
    try:
        placeholders, (*operations, output) = _trace(module, channels)
    except Exception as problem:  # whatever the author's code raises
        raise Refused(f"cannot be traced: {problem}") from problem
    computes = [n.target.__name__.partition(".")[0] for n in operations]
    block = ["convolution", "relu", "convolution", "add"]
    if computes not in (block, [*block, "relu"]):
        raise Refused(f"computes {', '.join(computes)}")
    conv1, relu1, conv2, add, *last = operations
    x = placeholders[-1]
    wired = (
        conv1.args[0] is x
        and relu1.args == (conv1,)
        and conv2.args[0] is relu1
        and set(add.args) == {conv2, x}
        and not add.kwargs
        and all(n.args == (add,) for n in last)
        and output.args[0] in (operations[-1], [operations[-1]])
    )
    parameters = dict(zip(placeholders, module.named_parameters(), strict=False))
    names = {}
    for i, conv in ((1, conv1), (2, conv2)):
        _, weight, bias, *setting = conv.args
        k = parameters[weight][1].shape[-1]
        wired &= setting == [[1, 1], [k // 2] * 2, [1, 1], False, [0, 0], 1]
        wired &= k % 2 == 1 and parameters[weight][1].shape[2] == k
        names[f"weight{i}"] = parameters[weight][0]
        if bias is not None:
            names[f"bias{i}"] = parameters[bias][0]
    if not wired:
        raise Refused("its convolutions and addition are not those of a residual block")
    return names, bool(last)


def _plan_block(module: nn.Module, channels: int) -> tuple[Any, ...]:
    if entry(type(module)) != "forward":
        raise Refused("overrides __call__")
    unchanged = parts(module)
    # What it computes must not depend on its mode; and tracing must not leave anything behind in it.
    shell = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    if type(shell) is not type(module):
        raise Refused("cannot be copied")
    names, relu = _read_block(shell.train(), channels)
    if (names, relu) != _read_block(shell.eval(), channels):
        raise Refused("computes other things in training than in evaluation")
    parameters = dict(module.named_parameters())

    def original(x: Tensor, **tensors: Tensor) -> Tensor:
        return torch.func.functional_call(shell, {names[n]: t for n, t in tensors.items()}, (x,))

    tensors = {"x": random(2, channels, 6, 9), **{n: parameters[path] for n, path in names.items()}}
    prove("refiner_block", original, functools.partial(_block, relu=relu), tensors, tensors["weight1"])
    if reason := _no_gain(*(tensors[n].shape for n in ("weight1", "weight2"))):
        raise Refused(reason)
    return unchanged, tuple((n, tuple(path.split("."))) for n, path in names.items()), relu


def _serve_block(report: Report, path: str, module: nn.Module) -> None:
    parameters = list(module.parameters())
    weights = [p.shape for p in parameters if p.dim() == 4]
    if (
        len(weights) != 2
        or weights[0][:2] != weights[1][1::-1]
        or len(parameters) > 4
        or list(module.buffers())
    ):
        return
    name, reasons = type(module).__name__, []
    for channels in dict.fromkeys(shape[1] for shape in weights):  # either may be the first
        try:
            plan = _plan_block(module, channels)
        except Refused as reason:
            reasons.append(str(reason))
        else:
            what = "residual block → " + ("refiner_block" if plan[-1] else "2 × conv_same, no ReLU behind it")
            report.replaced.append(Entry(path, name, what))
            report.change(path, module, "__class__", _Block.subclass(type(module), plan))
            return
    report.left.append(Entry(path, name, f"residual block? {reasons[0]}"))
