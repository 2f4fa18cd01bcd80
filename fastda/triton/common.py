"""What the Triton kernels share: launching them, and showing them to torch.compile."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

# With TRITON_INTERPRET=1 at import the kernels are Python over NumPy, and CPU tensors will do.
INTERPRETED = triton.knobs.runtime.interpret
_PLAIN = (Tensor, torch.nn.Parameter)


def operator(function: F | None = None, *, mutates: Sequence[str] = ()) -> Any:
    """Decorator: a function of tensors that allocates its results and calls `launch`.

    Called eagerly it stays a plain function. While torch.compile traces it is one node of the graph,
    `fastda_triton::<name>`, which AOTAutograd opens so that Inductor sees the kernels (in the
    interpreter there are none to see). Its shapes come from running it on fake tensors.
    """
    if function is None:
        return functools.partial(operator, mutates=mutates)
    name = f"fastda_triton::{function.__name__}"
    if INTERPRETED:
        op: Any = torch.library.custom_op(name, function, mutates_args=mutates)
        op.register_fake(function)
    else:
        op = torch.library.triton_op(name, function, mutates_args=mutates)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return op(*args) if torch.compiler.is_compiling() else function(*args)

    call.op = op  # type: ignore[attr-defined]
    return cast(F, call)


def launch(kernel: Any, grid: tuple[Any, ...], *args: Any, **options: Any) -> None:
    """Run `kernel` over `grid` on the device of its first tensor argument."""
    first = next(a for a in args if isinstance(a, Tensor))
    if type(first) not in _PLAIN:  # fake or functional: tracing
        if not INTERPRETED:
            torch.library.wrap_triton(kernel)[grid](*args, **options)
        return
    if INTERPRETED:
        _interpret(kernel, grid, args, options)
    elif first.device.index == torch.accelerator.current_device_index():
        kernel[grid](*args, **options)
    else:
        with torch.accelerator.device_index(first.device.index):
            kernel[grid](*args, **options)


def _interpret(kernel: Any, grid: tuple[Any, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Run a kernel on CPU tensors.

    Triton's interpreter keeps bfloat16 as bits: it truncates where a GPU rounds, and compares and multiplies
    the bits as integers. So it gets float32 copies, laid out alike, and PyTorch rounds what comes back.
    """
    copies: dict[int, tuple[Tensor, Tensor]] = {}

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.bfloat16:
            return x
        storage = x.untyped_storage()
        if storage.data_ptr() not in copies:
            whole = x.as_strided((storage.nbytes() // x.element_size(),), (1,), 0)
            copies[storage.data_ptr()] = whole, whole.float()
        return copies[storage.data_ptr()][1].as_strided(x.shape, x.stride(), x.storage_offset())

    kernel[grid](*(copy(a) for a in args), **options)
    for whole, widened in copies.values():
        whole.copy_(widened)


def platform(x: Tensor) -> str:
    """`cuda` (NVIDIA), `hip` (AMD), `xpu` (Intel) or `cpu` (the interpreter)."""
    return "hip" if x.device.type == "cuda" and torch.version.hip is not None else x.device.type


def wide_dtype(x: Tensor) -> torch.dtype:
    """Sums are kept in float32, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide_tl(x: Tensor) -> Any:
    """`wide_dtype(x)` as Triton names it."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def pieces(total: int, block: int, limit: int = 2048) -> tuple[int, int]:
    """Programs, and blocks that each of them walks, for `total` entries; a function of the size alone."""
    steps = max(1, math.ceil(total / (block * limit)))
    return max(1, math.ceil(total / (block * steps))), steps
