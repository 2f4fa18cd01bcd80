"""How contenders are timed: on a shared machine no time is a result, a ratio of contenders taken in turn is.

All cases are gone round several times, each time in a process of its own: where memory lies, and what else
the machine does, differ more between such sessions than between the rounds of one. The sessions' ratios make
the interval.

A provider makes a case's contenders. `fastda bench` has those that need torch alone; `python -m benchmarks`,
in the repository, adds those that need further packages.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import math
import multiprocessing
import os
import platform
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import fastda
from fastda import backend, files, registry
from fastda.registry.row import Call, Formula
from fastda.timing import Ratio, Sampler, compare, interleave, over_sessions, spread, timed, timed_by_events
from fastda.tools import verify
from fastda.tools.workloads import WORKLOADS, Case

Row = dict[str, Any]  # of the results, as in their JSON
Contenders = Iterator[tuple[str, Call]]


class Task:
    """A case with its inputs; providers ask it for calls to time."""

    def __init__(self, case: Case, device: str = "cpu", seed: int = 0) -> None:
        self.case, self.device, self.seed = case, device, seed
        self.workload = next(w for w in WORKLOADS if w.name == case.workload)
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        if self.workload.steps:
            self.shapes: dict[str, tuple[int, ...]] = {}
        else:
            tensors = self.workload.tensors or next(
                op.tensors for op in registry.OPERATORS if op.name == self.workload.op
            )
            self.shapes = tensors(self.workload.options, *case.sizes)
        self.grads = list(self.shapes) if self.workload.grads is None else list(self.workload.grads)
        # Memory formats matter to convolutions.
        self.has_formats = any("weight" in n and len(s) == 4 for n, s in self.shapes.items())

    @property
    def by_cpu_time(self) -> bool:
        """One thread is timed by the process's CPU time, which a neighbour on the core does not lengthen."""
        return self.case.threads == 1 and self.device == "cpu"

    def clock(self) -> Callable[[], float]:
        return time.process_time if self.by_cpu_time else time.perf_counter

    def arguments(self, layout: str = "contiguous") -> dict[str, Any]:
        """The same values at every call, in tensors of their own."""
        generator = torch.Generator().manual_seed(self.seed)
        arguments = dict(self.workload.options)
        for name, shape in self.shapes.items():
            gain = math.prod(shape[1:]) ** -0.5 if "weight" in name else 1.0
            x = (torch.randn(shape, generator=generator) * gain).to(self.device, self.dtype)
            x = verify.lay_out(x, layout)
            train = self.case.mode == "backward" and name in self.grads
            arguments[name] = nn.Parameter(x) if train else x
        return arguments

    def call(self, function: Formula, layout: str = "contiguous") -> Call:
        """`function(**arguments)`, with all gradients where the case asks for them."""
        arguments = self.arguments(layout)
        return self.bound(functools.partial(self.workload.around(function), **arguments), arguments)

    def bound(self, forward: Callable[[], Any], arguments: Mapping[str, Any]) -> Call:
        """The case's call for `forward`, which has its arguments."""
        if self.case.mode == "forward":
            return forward
        inputs = [arguments[name] for name in self.grads]
        weights = [arguments[name] for name in self.grads if "weight" in name]

        def step() -> object:
            # As after an optimizer's step: what was prepared from the old weights is of no use.
            torch.autograd.graph.increment_version(weights)
            out = forward()
            out = out[0] if isinstance(out, tuple) else out
            return torch.autograd.grad(out, inputs, grad)

        with torch.enable_grad():
            out = forward()
            grad = torch.ones_like(out[0] if isinstance(out, tuple) else out)
        return step

    def cost(self) -> dict[str, float]:
        """Floating-point operations as the definition counts them, and bytes that must move at least once (0
        for a whole training step, where that is no measure)."""
        if self.workload.steps:
            assert self.workload.flops
            return {"flops": self.workload.flops(*self.case.sizes), "bytes": 0.0}
        arguments = {n: v for n, v in self.arguments().items() if isinstance(v, Tensor)}
        with torch.no_grad():
            formula = self.workload.formulas["eager"]
            out = self.workload.around(formula)(**self.arguments())
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, Tensor)]
        size = sum(t.nbytes for t in (*arguments.values(), *outs))
        train = self.case.mode == "backward"
        if train:
            size += sum(t.nbytes for t in (*outs, *(arguments[name] for name in self.grads)))
        flops = self.workload.flops(*self.case.sizes) if self.workload.flops else 0.0
        return {"flops": flops * (3 if train else 1), "bytes": float(size)}

    def steps(self, who: str) -> Contenders:
        """Of a training step, the contenders whose names start with `who`."""
        for label, make in self.workload.steps.items():
            if label.startswith(who):
                yield label, make(self.case.sizes)


