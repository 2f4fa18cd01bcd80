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
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastda import files
from tests.gpu.device import ROOT, Device, Report, shell
from tests.gpu.fast import convolutions, timings
from tests.gpu.right import calls, conformance, graphs, info, repeats, streams, verify_backend


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
    Stage("timings-norm", 60, functools.partial(timings, "norm", False)),
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
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # see tests/conftest.py
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
