"""Comparing kernels with the float64 reference: the tolerances, the comparison, and poisoned allocation.

Public because users compare too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """Bounds on an error: `relative_l2` = ‖a − e‖₂ / ‖e‖₂ and `max_over_rms` = max|a − e| / rms(e)."""

    relative_l2: float
    max_over_rms: float


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
_F32, _F64, _BF16, _F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# Products of matrices: what rounding and the order of summation cost PyTorch itself.
_LINEAR: dict[str, dict[torch.dtype, Tolerance]] = {
    what: {
        _F64: Tolerance(2e-15, 2e-14),
        _F32: Tolerance(6e-7, 6e-6),
        _BF16: Tolerance(8e-3, 8e-2),
        _F16: Tolerance(1e-3, 1e-2),
    }
    for what in ("value", "grad")
}
# Winograd's transforms cost what docs/performance.md derives. A weight's gradient is a sum over all pixels,
# of which PyTorch's own loses as much.
_CONVOLUTION = {
    "value": {**_LINEAR["value"], _F64: Tolerance(3e-15, 3e-14), _F32: Tolerance(1.5e-6, 3e-5)},
    # PyTorch's own float16 gradients are off by 1.04e-3 on CPUs that have no float16 arithmetic.
    "grad": {
        **_LINEAR["grad"],
        _F64: Tolerance(3e-15, 3e-14),
        _F32: Tolerance(2e-6, 4e-5),
        _F16: Tolerance(2e-3, 2e-2),
    },
}
for _weight in ("weight", "weight1", "weight2"):
    _CONVOLUTION[_weight] = {**_CONVOLUTION["grad"], _F32: Tolerance(1e-5, 1e-4)}
# What a patch costs and its slope: a few roundings in float32 or wider, whatever the dtype of the logits. A
# gradient is rounded once more to that dtype, which alone costs its largest entry, up to 12 times the rms
# where most patches are masked out, 2^-9 (bfloat16) or 2^-12 (float16) of itself.
_PATCH_LOSS = {
    "value": {
        _F64: Tolerance(2e-15, 2e-14),
        _F32: Tolerance(6e-7, 6e-6),
        _BF16: Tolerance(6e-7, 6e-6),
        _F16: Tolerance(6e-7, 6e-6),
    },
    "grad": {
        _F64: Tolerance(2e-15, 2e-14),
        _F32: Tolerance(6e-7, 6e-6),
        _BF16: Tolerance(4e-3, 6e-2),
        _F16: Tolerance(5e-4, 8e-3),
    },
}

# By operator, what is compared ("value", or the gradient's name; "grad" stands for every gradient not named),
# and dtype. Each bound is a small multiple (at most 4) of the error that PyTorch's own operator shows against
# float64 on unit-normal input, or what docs/performance.md derives where the algorithm is another (Winograd).
TOLERANCES: dict[str, dict[str, dict[torch.dtype, Tolerance]]] = {
    "grad_reverse": {
        "value": {d: Tolerance(0.0, 0.0) for d in (_F32, _F64, _BF16, _F16)},
        "grad": {
            _F64: Tolerance(1e-15, 1e-14),
            _F32: Tolerance(1e-7, 1e-6),
            _BF16: Tolerance(4e-3, 3e-2),
            _F16: Tolerance(5e-4, 4e-3),
        },
    },
    "grad_reverse_linear": _LINEAR,
    "patch_discriminator_loss": _PATCH_LOSS,
    "patch_generator_loss": _PATCH_LOSS,
    "self_regularization": _PATCH_LOSS,
    "refiner_loss": _PATCH_LOSS,
    "patch_head_discriminator_loss": {**_PATCH_LOSS, "weight": _LINEAR["grad"], "bias": _LINEAR["grad"]},
    "conv_same": _CONVOLUTION,
    "refiner_block": _CONVOLUTION,
}


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


def clear_of_zero(activations: Tensor, margin: float = 1e-3) -> Tensor:
    """A bias per channel (dim 1) that keeps every value of `activations` [N, C, …] `margin` away from zero.

    A kernel that rounds differently may put an activation on the other side of a ReLU's edge; its gradient is
    then right and still far from the reference's. Zero goes to the most central gap that is wide enough, or
    below all values if none is.
    """
    values = activations.transpose(0, 1).flatten(1).sort(dim=1).values  # [C, n]
    n = values.shape[1]
    values = torch.cat([values[:, :1] - 4 * margin, values], dim=1)
    wide = values.diff(dim=1) >= 2 * margin
    off_centre = (torch.arange(n, device=values.device) - n / 2).abs()
    gap = torch.where(wide, off_centre, torch.inf).argmin(dim=1, keepdim=True)
    return -(values.gather(1, gap) + values.gather(1, gap + 1)).squeeze(1) / 2


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
