"""Interleaved timing: on a shared machine no time is a result; the ratio of contenders taken in turn is."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastda
from fastda import reference, verify


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


def training_step(
    function: Callable[..., Any], arguments: Mapping[str, Any], names: Sequence[str]
) -> Callable[[], object]:
    """A call of `function(**arguments)` and of its first output's gradients for the arguments `names`."""
    arguments = {
        n: v.requires_grad_(n in names) if isinstance(v, Tensor) else v for n, v in arguments.items()
    }
    inputs = [arguments[name] for name in names]

    def forward() -> Tensor:
        out = function(**arguments)
        return out[0] if isinstance(out, tuple) else out

    grad = torch.ones_like(forward())
    return lambda: torch.autograd.grad(forward(), inputs, grad)


def jobs(ops: Sequence[str], quick: bool) -> list[tuple[verify.Operator, verify.Sizes]]:
    """What `fastda bench` measures: every shape of every operator, or the first of each."""
    chosen = [op for op in verify.OPERATORS if op.name in ops]
    return [(op, sizes) for op in chosen for sizes in (op.bench[:1] if quick else op.bench)]


def measure(op: verify.Operator, sizes: verify.Sizes, rounds: int = 20, seed: int = 0) -> dict[str, Any]:
    """Forward and backward in float32 against eager PyTorch at the better of its two layouts."""
    options = op.options[0] if op.bench_options is None else op.bench_options
    exact, names = verify.draw_arguments(op, options, sizes, torch.float32, seed)

    def step(module: Any, layout: str) -> Callable[[], object]:
        laid_out = {
            n: verify.lay_out(v.float(), layout) if isinstance(v, Tensor) else v for n, v in exact.items()
        }
        return training_step(getattr(module, op.name), laid_out, names)

    contenders = {"fastda": step(fastda, "contiguous"), "contiguous": step(reference, "contiguous")}
    if any(exact[name].dim() == 4 for name in names):
        contenders["channels_last"] = step(reference, "channels_last")
    samples = interleave(contenders, rounds=rounds, seed=seed)
    best = min((name for name in contenders if name != "fastda"), key=lambda name: median(samples[name]))
    return {
        "op": op.name,
        "options": verify.describe(options),
        "sizes": sizes,
        "dtype": "float32",
        "ratio": ratio(samples[best], samples["fastda"]),
        "ratio_of_minima": min(samples[best]) / min(samples["fastda"]),
        "fastda": summarise(samples["fastda"])._asdict(),
        "eager": summarise(samples[best])._asdict(),
        "eager_layout": best,
    }
