"""Calls timed in turn, and how sure their ratio is: a single time says little on a shared machine."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import torch
from torch import Tensor

from fastda.registry.row import Call


class Ratio(NamedTuple):
    """A peer's time over ours, and its 95 % interval."""

    ratio: float
    low: float
    high: float


Sampler = Callable[[int], float]  # seconds that n calls take


def timed(call: Call, clock: Callable[[], float] = time.perf_counter) -> Sampler:
    """Several calls are timed after one that is not, so that none pays for the caches that another left."""

    def sample(n: int) -> float:
        if n > 1:
            call()
        start = clock()
        for _ in range(n):
            call()
        return clock() - start

    return sample


def timed_by_events(call: Call) -> Sampler:
    """The same on an accelerator, by its own clock: what the host does meanwhile does not count."""

    def sample(n: int) -> float:
        start, end = torch.Event(enable_timing=True), torch.Event(enable_timing=True)
        call()
        start.record()
        for _ in range(n):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return sample


def interleave(
    contenders: Mapping[str, Sampler],
    *,
    rounds: int = 20,
    seconds: float = 0.0,
    patience: float = math.inf,
    min_sample: float = 0.005,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Time the contenders in turn, in an order shuffled every round; return seconds per call, by round.

    A sample repeats its call until it lasts `min_sample` seconds or more. There are at least `rounds`
    rounds, fewer only once `patience` seconds have passed, and up to 100 while `seconds` have not passed.
    """
    repeats = {}
    for name, sample in contenders.items():
        once = sample(1)
        if once < 20 * min_sample:  # else the first call, a warm-up, tells enough
            once = sample(1)
        if once < min_sample:
            once = min(once, *(sample(1) for _ in range(3)))
        repeats[name] = max(1, math.ceil(min_sample / max(once, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(seed).shuffle
    enabled = gc.isenabled()
    gc.disable()
    try:
        begin = time.perf_counter()
        for done in range(max(rounds, 100)):
            passed = time.perf_counter() - begin
            if (done >= rounds and passed > seconds) or (done and passed > patience):
                break
            shuffle(order)
            for name in order:
                samples[name].append(contenders[name](repeats[name]) / repeats[name])
            gc.collect(0)
    finally:
        if enabled:
            gc.enable()
    return samples


def compare(
    peer: Sequence[float], ours: Sequence[float], floor: Sequence[float] | None = None, seed: int = 0
) -> Ratio:
    """Peer's time over ours, of the same rounds: the median of the ratios, with a bootstrap interval.

    With `floor`, the times of the work without what both add to it, the ratio is that of the medians of what
    is added; at most 1000, which also stands for an addition of ours that cannot be measured.
    """
    p, o = (torch.tensor(list(t), dtype=torch.float64) for t in (peer, ours))
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(p), (2000, len(p)), generator=generator)
    draws[0] = torch.arange(len(p))

    def medians(values: Tensor) -> Tensor:
        return values[draws].quantile(0.5, dim=1)

    if floor is None:
        ratios = medians(p / o)
    else:
        f = torch.tensor(list(floor), dtype=torch.float64)
        ours_added = medians(o - f)
        ratios = torch.where(ours_added > 0, medians(p - f) / ours_added, torch.inf).clamp(max=1000)
    low, high = (ratios.kthvalue(k).values.item() for k in (50, 1951))
    return Ratio(ratios[0].item(), low, high)


# Student's t for a two-sided interval of 95 %, by degrees of freedom from 1.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def over_sessions(ratios: Sequence[Ratio]) -> Ratio:
    """The geometric mean of the sessions' ratios, with Student's interval of their logarithms.

    How well each session knows its own ratio is part of how much they differ. One session alone has only its
    bootstrap interval, which knows nothing of other processes.
    """
    if len(ratios) == 1:
        return ratios[0]
    logs = [math.log(max(r.ratio, 1e-3)) for r in ratios]
    freedom = len(logs) - 1
    t = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.96 + 2.6 / freedom
    middle, half = fmean(logs), t * stdev(logs) / math.sqrt(len(logs))
    return Ratio(*(math.exp(min(x, 700.0)) for x in (middle, middle - half, middle + half)))


def spread(samples: Sequence[float]) -> float:
    """The interquartile range as a share of the median."""
    t = torch.tensor(list(samples), dtype=torch.float64)
    low, middle, high = (t.quantile(q).item() for q in (0.25, 0.5, 0.75))
    return (high - low) / middle
