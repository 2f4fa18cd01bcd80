"""Every operator against its reference in float64: values and all gradients.

What is called, and with what, stands in the rows of `fastda.registry`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import fastda
from fastda import backend, reference
from fastda.registry import OPERATORS, Operator, Sizes
from fastda.registry.row import Options
from fastda.testing import Error, Tolerance, error, tolerance

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "strided")


@dataclass(frozen=True)
class Case:
    """One call of an operator: its options, size, dtype, layout, backend and device."""

    operator: Operator
    option: int  # index in operator.options
    sizes: Sizes
    dtype: torch.dtype
    layout: str
    backend: str
    device: str


@dataclass(frozen=True)
class Row:
    """The verdict on one output or gradient of a case, or on the whole of it where the call raised."""

    op: str
    options: str
    sizes: Sizes
    dtype: str
    layout: str
    backend: str
    device: str
    what: str
    error: Error | None
    tolerance: Tolerance | None
    passed: bool
    message: str = ""

    @property
    def used(self) -> float:
        """The largest share of a bound that the error uses up; above 1 is a failure."""
        if self.error is None or self.tolerance is None:
            return 0.0 if self.passed else math.inf
        pairs = zip(self.error[:2], self.tolerance, strict=True)
        shares = [e / t if t else (math.inf if e else 0.0) for e, t in pairs]
        return max(shares) if self.error.nonfinite_equal else math.inf

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        row = asdict(self)
        row["error"] = self.error._asdict() if self.error else None
        row["tolerance"] = self.tolerance._asdict() if self.tolerance else None
        return row


def cases(
    ops: Sequence[str] | None = None, backends: Sequence[str] | None = None, devices: Sequence[str] = ("cpu",)
) -> Iterator[Case]:
    """All cases of the given operators (all), backends (all that can serve the device) and devices."""
    for device in devices:
        able = [b for b in backend.BACKENDS if backend.why_not(b, device) is None]
        for op in OPERATORS:
            if ops and op.name not in ops:
                continue
            for sizes, dtype, option in itertools.product(op.sizes, op.dtypes, range(len(op.options))):
                shapes = op.tensors(op.options[option], *sizes).values()
                has_images = any(len(shape) == 4 for shape in shapes)
                for layout in LAYOUTS if has_images else ("contiguous", "strided"):
                    for name in backends or able:
                        yield Case(op, option, sizes, dtype, layout, name, device)


def draw_arguments(
    op: Operator, options: Options, sizes: Sizes, dtype: torch.dtype, seed: int
) -> tuple[dict[str, Any], list[str]]:
    """The arguments in float64, tensors rounded to `dtype`; and the names of those that receive gradients."""
    identity = f"{op.name} {describe(options)} {sizes}"
    generator = torch.Generator().manual_seed(zlib.crc32(identity.encode()) + seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    arguments: dict[str, Any] = {
        name: value(draw, *sizes) if callable(value) else value for name, value in options.items()
    }
    shapes = op.tensors(options, *sizes)
    for name, shape in shapes.items():
        # Weights keep the variance of what they act on.
        gain = math.prod(shape[1:]) ** -0.5 if name.startswith("weight") else 1.0
        arguments[name] = draw(*shape) * gain

    def rounded() -> dict[str, Any]:
        return {n: v.to(dtype).double() if isinstance(v, Tensor) else v for n, v in arguments.items()}

    arguments = rounded()
    if op.settle is not None:
        op.settle(arguments, max(1e-3, 4 * torch.finfo(dtype).eps))
        arguments = rounded()
    return arguments, list(shapes)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """A copy of `x`: `contiguous`, `channels_last` (if 4-D) or `strided` (gaps of NaN in the last dim)."""
    if layout == "strided" and x.dim():
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype, device=x.device)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "channels_last" and x.dim() == 4:
        return x.clone(memory_format=torch.channels_last)
    return x.clone(memory_format=torch.contiguous_format)


def evaluate(
    function: Callable[..., Any], arguments: Mapping[str, Any], names: Sequence[str], seed: int
) -> dict[str, Tensor]:
    """Outputs ("value", "value 1", …) and, under random output gradients, gradients by argument name."""
    arguments = {n: v.detach().requires_grad_(n in names) if n in names else v for n, v in arguments.items()}
    out = function(**arguments)
    outputs = out if isinstance(out, tuple) else (out,)
    results = {f"value {i}" if i else "value": o.detach() for i, o in enumerate(outputs)}
    differentiable = [o for o in outputs if o.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    weights = [
        # Between 1/2 and 3/2, and held by the narrowest dtype, so that every dtype gets the same.
        (torch.rand(o.shape, generator=generator, dtype=torch.float64) + 0.5).to(torch.bfloat16).to(o)
        for o in differentiable
    ]
    grads = torch.autograd.grad(
        differentiable, [arguments[n] for n in names], weights, materialize_grads=True
    )
    return results | dict(zip(names, grads, strict=True))


def describe(options: Options) -> str:
    """Options in one short line."""
    return ", ".join(f"{n}={'tensor' if callable(v) else v}" for n, v in options.items())


def _served_by(case: Case) -> contextlib.AbstractContextManager[None]:
    # What serves anyway is not forced: an operator may have a shorter way for that, and it is what users get.
    if backend.info()["devices"][case.device]["serving"] == case.backend:
        return contextlib.nullcontext()
    return backend.use_backend(case.backend)


@functools.lru_cache(maxsize=1)  # the layouts and backends of a case follow one another
def _expected(
    op: Operator, option: int, sizes: Sizes, dtype: torch.dtype, seed: int
) -> tuple[dict[str, Any], list[str], dict[str, Tensor]]:
    arguments, names = draw_arguments(op, op.options[option], sizes, dtype, seed)
    return arguments, names, evaluate(getattr(reference, op.name), arguments, names, seed)


def check(case: Case, seed: int = 0) -> list[Row]:
    """Run one case and judge every output and gradient."""
    op, dtype = case.operator, case.dtype
    options = op.options[case.option]
    row = functools.partial(
        Row, op.name, describe(options), case.sizes, str(dtype).removeprefix("torch."), case.layout
    )
    row = functools.partial(row, case.backend, case.device)
    try:
        exact, names, expected = _expected(op, case.option, case.sizes, dtype, seed)
        given = {
            name: lay_out(value.to(case.device, dtype), case.layout) if isinstance(value, Tensor) else value
            for name, value in exact.items()
        }
        with _served_by(case):
            actual = evaluate(getattr(fastda, op.name), given, names, seed)
        rows = []
        magnitudes = op.magnitudes(options, *case.sizes)
        for what, wanted in expected.items():
            bound = tolerance(op.name, what.split()[0], dtype)
            got = error(actual[what], wanted, magnitudes.get(what, 0.0))
            rows.append(row(what, got, bound, got.within(bound)))
        return rows
    except Exception as failure:
        return [row("call", None, None, False, f"{type(failure).__name__}: {failure}")]
