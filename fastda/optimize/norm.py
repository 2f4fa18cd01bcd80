"""Normalisation in a model that exists: by itself, and with the (leaky) ReLU behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastda import _torch
from fastda.ops.norm import norm_act
from fastda.optimize.stand_in import (
    PLAIN,
    Found,
    StandIn,
    as_torch_has_it,
    is_alone,
    is_torchs,
    not_on_cpu,
)

# Where it was measured to be faster, on the CPU: from so many elements on, and so many pixels of an image.
LEAST_ELEMENTS = 1 << 17
LEAST_PIXELS, LEAST_PIXELS_OF_INSTANCES = 16, 196
# A batch norm in channels_last is as fast as PyTorch's alone, and faster with its activation from here on.
LEAST_ELEMENTS_OF_ROWS = 1 << 20

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(F, name) for name in ("batch_norm", "instance_norm", "relu", "leaky_relu")
}


def find(module: nn.Module) -> Iterator[Found]:
    """The stand-in of a norm, or why it is left."""
    if "forward" in vars(module):
        return
    where = f"from {LEAST_ELEMENTS:,} elements on"
    if type(module) in (nn.BatchNorm2d, nn.InstanceNorm2d):
        own = type(module) is nn.BatchNorm2d
        reason = not_on_cpu(module)
        if not own and (module.running_mean is not None or module.running_var is not None):
            reason = "has running statistics"
        if not all(map(is_torchs, _FUNCTIONS.values())):
            reason = "torch's normalisation was patched before fastda was imported"
        if reason:
            yield Found(reason)
        elif own:
            yield Found(f"batch norm → batch_norm_act, of contiguous images {where}", BatchNorm(module))
        else:
            yield Found(f"instance norm → instance_norm_act, {where}", InstanceNorm(module))


class Norm(StandIn):
    """A norm's `forward`."""

    method = "forward"
    kind: Any
    function: str

    def __call__(self, input: Tensor) -> Any:
        y = self.serve(input)
        return y if self.count(y is not None) else type(self.module).forward(self.module, input)

    def serve(self, x: Any, negative_slope: float | None = None) -> Tensor | None:
        """The norm of x and the activation behind it; None, with nothing done, where torch is to do it."""
        norm: Any = self.module
        if (
            type(x) in PLAIN
            and not is_compiling()  # a compiler has kernels of its own
            and not (torch.jit.is_tracing() or _torch.modes_active() or _torch.transforms_active())
            and x.is_cpu
            and x.layout is torch.strided
            and not x.is_nested
            and x.dtype in (torch.float32, torch.float64)
            and x.dim() == 4
            and x.numel() >= max(1, LEAST_ELEMENTS)
            and x.shape[2] * x.shape[3] >= max(2, LEAST_PIXELS)
            and not torch.is_autocast_enabled("cpu")
            and type(norm) is self.kind
            and as_torch_has_it(norm, self.kind)
            and getattr(F, self.function) is _FUNCTIONS[self.function]
            and type(norm.eps) is float
            and 0 < norm.eps < math.inf
            and all(_is_one_a_channel(t, x) for t in (norm.weight, norm.bias))
        ):
            return self.compute(norm, x, negative_slope)
        return None

    def compute(self, norm: Any, x: Tensor, negative_slope: float | None) -> Tensor | None:
        raise NotImplementedError

    def run(self, norm: Any, x: Tensor, *settings: Any) -> Tensor:
        mean, variance, training, momentum, negative_slope = settings
        return norm_act(
            *(self.function, self.kind is nn.InstanceNorm2d, x, norm.weight, norm.bias, mean, variance),
            *(training, momentum, norm.eps, None, negative_slope),
            saves_as_torch=True,
        )


def _is_one_a_channel(t: Any, x: Tensor) -> bool:
    return t is None or (
        type(t) in PLAIN
        and t.dtype == x.dtype
        and t.is_cpu
        and t.layout is torch.strided
        and t.dim() == 1
        and t.shape[0] == x.shape[1]
    )


