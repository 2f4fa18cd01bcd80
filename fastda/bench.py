"""Interleaved timing: on a shared machine no time is a result; the ratio of contenders taken in turn is."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import NamedTuple


class Timing(NamedTuple):
    """Seconds per call of one contender over all rounds."""

    median: float
    minimum: float
    rounds: int


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    min_seconds: float = 0.005,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Time the contenders in turn, in an order shuffled every round; return each round's seconds per call.

    A sample repeats its call until it lasts at least `min_seconds`. Warm-up runs come first and are dropped.
    """
    repeats = {}
    for name, call in contenders.items():
        call()
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        repeats[name] = max(1, round(min_seconds / max(once, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(seed).shuffle
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                call, n = contenders[name], repeats[name]
                start = time.perf_counter()
                for _ in range(n):
                    call()
                samples[name].append((time.perf_counter() - start) / n)
            gc.collect(0)
    finally:
        if enabled:
            gc.enable()
    return samples


def summarise(samples: list[float]) -> Timing:
    return Timing(median(samples), min(samples), len(samples))


def ratio(peer: list[float], ours: list[float]) -> float:
    """Median over rounds of peer time / our time: above 1 means that ours is faster."""
    return median(p / o for p, o in zip(peer, ours, strict=True))
