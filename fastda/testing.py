"""Comparing kernels with the float64 reference: the tolerances, the comparison, and poisoned allocation.

Public because users compare too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastda.registry import OPERATORS
from fastda.registry.row import Tolerance, Tolerances, clear_of_zero

__all__ = [
    "TOLERANCES",
    "Error",
    "Tolerance",
    "assert_matches",
    "clear_of_zero",
    "error",
    "poisoned_allocations",
    "tolerance",
]


class Error(NamedTuple):
    """The measured counterpart of Tolerance; `nonfinite_equal`: NaN and Inf stand at the same places."""

    relative_l2: float
    max_over_rms: float
    nonfinite_equal: bool

    def within(self, tolerance: Tolerance) -> bool:
        return (
            self.nonfinite_equal
            and self.relative_l2 <= tolerance.relative_l2
            and self.max_over_rms <= tolerance.max_over_rms
        )


_deterministic: Any = torch.utils.deterministic

# By operator, what is compared ("value", or the gradient's name; "grad" stands for every gradient not named),
# and dtype. Each bound is a small multiple (at most 4) of the error that PyTorch's own operator shows against
# float64 on unit-normal input, or what docs/performance.md derives where the algorithm is another (Winograd).
TOLERANCES: dict[str, Tolerances] = {op.name: op.tolerances for op in OPERATORS}


def tolerance(op: str, what: str, dtype: torch.dtype) -> Tolerance:
    """The bound for `op` (its public name), `what` ("value" or a gradient's name), the dtype computed in."""
    table = TOLERANCES[op]
    return table.get(what, table["grad" if what != "value" else "value"])[dtype]


def error(actual: Tensor, expected: Tensor, magnitude: float = 0.0) -> Error:
    """The error of `actual` against `expected` (any dtypes, equal shapes), computed in float64.

    A result that is a difference of large terms can be as small as their rounding, and no relative error is
    then small. `magnitude` is the size of such terms: the least rms that the error is divided by.
    """
    if actual.shape != expected.shape:
        raise ValueError(
            f"error: actual has shape {tuple(actual.shape)}, expected has {tuple(expected.shape)}"
        )
    a = actual.detach().to("cpu", torch.float64)
    e = expected.detach().to("cpu", torch.float64)
    finite = a.isfinite() & e.isfinite()
    odd_a, odd_e = a[~finite], e[~finite]
    same = bool(((odd_a == odd_e) | (odd_a.isnan() & odd_e.isnan())).all())
    a, e = a[finite], e[finite]
    if e.numel() == 0:
        return Error(0.0, 0.0, same)
    difference = a - e
    if not difference.any():
        return Error(0.0, 0.0, same)
    norm = e.norm().clamp_min(max(magnitude * e.numel() ** 0.5, torch.finfo(torch.float64).tiny))
    return Error(
        (difference.norm() / norm).item(), (difference.abs().max() * e.numel() ** 0.5 / norm).item(), same
    )


def assert_matches(
    op: str, what: str, actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Raise AssertionError unless `actual` is within `tolerance(op, what, dtype)` of `expected`.

    `dtype` is the dtype computed in, `actual.dtype` if not given.
    """
    dtype = dtype or actual.dtype
    bound, got = tolerance(op, what, dtype), error(actual, expected)
    if not got.within(bound):
        raise AssertionError(f"{op} {what} in {dtype}: {got} exceeds {bound}")


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Inside, torch fills every uninitialised allocation with NaN, so that an output left unwritten shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        _deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    _deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        _deterministic.fill_uninitialized_memory = before[2]