def _is_contiguous(x: Tensor) -> bool:
    """Contiguous, and not channels_last in the same strides."""
    return x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)


class BatchNorm(Norm):
    """`nn.BatchNorm2d.forward` by batch_norm_act."""

    kind, function = nn.BatchNorm2d, "batch_norm"

    def compute(self, norm: Any, x: Tensor, negative_slope: float | None) -> Tensor | None:
        momentum, training, tracking = norm.momentum, norm.training, norm.track_running_stats
        if not _is_contiguous(x):
            rows = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
            if negative_slope is None or not rows or x.numel() < LEAST_ELEMENTS_OF_ROWS:
                return None
        if not (momentum is None or type(momentum) is float):
            return None
        # As torch's forward has it.
        mean, variance = norm.running_mean, norm.running_var
        own = training or (mean is None and variance is None)
        if training and not tracking:
            mean = variance = None
        if (mean is None) != (variance is None):
            return None
        if mean is not None and not _are_statistics(mean, variance, x, norm.weight, norm.bias):
            return None
        if training and tracking and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(norm.num_batches_tracked)
        return self.run(norm, x, mean, variance, own, momentum or 0.0, negative_slope)


def _are_statistics(mean: Any, variance: Any, x: Tensor, *read: Any) -> bool:
    """Whether these are what torch's kernel writes, and share no memory with what it reads meanwhile."""
    for t in (mean, variance):
        if not (
            _is_one_a_channel(t, x)
            and t.is_contiguous()
            and not (t.requires_grad or t.is_inference() or t.is_neg())
        ):
            return False
    written = [_memory(mean), _memory(variance)]
    return all(
        end <= begin or other_end <= start
        for (start, end), *others in (written, written[::-1])
        for begin, other_end in (*others, *(_memory(t) for t in (x, *read) if t is not None))
    )


def _memory(t: Tensor) -> tuple[int, int]:
    """Where the entries of a tensor begin and end."""
    begin = t.data_ptr()
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return begin, begin + (last + 1) * t.element_size()


class InstanceNorm(Norm):
    """`nn.InstanceNorm2d.forward` by instance_norm_act, without running statistics."""

    kind, function = nn.InstanceNorm2d, "instance_norm"

    def compute(self, norm: Any, x: Tensor, negative_slope: float | None) -> Tensor | None:
        if (
            norm.running_mean is not None
            or norm.running_var is not None
            or not (norm.training or not norm.track_running_stats)
            or x.shape[1] != norm.num_features
            or x.shape[2] * x.shape[3] < LEAST_PIXELS_OF_INSTANCES
        ):
            return None
        if not _is_contiguous(x):
            if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
                return None
            x = x.contiguous()  # as torch's result is
        return self.run(norm, x, None, None, True, 0.0, negative_slope)


def pair(norm: Any, activation: Any, x: Any) -> Tensor | None:
    """Both of x in one operator; None, with nothing done, where each is to be called."""
    if type(x) not in PLAIN or x.numel() < LEAST_ELEMENTS:  # a small call is to lose little
        return None
    slope, stand_in = slope_of(activation), vars(norm).get("forward")
    if slope is None or not isinstance(stand_in, Norm) or stand_in.module is not norm or not is_alone(norm):
        return None
    y = stand_in.serve(x, slope)
    if y is not None:
        stand_in.count(True)
    return y


def slope_of(module: Any) -> float | None:
    """The slope below zero of a (leaky) ReLU; None if the module is or does something else."""
    kind: Any = type(module)
    if kind is nn.ReLU:
        slope, function = 0.0, "relu"
    elif kind is nn.LeakyReLU:
        slope, function = module.negative_slope, "leaky_relu"
        if type(slope) is not float or not 0 < slope < math.inf:
            return None
    else:
        return None
    plain = (
        "forward" not in vars(module)
        and as_torch_has_it(module, kind)
        and getattr(F, function) is _FUNCTIONS[function]
        and is_alone(module)
    )
    return slope if plain else None
