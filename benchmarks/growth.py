"""How the cost of an operator grows: its time against one size, on log axes, and the exponent."""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from fastda.tools import bench
from fastda.tools.workloads import Case


class Sweep(NamedTuple):
    """An operator's sizes as one of them grows; the cost is expected to grow with its power `expected`."""

    workload: str
    axis: str
    values: tuple[int, ...]
    sizes: Any  # value -> sizes
    expected: float


# Each ends in three sizes that one level of memory serves: a cache outgrown must not be taken for growth.
SWEEPS = (
    Sweep("refiner_block", "batch", (1, 2, 4, 8, 16, 32), lambda v: (v, 64, 3, 35, 55), 1),
    Sweep("refiner_block", "pixels", (256, 1024, 4096, 16384, 65536), lambda v: (1, 64, 3, *_square(v)), 1),
    Sweep("refiner_block", "channels", (16, 32, 64, 128, 256), lambda v: (1, v, 3, 32, 32), 2),
    Sweep("refiner", "depth", (1, 2, 4, 8, 16), lambda v: (1, v, 35, 55), 1),
    Sweep(
        "patch_discriminator_loss.softmax", "batch", (32, 128, 512, 2048, 8192), lambda v: (v, v, 9, 14), 1
    ),
    Sweep(
        "patch_discriminator_loss.softmax",
        "pixels",
        (1024, 4096, 16384, 65536),
        lambda v: (8, 8, *_square(v)),
        1,
    ),
    Sweep(
        "patch_head_discriminator_loss.softmax",
        "batch",
        (8, 32, 128, 1024, 2048, 4096),
        lambda v: (v, v, 32, 9, 14),
        1,
    ),
    Sweep("self_regularization", "batch", (32, 128, 512, 4096, 8192, 16384), lambda v: (v, 1, 35, 55), 1),
    Sweep(
        "grad_reverse", "elements", (2**17, 2**19, 2**21, 2**23, 2**24, 2**25), lambda v: (128, v // 128), 1
    ),
    Sweep("grad_reverse_linear", "batch", (128, 512, 2048, 8192), lambda v: (v, 768, 100), 1),
)


def keep_all_memory() -> None:
    """The growth is to be that of the operators.

    Above 32 MiB glibc asks the system for every block's pages anew, which can cost more than the work itself.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            libc.mallopt(option, value)


def _square(pixels: int) -> tuple[int, int]:
    side = math.isqrt(pixels)
    return side, side


def measure(sweep: Sweep, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Forward and backward on one thread, of fastda and of eager PyTorch, at every size."""
    providers = {name: bench.PROVIDERS[name] for name in ("fastda", "eager")}
    for value in sweep.values:
        row = bench.measure(
            Case(sweep.workload, sweep.sizes(value)), providers, rounds=7, seconds=0.3, seed=seed
        )
        times = {name: c["minimum"] for name, c in row["contenders"].items()}
        yield {
            "value": value,
            "fastda": times["fastda"],
            "eager": min(t for name, t in times.items() if name.startswith("eager")),
        }


def exponent(points: list[dict[str, Any]], who: str) -> float:
    """The slope of log time against log size over the three largest sizes, where fixed costs do not count."""
    xs, ys = ([math.log(p[key]) for p in points[-3:]] for key in ("value", who))
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def run(names: list[str], seed: int = 0) -> Iterator[dict[str, Any]]:
    """The sweeps of the workloads or operators named (all)."""
    keep_all_memory()
    for sweep in SWEEPS:
        if names and not {sweep.workload, sweep.workload.split(".")[0]} & set(names):
            continue
        points = list(measure(sweep, seed))
        row = {"workload": sweep.workload, "axis": sweep.axis, "expected": sweep.expected, "points": points}
        row["exponents"] = {who: exponent(points, who) for who in ("fastda", "eager")}
        row["finding"] = row["exponents"]["fastda"] > sweep.expected + 0.1
        yield row
