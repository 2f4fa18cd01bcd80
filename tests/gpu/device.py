"""The device, and what a stage writes down."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastda import backend, files, testing

ROOT = Path(__file__).resolve().parents[2]
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


def shell(*command: str, seconds: float = 300) -> str:
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not installed"
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    return (done.stdout + done.stderr)[-8000:]
