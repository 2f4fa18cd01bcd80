"""What there is to know of every operator, a row each: verify, bench, tests and compilers read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastda.registry import grad_reverse, norm, patch_loss, pool, refiner_conv
from fastda.registry.patch_loss import KINDS, REDUCTIONS
from fastda.registry.row import Operator, Sizes, Tolerance, Workload

__all__ = [
    "FAMILIES",
    "KINDS",
    "OPERATORS",
    "RAW",
    "REDUCTIONS",
    "WORKLOADS",
    "Operator",
    "Sizes",
    "Tolerance",
    "Workload",
]

FAMILIES = (grad_reverse, patch_loss, refiner_conv, norm, pool)
OPERATORS: tuple[Operator, ...] = tuple(op for family in FAMILIES for op in family.OPERATORS)
# Of single operators; fastda.tools.workloads has those of networks and training steps, too.
WORKLOADS: tuple[Workload, ...] = tuple(w for family in FAMILIES for w in family.WORKLOADS)
# The raw operators, and what a compiler is told that each returns.
RAW: dict[str, Callable[..., Any]] = {name: shapes for op in OPERATORS for name, shapes in op.raw.items()}