Provider = Callable[[Task], Contenders]


def _fastda(task: Task) -> Contenders:
    """What fastda chooses by itself; other backends that serve the device follow."""
    w = task.workload
    if w.steps:
        for label, step in task.steps("fastda"):
            yield label, step
            if task.case.threads > 1:
                yield f"{label}, 1 thread", with_threads(1, task.case.threads, step)
        return

    def call(layout: str) -> Call:
        if w.fused is None:
            return task.call(getattr(fastda, w.op), layout)
        arguments = task.arguments(layout)
        return task.bound(w.fused(**arguments), arguments)

    layout = task.case.layout
    yield "fastda", call(layout)
    if task.has_formats and layout == "contiguous":
        yield "fastda channels_last", call("channels_last")
    if task.case.threads > 1:
        yield "fastda, 1 thread", with_threads(1, task.case.threads, call(layout))
    serving = backend.info()["devices"][task.device]["serving"]
    for name in backend.BACKENDS:
        if name not in (serving, "reference") and backend.why_not(name, task.device) is None:
            with backend.use_backend(name):
                yield f"fastda {name}", forced(name, call(layout))


def forced(name: str, call: Call) -> Call:
    def run() -> object:
        with backend.use_backend(name):
            return call()

    return run


def with_threads(threads: int, otherwise: int, call: Call) -> Call:
    def run() -> object:
        torch.set_num_threads(threads)
        try:
            return call()
        finally:
            torch.set_num_threads(otherwise)

    return run


def _eager(task: Task) -> Contenders:
    """Eager PyTorch, contiguous and channels_last."""
    yield from task.steps("eager")
    for label, formula in task.workload.formulas.items():
        yield label, task.call(formula)
        if task.has_formats:
            yield f"{label} channels_last", task.call(formula, "channels_last")
    if task.workload.floor is not None:
        yield FLOOR, task.call(task.workload.floor)


FLOOR = "without the operator"


class Frozen(nn.Module):
    """A formula with all arguments but the first as parameters, for compilers that fold weights."""

    def __init__(self, formula: Formula, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.formula, self.options = formula, {}
        self.first = next(n for n, v in arguments.items() if isinstance(v, Tensor))
        for name, value in arguments.items():
            if not isinstance(value, Tensor):
                self.options[name] = value
            elif name != self.first:
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, x: Tensor) -> Any:
        return self.formula(**{self.first: x}, **dict(self.named_parameters()), **self.options)


def _compiled(task: Task) -> Contenders:
    """torch.compile, for the shape; frozen for inference. Convolutions in channels_last, where it was never
    slower than contiguous."""
    if task.workload.steps:
        for label, step in task.steps("torch.compile"):
            step()
            yield label, step
        return
    formula = task.workload.around(task.workload.formulas["eager"])
    layout = "channels_last" if task.has_formats else "contiguous"
    arguments = task.arguments(layout)
    if task.case.mode == "forward":
        model = Frozen(formula, arguments).eval()
        compiled = torch.compile(model, dynamic=False, options={"freezing": True})
        call: Call = functools.partial(compiled, arguments[model.first])
    else:
        compiled = torch.compile(formula, dynamic=False)
        call = task.bound(functools.partial(compiled, **arguments), arguments)
    call()
    yield "torch.compile" + (" channels_last" if task.has_formats else ""), call


# In the order in which they are built.
PROVIDERS: dict[str, Provider] = {"fastda": _fastda, "eager": _eager, "compile": _compiled}


