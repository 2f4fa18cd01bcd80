"""Everything that only a GPU can tell, stage after stage, offline: a results file after each.

    python -m tests.gpu --out out/gpu               # what `make gpu` runs after building in place
    python -m tests.gpu --out out/gpu --dry-run     # every stage on the CPU, small

Each stage is a process of its own with a limit in seconds: what raises, hangs or faults loses that stage
alone, and keeps what the stage had found. They come in the order of their worth and stop when `--seconds`
are spent; the same command again goes on with those that have no result yet.

Calls are timed as replays of a CUDA graph, so that what Python takes does not count; contenders in turn,
medians of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

import fastda
from fastda import backend, files, testing
from fastda.tools import bench, verify, workloads

ROOT = Path(__file__).resolve().parents[1]
TF32 = testing.Tolerance(5e-4, 5e-3)  # ten bits of mantissa: each product is off by 2^-11 of itself
LAST = torch.channels_last


class Report:
    """What a stage has found, in its file after every few additions: a stage that ends early keeps it."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows, self.saved = path, [], 0.0

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        if time.monotonic() - self.saved > 2:
            self.save("unfinished")

    def save(self, state: str) -> None:
        failed = [row for row in self.rows if row.get("failed")]
        data = {"state": state, "failed": len(failed), "rows": self.rows}
        files.write(self.path, json.dumps(data, indent=1, default=str) + "\n")
        self.saved = time.monotonic()

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """A row that says whether what is inside raised."""
        try:
            yield
        except Exception as error:
            self.add(what=what, failed=f"{type(error).__name__}: {error}"[:2000])
            if "CUDA error" in str(error) or "AcceleratorError" in type(error).__name__:
                raise  # the device's context is lost, and every later call would say the same
        else:
            self.add(what=what)


@dataclasses.dataclass(frozen=True)
class Device:
    """The GPU, or, in a dry run, the CPU: graphs are then plain calls."""

    name: str

    @property
    def dry(self) -> bool:
        return self.name == "cpu"

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def captured(self, call: Callable[[], Any], times: int = 1) -> tuple[Callable[[], None], Any]:
        """A replay of `times` calls, and what the last of them returned."""
        if self.dry:
            out = call()
            return (lambda: [call() for _ in range(times)] and None), out
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                out = call()
        return graph.replay, out

    def seconds(self, replay: Callable[[], None]) -> float:
        if self.dry:
            start = time.perf_counter()
            replay()
            return time.perf_counter() - start
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def backends(self) -> list[str]:
        known = ("cpp",) if self.dry else ("cuda", "triton")
        return [name for name in known if backend.why_not(name, self.name) is None]


# -- right ---------------------------------------------------------------------------------------------------


def info(device: Device, report: Report) -> None:
    report.add(info=backend.info(), torch=torch.__version__, cuda=torch.version.cuda)
    if not device.dry:
        properties = torch.cuda.get_device_properties(0)
        report.add(device=str(properties), driver=shell("nvidia-smi"))
        report.add(failed="" if "cuda" in device.backends() else backend.why_not("cuda", "cuda"))
    bandwidth, products = peaks(device)
    report.add(bandwidth_gbs=bandwidth, products_tflops=products)


