"""How a training is measured: its step as published and with one line more, in turn, in a process of its own.

In each layout the first step is compared: losses and gradients of the optimized one must be the original's.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch
from torch import Tensor

import fastda
from benchmarks import memory
from benchmarks.trainings import TRAININGS, Published, Training
from fastda.timing import compare, interleave, spread, timed
from fastda.tools.bench import keep_freed_memory

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# In float32 some of many gates fall to the other side: gradients differ by more than rounding.
# Of losses and gradients. In float32 rounding turns gates over, layer by layer: gradients of PyTorch's own
# two layouts are 0.11 apart in a step of adaptsegnet.
TOLERANCES = {torch.float32: (1e-3, 1e-1), torch.float64: (1e-6, 1e-6)}


@dataclass(frozen=True)
class Case:
    """A training of the table; what `fastda.tools.bench.run` goes round."""

    name: str
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    tiny: bool = False
    compiled: bool = False

    @property
    def id(self) -> str:
        marks = "-contiguous" * (len(self.layouts) == 1) + "-quick" * self.tiny + "-compiled" * self.compiled
        return self.name + marks

    @property
    def training(self) -> Published:
        return next(t for t in TRAININGS if t.name == self.name)


def label(who: str, layout: str) -> str:
    return who if layout == "contiguous" else f"{who} {layout}"


def built(case: Case, layout: str, who: str = "eager") -> Training:
    training = case.training.build(case.tiny).to(memory_format=LAYOUTS[layout])
    if who == "fastda":
        fastda.optimize(training)
    elif who == "torch.compile":
        for network in training.children():
            if next(network.parameters(), None) is not None:
                network.compile(dynamic=False)
    return training


def stepped(training: Training) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and gradients of a step, always with the same random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        losses = [loss.item() for loss in training()]
    named = training.named_parameters()
    return losses, {name: p.grad.clone() for name, p in named if p.grad is not None}


def differences(plain: Training, ours: Training) -> dict[str, float]:
    """How far a step of `ours` is from one of `plain`: the largest relative error of a loss, and that of all
    gradients together."""
    (losses, grads), (our_losses, our_grads) = stepped(plain), stepped(ours)
    if grads.keys() != our_grads.keys():
        raise AssertionError(f"gradients of other parameters: {sorted(grads.keys() ^ our_grads.keys())}")
    pairs = zip(losses, our_losses, strict=True)
    apart = sum((our_grads[name] - g).square().sum().item() for name, g in grads.items())
    size = sum(g.square().sum().item() for g in grads.values())
    return {
        "loss": max(abs(a - b) / max(abs(a), 1e-6) for a, b in pairs),
        "grad": (apart / size) ** 0.5,
    }


def right(found: Mapping[str, float], dtype: torch.dtype = torch.float32) -> bool:
    return all(value <= bound for value, bound in zip(found.values(), TOLERANCES[dtype], strict=True))


def check(found: Mapping[str, float], dtype: torch.dtype = torch.float32) -> None:
    """Raise AssertionError where a step is another one; NaN is."""
    for (what, value), bound in zip(found.items(), TOLERANCES[dtype], strict=True):
        if not value <= bound:
            raise AssertionError(f"the optimized step's {what} differs by {value:.2g}, more than {bound:g}")


def measure(case: Case, providers: Any = None, **settings: Any) -> dict[str, Any]:
    """One session of a training: CPU seconds of every contender's step, and ratios to those of fastda."""
    begin = time.perf_counter()
    torch.set_num_threads(1)
    keep_freed_memory()
    contenders, absent, agreement = {}, {}, {}
    for layout in case.layouts:
        try:
            plain, ours = built(case, layout), built(case, layout, "fastda")
            agreement[layout] = differences(plain, ours)
            if layout != "contiguous" and not right(agreement[layout]):
                # PyTorch errs behind an instance norm of one image: docs/limits.md.
                judge = built(case, "contiguous"), built(case, layout, "fastda")
                agreement[layout] = differences(*judge)
        except RuntimeError as error:  # a `view` that takes contiguous images alone
            if layout == "contiguous":
                raise
            absent[layout] = " ".join(str(error).split())[:300]
            continue
        contenders |= {label("eager", layout): plain, label("fastda", layout): ours}
        if case.compiled:
            compiled = built(case, layout, "torch.compile")
            try:
                compiled()
                contenders[label("torch.compile", layout)] = compiled
            except Exception as error:
                absent[label("torch.compile", layout)] = " ".join(str(error).split())[:300]
        check(agreement[layout])
    samplers = {name: timed(step, time.process_time) for name, step in contenders.items()}
    start = time.perf_counter(), time.process_time()
    samples = interleave(samplers, **settings)
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    rows: dict[str, dict[str, Any]] = {}
    for name, t in samples.items():
        rows[name] = {"median": median(t), "minimum": min(t), "spread": spread(t)}
        for ours_label in (n for n in samples if n.startswith("fastda")):
            rows[name][f"over {ours_label}"] = compare(t, samples[ours_label])._asdict()
    return {
        "id": case.id,
        "case": asdict(case),
        "clock": "CPU time",
        "sessions": 1,
        "rounds": len(samples["fastda"]),
        "seconds": time.perf_counter() - begin,
        "busy": cpu / wall,
        "contenders": rows,
        "absent": absent,
        "agreement": agreement,
        "spent": spent(contenders["fastda"]),
    }


def spent(step: Callable[[], Any]) -> dict[str, float]:
    """The shares of CPU time of the operators of a step, convolutions by the size of their kernel."""
    with torch.autograd.profiler.profile(use_kineto=False, record_shapes=True) as profile:
        step()
    found: dict[str, float] = {}
    for event in profile.key_averages(group_by_input_shape=True):
        shapes = [shape for shape in event.input_shapes if len(shape) == 4]
        name = event.key.removeprefix("aten::")
        if "conv" in name and len(shapes) > 1:
            kernel = shapes[2 if "backward" in name and len(shapes) > 2 else 1]
            name += " {}×{}".format(*kernel[2:])
        found[name] = found.get(name, 0.0) + event.self_cpu_time_total
    total = sum(found.values())
    largest = sorted(found.items(), key=lambda item: -item[1])
    return {name: time / total for name, time in largest if time >= 0.02 * total}


@contextlib.contextmanager
def own_process() -> Iterator[Callable[..., dict[str, Any]]]:
    """`measure`, each time in a process of its own, for the memory that it leaves behind."""

    def timing(*args: Any, **settings: Any) -> dict[str, Any]:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(measure, *args, **settings).result()

    yield timing


def peak_memory(case: Case, row: Mapping[str, Any]) -> dict[str, int]:
    """How far a step raises the resident set, in bytes, by contender; each in a process of its own."""
    found = {}
    for name in row["contenders"]:
        if not name.startswith("torch.compile"):
            command = [sys.executable, "-m", "benchmarks.trainings.measure", json.dumps(asdict(case)), name]
            environment = {**os.environ, **memory.RETURNED_AT_ONCE}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found[name] = int(done.stdout.splitlines()[-1])
    return found


def _print_peak(identity: str, name: str) -> None:
    who, _, layout = name.partition(" ")
    torch.set_num_threads(1)
    step = built(Case(**json.loads(identity)), layout or "contiguous", who)
    step()
    gc.collect()
    print(memory.rise(step)["step"])


if __name__ == "__main__":
    _print_peak(*sys.argv[1:])