def measure(
    case: Case,
    providers: Mapping[str, Provider],
    *,
    rounds: int = 20,
    seconds: float = 2.0,
    patience: float = math.inf,
    device: str = "cpu",
    seed: int = 0,
) -> Row:
    """One session of a case: seconds per call of every contender, and the ratios of all to `fastda`."""
    begin = time.perf_counter()
    keep_freed_memory()
    absent: dict[str, str] = {}
    contenders: dict[str, Sampler] = {}
    with task_settings(case):
        task = Task(case, device, seed)
        clock = task.clock()
        for name, provider in providers.items():
            try:
                for label, call in provider(task):
                    contenders[label] = timed(call, clock) if device == "cpu" else timed_by_events(call)
            except Exception as error:
                if name == "fastda":
                    raise
                # A contender that is not installed or does not do this is a note beside the others' row.
                absent[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        row = result(task, contenders, rounds=rounds, seconds=seconds, patience=patience, seed=seed)
    torch._dynamo.reset()
    gc.collect()
    return row | {"absent": absent, "seconds": time.perf_counter() - begin}


def result(task: Task, contenders: Mapping[str, Sampler], **settings: Any) -> Row:
    """Time the contenders of a task; one of them is `fastda`."""
    case = task.case
    start = time.perf_counter(), time.process_time()
    samples = interleave(contenders, **settings)
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    ours, floor = samples["fastda"], samples.get(FLOOR) if task.workload.added else None
    rows: dict[str, dict[str, Any]] = {}
    for name, t in samples.items():
        rows[name] = {"median": median(t), "minimum": min(t), "spread": spread(t)}
        rows[name]["ratio"] = compare(t, ours)._asdict()
        if floor is not None and name != FLOOR:
            rows[name]["added"] = median(a - b for a, b in zip(t, floor, strict=True))
            rows[name]["added_ratio"] = compare(t, ours, floor)._asdict()
    row: Row = {
        "id": case.id,
        "case": asdict(case),
        "clock": "CPU time" if task.by_cpu_time else "wall time",
        "sessions": 1,
        "rounds": len(ours),
        "seconds": wall,
        "busy": cpu / wall,
        "contenders": rows,
        "absent": {},
        **task.cost(),
    }
    return row | {"best": _best(row), "warnings": _warnings(row)}


def combined(sessions: Sequence[Row]) -> Row:
    """What several sessions of a case say together: the row that is shown."""
    if len(sessions) == 1:
        return sessions[0]
    last = sessions[-1]
    contenders = {}
    for name in last["contenders"]:
        found = [s["contenders"][name] for s in sessions if name in s["contenders"]]
        middle = {
            key: median(c[key] for c in found) for key in ("median", "spread", "added") if key in found[0]
        }
        ratios = {
            key: over_sessions([Ratio(**c[key]) for c in found])._asdict()
            for key, value in found[0].items()
            if isinstance(value, dict)
        }
        contenders[name] = {**middle, "minimum": min(c["minimum"] for c in found), **ratios}
    row = {
        **{key: value for session in sessions for key, value in session.items()},
        "sessions": len(sessions),
        "rounds": sum(s["rounds"] for s in sessions),
        "seconds": sum(s["seconds"] for s in sessions),
        "busy": median(s["busy"] for s in sessions),
        "contenders": contenders,
    }
    return row | {"best": _best(row), "warnings": _warnings(row)}


def _best(row: Row) -> str | None:
    peers = [name for name in row["contenders"] if not name.startswith("fastda") and name != FLOOR]
    return min(peers, key=lambda name: row["contenders"][name]["median"], default=None)


@contextlib.contextmanager
def task_settings(case: Case) -> Iterator[None]:
    """The case's number of threads, and no gradients where it wants none."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        with torch.set_grad_enabled(case.mode != "forward"):
            yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """As in a training, where there are larger tensors than an operator's alone.

    glibc hands large blocks back to the system, and gets them again page by page, until it has seen one of
    this size freed.
    """
    torch.empty(30 << 20, dtype=torch.uint8)


def _warnings(row: Row) -> dict[str, str]:
    warnings, busy = {}, row["busy"]
    noisy = [name for name, c in row["contenders"].items() if c["spread"] > 0.15]
    if noisy:
        warnings["spread"] = (
            f"half of the rounds spread over more than 15 % of the median: {', '.join(noisy)}"
        )
    if row["clock"] == "CPU time" and busy < 0.9:
        warnings["shared"] = f"the core was shared: {100 * busy:.0f} % of the time was this process's"
    best = row["contenders"].get(row.get("best"), {}).get("ratio")
    if best and best["high"] - best["low"] > 0.1 * best["ratio"]:
        half = 50 * math.log(best["high"] / best["low"])
        warnings["interval"] = f"the ratio to {row['best']} is known to ±{half:.0f} % only"
    return warnings


def machine(threads: Iterable[int] = (1,)) -> dict[str, Any]:
    """Versions, the processor, and its measured peaks.

    `gflops`: float32 multiply-adds in registers, with the instruction set that the kernels use (a product of
    1536² matrices where there are no kernels); `gbs`: read and written by copies of 128 MiB.
    """
    info = backend.info()
    peaks = {str(t): {"gflops": _peak_gflops(t), "gbs": _copy_gbs(t)} for t in sorted(set(threads))}
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "isa": info["cpu_isa"] or "reference only",
        "held": {name: os.environ[name] for name in HELD if name in os.environ},
        "fastda": info["fastda"],
        "torch": info["torch"],
        "python": info["python"],
        "peaks": peaks,
        "fingerprint": fingerprint(),
    }


def _peak_gflops(threads: int) -> float:
    clock = time.process_time if threads == 1 else time.perf_counter
    if backend.native is None:
        a = torch.randn(1536, 1536)
        call = with_threads(threads, torch.get_num_threads(), functools.partial(torch.mm, a, a))
        times = interleave({"matmul": timed(call, clock)}, rounds=10)["matmul"]
        return 2e-9 * 1536**3 / min(times)
    speeds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(15):
            start = clock()
            flops = sum(pool.map(backend.native.multiply_add, [1 << 20] * threads))
            speeds.append(1e-9 * flops / (clock() - start))
    return sorted(speeds)[-3]  # a virtual machine's CPU time is off now and then, by half


def _copy_gbs(threads: int) -> float:
    source, target = torch.randn(1 << 25), torch.empty(1 << 25)
    call = with_threads(threads, torch.get_num_threads(), functools.partial(target.copy_, source))
    clock = time.process_time if threads == 1 else time.perf_counter
    return 2e-9 * source.nbytes / min(interleave({"copy": timed(call, clock)}, rounds=10)["copy"])


# What holds peers to an instruction set; read when they are loaded.
HELD = ("FASTDA_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def fingerprint() -> str:
    """Of everything that is measured: another build or another torch is another thing."""
    digest = hashlib.sha256(f"{torch.__version__} {[os.environ.get(n) for n in HELD]}".encode())
    root = Path(fastda.__file__).parent
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".so", ".pyd")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _settle() -> None:
    """Of a new process, which Ctrl-C ends without a word.

    What is measured first, while the heap still grows page by page, may be twice as slow: thrown away.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    providers = {name: PROVIDERS[name] for name in ("fastda", "eager")}
    measure(Case("grad_reverse", (128, 768)), providers, rounds=2, seconds=0.3)


@contextlib.contextmanager
def fresh_process() -> Iterator[Callable[..., Row]]:
    """`measure`, in a process of its own for all calls."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_settle) as pool:
        yield lambda *args, **settings: pool.submit(measure, *args, **settings).result()


@contextlib.contextmanager
def this_process() -> Iterator[Callable[..., Row]]:
    yield measure


def run(
    todo: Sequence[Case],
    providers: Mapping[str, Provider],
    folder: Path | None = None,
    also: Callable[[Case, Row], Row] = lambda case, row: {},
    *,
    sessions: int = 3,
    session: Callable[[], contextlib.AbstractContextManager[Callable[..., Row]]] = fresh_process,
    seed: int = 0,
    **settings: Any,
) -> Iterator[Row]:
    """Go round the cases `sessions` times; yields each case's row, as far as it is known, every time.

    With `folder`, the sessions are kept there, and a run that was interrupted goes on where it stopped,
    unless the build, the contenders or the settings are others. `also` says what further goes into a row;
    `session` gives what measures, as `measure` does.
    """
    settings = {"seed": seed, **settings}
    same = {"fingerprint": fingerprint(), "providers": list(providers), "settings": settings}
    kept: dict[str, list[Row]] = {}
    for case in todo:
        path = folder / f"{case.id}.json" if folder else None
        found = json.loads(path.read_text()) if path and path.exists() else {}
        kept[case.id] = found["sessions"] if found.get("same") == same else []
    for number in range(sessions):
        with contextlib.ExitStack() as stack:
            timing = None
            for case in todo:
                rows = kept[case.id]
                if len(rows) <= number:
                    timing = timing or stack.enter_context(session())
                    row = timing(case, providers, **{**settings, "seed": seed + number})
                    rows.append(row | (also(case, row) if not rows else {}))
                    if folder:
                        text = json.dumps({"same": same, "sessions": rows}, indent=1)
                        files.write(folder / f"{case.id}.json", text + "\n")
                yield combined(rows[: number + 1])


class TimeLeft:
    """How long a run still takes: by what each case took, before that by a guess scaled to those that ran."""

    def __init__(self, todo: Sequence[Case], sessions: int, contenders: int) -> None:
        self.sessions = sessions
        self.guess = {}
        for case in todo:
            w = next(w for w in WORKLOADS if w.name == case.workload)
            flops = w.flops(*case.sizes) * (3 if case.mode == "backward" else 1) if w.flops else 0.0
            self.guess[case.id] = 2.0 * contenders + 4 * contenders * flops / (6e10 * case.threads)
        self.taken: dict[str, float] = {}
        self.left_of = dict.fromkeys(self.guess, sessions)
        self.spent = 0.0

    def add(self, row: Row) -> None:
        self.spent += row["seconds"] - self.taken.get(row["id"], 0.0)
        self.taken[row["id"]] = row["seconds"]
        self.left_of[row["id"]] -= 1

    @property
    def left(self) -> float:
        known = sum(self.guess[name] * (self.sessions - self.left_of[name]) for name in self.taken)
        scale = self.spent / known if known else 1.0
        left = 0.0
        for name, count in self.left_of.items():
            done = self.sessions - count
            left += count * (self.taken[name] / done if done else self.guess[name] * scale)
        return left
