"""How the cost of an operator grows: its time against one size, on log axes, and the exponent."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from fastda import bench
from fastda.workloads import Case


class Sweep(NamedTuple):
    """An operator's sizes as one of them grows; the cost is expected to grow with its power `expected`."""

    workload: str
    axis: str
    values: tuple[int, ...]
    sizes: Any  # value -> sizes
    expected: float


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
        (1024, 4096, 16384, 65536, 262144),
        lambda v: (8, 8, *_square(v)),
        1,
    ),
    Sweep(
        "patch_head_discriminator_loss.softmax",
        "batch",
        (8, 32, 128, 512, 2048),
        lambda v: (v, v, 32, 9, 14),
        1,
    ),
    Sweep("self_regularization", "batch", (32, 128, 512, 2048, 8192), lambda v: (v, 1, 35, 55), 1),
    Sweep("grad_reverse", "features", (4096, 16384, 65536, 262144), lambda v: (128, v // 8), 1),
    Sweep("grad_reverse_linear", "batch", (128, 512, 2048, 8192), lambda v: (v, 768, 100), 1),
)


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
    """The slope of log time against log size, over the larger half, where fixed costs no longer count."""
    upper = points[len(points) // 2 :] if len(points) > 3 else points
    xs, ys = ([math.log(p[key]) for p in upper] for key in ("value", who))
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def run(names: list[str], seed: int = 0) -> Iterator[dict[str, Any]]:
    """The sweeps of the workloads or operators named (all)."""
    for sweep in SWEEPS:
        if names and not {sweep.workload, sweep.workload.split(".")[0]} & set(names):
            continue
        points = list(measure(sweep, seed))
        row = {"workload": sweep.workload, "axis": sweep.axis, "expected": sweep.expected, "points": points}
        row["exponents"] = {who: exponent(points, who) for who in ("fastda", "eager")}
        # A tenth is what caches do that some sizes fit into and others do not.
        row["finding"] = row["exponents"]["fastda"] > sweep.expected + 0.1
        yield row