def verify_backend(name: str, tf32: bool, device: Device, report: Report) -> None:
    """`fastda verify` on the device; float32 as it stands, or convolutions in TF32."""
    name = "cpp" if device.dry else name
    if reason := backend.why_not(name, device.name):
        report.add(failed=reason)
        return
    torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"
    operators = ["conv_same", "refiner_block"] if tf32 else None
    cases = list(verify.cases(operators, backends=[name], devices=[device.name]))
    cases = [case for case in cases if case.dtype == torch.float32] if tf32 else cases

    def turn(case: verify.Case) -> int:
        return zlib.crc32(repr((case.option, case.sizes, case.layout)).encode()) % 97

    # Every operator early: a run that ends at its limit has seen something of each.
    cases = sorted(cases, key=turn)
    for case in cases[:: len(cases) // 24 if device.dry else 1]:
        for row in verify.check(case):
            bound = TF32 if tf32 else row.tolerance
            passed = row.passed or bool(tf32 and row.error and row.error.within(bound))
            report.add(**row.as_dict(), failed=None if passed else row.message or "beyond its tolerance")
            if "CUDA error" in row.message:
                raise RuntimeError(row.message)


def conformance(device: Device, report: Report) -> None:
    from tests.conformance import edges

    torch.backends.cudnn.conv.fp32_precision = "ieee"
    for name in device.backends():
        for check in edges.EVERYWHERE:
            with report.attempt(f"{name}: {check.__name__}"), torch.device(device.name):
                torch.manual_seed(0)  # a failure can be had again
                check(backend.kernels(name))


def calls(device: Device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
    """A forward and all gradients of every operator; convolutions in both layouts and of two sizes."""
    generator = torch.Generator().manual_seed(0)
    n, h, w = (1, 9, 14) if device.dry else (4, 35, 55)

    def draw(*shape: int, gain: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * gain).to(device.name, dtype).requires_grad_()

    def step(function: Callable[..., Any], *inputs: torch.Tensor, **options: Any) -> Any:
        def run() -> tuple[torch.Tensor, ...]:
            out = function(*inputs, **options)
            out = out if isinstance(out, tuple) else (out,)
            return (*out, *torch.autograd.grad(out[0], inputs, torch.ones_like(out[0])))

        return run

    found = {}
    for size in (3, 7):
        gain = (64 * size * size) ** -0.5
        x, filters, bias = draw(n, 64, h, w), draw(64, 64, size, size, gain=gain), draw(64)
        found[f"conv_same {size}x{size}"] = step(fastda.conv_same, x, filters, bias)
    x, bias1, bias2 = draw(n, 64, h, w), draw(64), draw(64)
    one, two = draw(64, 64, 3, 3, gain=1 / 24), draw(64, 64, 3, 3, gain=1 / 24)
    found["refiner_block"] = step(fastda.refiner_block, x, one, bias1, two, bias2)
    last = x.detach().contiguous(memory_format=LAST).requires_grad_()
    found["refiner_block channels_last"] = step(fastda.refiner_block, last, one, bias1, two, bias2)
    logits, more = draw(n, 2, h, w), draw(n, 2, h, w)
    found["patch_discriminator_loss"] = step(fastda.patch_discriminator_loss, logits, more)
    images, others = draw(n, 1, h, w), draw(n, 1, h, w)
    found["self_regularization"] = step(fastda.self_regularization, images, others, scale=0.3)
    found["refiner_loss"] = step(fastda.refiner_loss, logits, images, others, reg_scale=0.3)
    found["grad_reverse"] = step(lambda x: fastda.grad_reverse(x, 0.7) * 2, draw(128, 768))
    return found


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def repeats(device: Device, report: Report) -> None:
    """Fifty times the same, bit for bit."""
    for name in device.backends():
        for dtype in (torch.float32, torch.bfloat16):
            for what, call in calls(device, dtype).items():
                with report.attempt(f"{name} {dtype}: {what}"), backend.use_backend(name):
                    first = call()
                    for _ in range(3 if device.dry else 50):
                        assert same(call(), first), "another result"


def graphs(device: Device, report: Report) -> None:
    """Forward and backward in a CUDA graph, replayed after its inputs have changed."""
    for name in device.backends():
        for dtype in (torch.float32, torch.bfloat16):
            for what, call in calls(device, dtype).items():
                with report.attempt(f"{name} {dtype}: {what}"), backend.use_backend(name):
                    replay, out = device.captured(call)
                    if not device.dry:
                        for cell in call.__closure__ or ():
                            for x in cell.cell_contents if isinstance(cell.cell_contents, tuple) else ():
                                with torch.no_grad():
                                    x.mul_(0.5)
                        replay()
                    device.synchronize()
                    assert same(out, call()), "the replay differs"


def streams(device: Device, report: Report) -> None:
    """Another stream, two threads each on its own, two devices."""
    found = calls(device, torch.bfloat16)
    expected = {what: call() for what, call in found.items()}
    device.synchronize()

    def on_a_stream(what: str, times: int, wrong: list[str]) -> None:
        with contextlib.nullcontext() if device.dry else torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(times):
                out = found[what]()
                if not device.dry:
                    torch.cuda.current_stream().synchronize()
                if not same(out, expected[what]):
                    wrong.append(what)

    wrong: list[str] = []
    for what in found:
        with report.attempt(f"another stream: {what}"):
            on_a_stream(what, 1, wrong)
            assert not wrong, wrong
    # Kernels of one function that ask for different amounts of shared memory.
    with report.attempt("two threads: 3x3 and 7x7"):
        workers = [
            threading.Thread(target=on_a_stream, args=(what, 2 if device.dry else 200, wrong))
            for what in ("conv_same 3x3", "conv_same 7x7")
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not wrong, wrong
    for other in range(1, 0 if device.dry else torch.cuda.device_count()):
        with report.attempt(f"device {other}"):
            x = torch.randn(2, 64, 35, 55, device=other)
            w = torch.randn(64, 64, 3, 3, device=other)
            assert torch.equal(fastda.conv_same(x, w).to(0), fastda.conv_same(x.to(0), w.to(0)))


# -- fast ----------------------------------------------------------------------------------------------------


def peaks(device: Device) -> tuple[float, dict[str, float]]:
    """GB/s of a copy, and Tflop/s of a matrix product of each dtype (cuBLAS: wgmma where there is one)."""
    n = 1 << (20 if device.dry else 28)
    a, b = torch.empty(n, device=device.name), torch.empty(n, device=device.name)
    replay, _ = device.captured(lambda: b.copy_(a), 10)
    bandwidth = 2 * a.nbytes * 10 / min(device.seconds(replay) for _ in range(5)) / 1e9
    side, products = 256 if device.dry else 8192, {}
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, y = (torch.randn(side, side, device=device.name).to(dtype) for _ in range(2))
        replay, _ = device.captured(functools.partial(torch.mm, x, y), 3)
        took = min(device.seconds(replay) for _ in range(5))
        products[str(dtype).removeprefix("torch.")] = 2 * side**3 * 3 / took / 1e12
    return bandwidth, products


@contextlib.contextmanager
def two_launches() -> Iterator[None]:
    os.environ["FASTDA_CUDA_BLOCK_LAUNCHES"] = "2"
    try:
        yield
    finally:
        del os.environ["FASTDA_CUDA_BLOCK_LAUNCHES"]


def contenders(task: bench.Task, device: Device, compiled: bool) -> Iterator[tuple[str, Callable, Any]]:
    """Name, call, and what it must be captured under."""
    layouts = ("contiguous", "channels_last") if task.has_formats else ("contiguous",)
    function = getattr(fastda, task.workload.op)
    for name in device.backends():
        for layout in layouts:
            yield f"{name} {layout}", task.call(function, layout), backend.use_backend(name)
    if task.workload.op == "refiner_block":
        call = task.call(function, "channels_last")
        yield "two launches channels_last", call, two_launches()
    for layout in layouts:
        yield f"eager {layout}", task.call(task.workload.formulas["eager"], layout), contextlib.nullcontext()
    if compiled:
        for name, call in bench.PROVIDERS["compile"](task):
            yield name, call, contextlib.nullcontext()


def timings(name: str, compiled: bool, device: Device, report: Report) -> None:
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    bandwidth, products = peaks(device)
    for case in timed_cases(name, device):
        task = bench.Task(case, device.name)
        cost, replays, times = task.cost(), {}, 2 if device.dry else 20
        for who, call, under in contenders(task, device, compiled and not device.dry):
            with report.attempt(f"{case.id}: {who} captured"), under:
                replays[who] = device.captured(call, times)[0]
        samples: dict[str, list[float]] = {who: [] for who in replays}
        for _ in range(2 if device.dry else 7):
            for who, replay in replays.items():
                samples[who].append(device.seconds(replay) / times)
        for who, took in samples.items():
            seconds = median(took[1:])
            report.add(
                case=case.id,
                contender=who,
                microseconds=seconds * 1e6,
                spread=max(took[1:]) / min(took[1:]),
                bandwidth=cost["bytes"] / seconds / 1e9 / bandwidth,
                products=cost["flops"] / seconds / 1e12 / products.get(case.dtype, products["float32"]),
            )
            print(f"{case.id:60} {who:28} {seconds * 1e6:10.1f} us", flush=True)
        replays.clear()


def timed_cases(name: str, device: Device) -> list[workloads.Case]:
    if name == "losses":
        names = ["patch_discriminator_loss softmax", "self_regularization", "grad_reverse"]
        known = [w.name for w in workloads.WORKLOADS]
        names = [known_name for known_name in known if known_name.startswith(tuple(names))]
        found = workloads.cases(names, dtypes=("float32", "bfloat16"), threads=(1,), quick=device.dry)
        return [case for case in found if "linear" not in case.workload and case.mode != "step"]
    sizes = [(1, 64, 3, 9, 14)] if device.dry else [(32, 64, 3, 35, 55), (1, 64, 3, 35, 55)]
    sizes += [] if device.dry else [(8, 64, 3, 224, 224)]
    return workloads.cases(
        ["refiner_block"],
        shapes=sizes,
        dtypes=("bfloat16", "float16", "float32") if name == "block" else ("bfloat16",),
        threads=(1,),
        modes=("forward", "backward") if name == "block" else ("forward",),
    )


def convolutions(device: Device, report: Report) -> None:
    """One convolution alone, which no workload is: ours, Triton's, and cuDNN's in both layouts."""
    import torch.nn.functional as F

    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    _, products = peaks(device)
    for n, h, w in ((1, 9, 14),) if device.dry else ((32, 35, 55), (1, 35, 55), (8, 224, 224)):
        for dtype in (torch.bfloat16, torch.float32):
            replays, times = {}, 2 if device.dry else 20
            weight = (torch.randn(64, 64, 3, 3) / 24).to(device.name, dtype)
            for layout in (torch.contiguous_format, LAST):
                x = torch.randn(n, 64, h, w).to(device.name, dtype).contiguous(memory_format=layout)
                label = "channels_last" if layout == LAST else "contiguous"
                filters = weight.contiguous(memory_format=layout)
                ways = {b: functools.partial(fastda.conv_same, x, weight) for b in device.backends()}
                ways |= {"cuDNN": functools.partial(F.conv2d, x, filters, padding=1)}
                for who, call in ways.items():
                    under = contextlib.nullcontext() if who == "cuDNN" else backend.use_backend(who)
                    with report.attempt(f"{n}x{h}x{w} {dtype}: {who} {label}"), under, torch.no_grad():
                        replays[f"{who} {label}"] = device.captured(call, times)[0]
            samples: dict[str, list[float]] = {who: [] for who in replays}
            for _ in range(2 if device.dry else 7):
                for who, replay in replays.items():
                    samples[who].append(device.seconds(replay) / times)
            for who, took in samples.items():
                seconds, flops = median(took[1:]), 2 * 9 * 64 * 64 * n * h * w
                peak = products[str(dtype).removeprefix("torch.")]
                report.add(
                    case=f"conv_same {n}x64x{h}x{w} {dtype}",
                    contender=who,
                    microseconds=seconds * 1e6,
                    products=flops / seconds / 1e12 / peak,
                )


# -- tools ---------------------------------------------------------------------------------------------------


def shell(*command: str, seconds: float = 300) -> str:
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not installed"
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    return (done.stdout + done.stderr)[-8000:]


def sanitizer(device: Device, report: Report) -> None:
    """compute-sanitizer over one call of everything: accesses out of bounds, races in shared memory."""
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        out = shell(*command, sys.executable, "-m", "tests.gpu", "--once", device.name)
        clean = "ERROR SUMMARY: 0 errors" in out or "0 hazards" in out or "is not installed" in out
        report.add(tool=tool, output=out, failed=None if clean else "see the output")


def profiler(device: Device, report: Report) -> None:
    """Nsight Compute's counters of each kernel, where it is there and allowed."""
    command = ["ncu", "--set", "full", "--page", "raw", "--csv", "--launch-count", "40"]
    report.add(output=shell(*command, sys.executable, "-m", "tests.gpu", "--once", device.name))


def once(name: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for call in calls(Device(name), dtype).values():
            call()
    Device(name).synchronize()


# -- stages --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    limit: float  # seconds
    run: Callable[[Device, Report], None]


STAGES = (
    Stage("info", 60, info),
    Stage("verify-cuda", 90, functools.partial(verify_backend, "cuda", False)),
    Stage("verify-cuda-tf32", 30, functools.partial(verify_backend, "cuda", True)),
    Stage("timings-block", 90, functools.partial(timings, "block", False)),
    Stage("repeats", 45, repeats),
    Stage("graphs", 45, graphs),
    Stage("streams", 45, streams),
    Stage("timings-convolution", 60, convolutions),
    Stage("conformance", 60, conformance),
    Stage("timings-losses", 60, functools.partial(timings, "losses", False)),
    Stage("verify-triton", 120, functools.partial(verify_backend, "triton", False)),
    Stage("verify-triton-tf32", 60, functools.partial(verify_backend, "triton", True)),
    Stage("timings-compiled", 150, functools.partial(timings, "compiled", True)),
    Stage("sanitizer", 150, sanitizer),
    Stage("profiler", 90, profiler),
)


def run_stages(stages: Any, out: Path, command: Callable[[Stage], list[str]], seconds: float) -> dict:
    """Stage by stage, each in a process; the summary is written anew after each."""
    out.mkdir(parents=True, exist_ok=True)
    begin, summary = time.monotonic(), {}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for stage in stages:
        path, log = out / f"{stage.name}.json", out / f"{stage.name}.log"
        left = seconds - (time.monotonic() - begin)
        start = time.monotonic()
        if path.exists() and json.loads(path.read_text())["state"] == "finished":
            state = "finished"
        elif left < 10:
            state = "no time left"
        else:
            with log.open("w") as stream:
                try:
                    done = subprocess.run(
                        command(stage),
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                        env=environment,
                        cwd=ROOT,
                        timeout=min(stage.limit, left),
                    )
                    state = "finished" if done.returncode == 0 else f"ended with {done.returncode}"
                except subprocess.TimeoutExpired:
                    state = f"stopped after {min(stage.limit, left):.0f} s"
        found = json.loads(path.read_text()) if path.exists() else {"rows": [], "failed": 0}
        summary[stage.name] = {
            "state": state,
            "seconds": round(time.monotonic() - start, 1),
            "rows": len(found["rows"]),
            "failed": found["failed"],
        }
        files.write(out / "gpu.json", json.dumps(summary, indent=1) + "\n")
        print(f"{stage.name:22} {summary[stage.name]}", flush=True)
    return summary


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--dry-run", action="store_true", help="every stage on the CPU, small")
    parser.add_argument("--seconds", type=float, default=440, help="for all stages together (440)")
    parser.add_argument(
        "--stage", choices=[stage.name for stage in STAGES], help="this alone, in this process"
    )
    parser.add_argument("--once", metavar="DEVICE", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    device = Device("cpu" if args.dry_run else "cuda")
    if args.once:
        once(args.once)
        return 0
    if not args.dry_run and not torch.cuda.is_available():
        print("tests.gpu: torch finds no GPU (--dry-run walks the stages on the CPU)", file=sys.stderr)
        return 2
    if args.stage:
        report = Report(args.out / f"{args.stage}.json")
        report.save("unfinished")
        try:
            next(stage for stage in STAGES if stage.name == args.stage).run(device, report)
        except BaseException as error:
            report.add(failed=f"the stage ended: {type(error).__name__}: {error}"[:2000])
            report.save("unfinished")
            raise
        report.save("finished")
        return 0
    options = ["--out", str(args.out.resolve()), *(["--dry-run"] if args.dry_run else [])]
    command = [sys.executable, "-m", "tests.gpu", *options, "--stage"]
    summary = run_stages(STAGES, args.out, lambda stage: [*command, stage.name], args.seconds)
    bad = [name for name, stage in summary.items() if stage["state"] != "finished" or stage["failed"]]
    print("all stages finished, nothing failed" if not bad else f"to look at: {', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
