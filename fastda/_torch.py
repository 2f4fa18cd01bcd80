"""Every private or version-dependent torch call of the package, once."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_interpreter_stack = torch._C._functorch.peek_interpreter_stack


def transforms_active() -> bool:
    """True inside a torch.func transform or a forward-mode level.

    There the operators run their reference: on torch 2.11 to 2.15 `torch.compile(torch.func.grad(f))` drops a
    custom Function's backward without a word, and `torch.func.jvp` gives zeros for it.
    """
    return _interpreter_stack() is not None or forward_ad._current_level >= 0


# What torch.compiler.assume_constant_result does, without importing the compiler: the call is evaluated while
# it traces (traced itself, it would always answer True). Compiled code is guarded on both levels anyway.
transforms_active._dynamo_marked_constant = True  # type: ignore[attr-defined]


def exporting_torch_operators() -> bool:
    """True where an exported program is to hold torch's own operators alone.

    torch.onnx.export knows no others. What torch.export records with gradients enabled can be trained, and
    there a custom Function would leave nothing but its forward.
    """
    return exporting() and (torch.is_grad_enabled() or torch.onnx.is_in_onnx_export())


def exporting() -> bool:
    """True inside torch.export and what builds on it."""
    return torch.compiler.is_exporting()


# The compiler of torch 2.11 takes it for True in whatever it traces.
exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def tracing() -> bool:
    """True inside torch.jit.trace, which can keep torch's own operators alone."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def modes_active() -> bool:
    """True under a TorchFunctionMode or a TorchDispatchMode, which see every operator."""
    return torch._C._len_torch_function_stack() > 0 or torch._C._len_torch_dispatch_stack() > 0


def global_module_hooks() -> bool:
    """True where a hook is registered for all modules."""
    return bool(torch.nn.modules.module._has_any_global_hook())


def batched(t: torch.Tensor) -> bool:
    """True for one of several gradients under `torch.autograd.grad(…, is_grads_batched=True)`."""
    return torch._C._functorch.is_legacy_batchedtensor(t) or torch._C._functorch.is_batchedtensor(t)


def in_backward() -> bool:
    """True inside a backward pass, where activation checkpointing repeats forward passes."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast wants on this device, None where autocast is off or, as on `meta`, unknown."""
    if not _has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def value_known(t: torch.Tensor) -> bool:
    """Whether the host knows the value of `t` without waiting: no device, no compiler, no fake tensor."""
    plain = type(t) in (torch.Tensor, torch.nn.Parameter)
    return plain and t.device.type == "cpu" and not torch.compiler.is_compiling()


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """The memory format that torch's own convolutions would give their result for this input."""
    if tracing():  # sizes are tensors there
        last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        return torch.channels_last if last else torch.contiguous_format
    return torch._prims_common.suggest_memory_format(x)


def as_channels_last(x: torch.Tensor) -> torch.Tensor:
    """`x` (N, C, H, W) with channels_last strides; a view for one channel, where the formats agree."""
    if tracing() or x.shape[1] != 1 or not x.is_contiguous():
        return x.contiguous(memory_format=torch.channels_last)
    n, _, h, w = x.shape
    return x.as_strided((n, 1, h, w), (h * w, 1, w, 1))


def convolution_tf32() -> bool:
    """Whether the user lets float32 convolutions round their operands to TF32 on a CUDA device.

    A program of torch.compile is compiled again where this has changed.
    """
    if torch.compiler.is_dynamo_compiling():
        return _guarded_convolution_tf32()
    return getattr(torch.backends.cudnn, "conv").fp32_precision == "tf32"  # noqa: B009 (mypy)


def _guarded_convolution_tf32() -> bool:
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import AttrSource, CallFunctionNoArgsSource
    from torch._dynamo.symbolic_convert import InstructionTranslator

    module = InstructionTranslator.current_tx().import_source(__name__)
    source = CallFunctionNoArgsSource(AttrSource(module, convolution_tf32.__name__))
    install_guard(source.make_guard(GuardBuilder.EQUALS_MATCH))
    return convolution_tf32()


# The compiler neither traces the reading nor guards on it by itself.
_guarded_convolution_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds; False where a compiler leaves them open, without a promise."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)
