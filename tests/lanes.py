"""The lanes of the conformance tests: each backend, and the process that it needs.

A test that takes a `lane` runs once on each. What must be settled before torch or Triton is loaded
needs a process of its own: a pytest beside this one, which collects the same tests and runs those that it is
sent. Ids and reports are the same everywhere: `python -m pytest -k "emulated and conv_same"` finds them.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from fastda import backend

ROOT = Path(__file__).resolve().parents[1]
SERVING = os.environ.get("FASTDA_TEST_LANE")  # in the process of a lane: its name
PIPE = os.environ.get("FASTDA_TEST_PIPE")  # and where it is told what to run; all without it


@dataclass(frozen=True)
class Lane:
    """One backend on one device, as tests see it."""

    name: str
    backend: str
    why_not: str | None  # it is not to be had here
    device: str = "cpu"
    # Where it needs a process of its own: the variables of that process, and the folders of its tests.
    environment: Callable[[], Mapping[str, str]] | None = None
    folders: tuple[str, ...] = ("tests/conformance",)
    interpreted: bool = False  # so slow that sizes and layouts take turns

    @property
    def here(self) -> bool:
        """Whether this process is the one."""
        return self.name == SERVING or (SERVING is None and self.environment is None)

    @property
    def emulated(self) -> bool:
        """Whether the device is the one of tests/cuda_host."""
        return self.backend == "cuda" and self.device == "cpu"

    @property
    def ops(self) -> Any:
        """The raw operators."""
        if self.emulated:
            return importlib.import_module("tests.cuda.emulated").ops
        return backend.kernels(self.backend)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """The public functions are served by this lane."""
        if self.emulated:
            importlib.import_module("tests.cuda.emulated").reset()
        # What serves anyway is not forced: an operator may have a shorter way for it, which users get.
        served = backend.info()["devices"][self.device]["serving"] == self.backend
        placed = contextlib.nullcontext() if self.device == "cpu" else torch.device(self.device)
        with placed, contextlib.nullcontext() if served else backend.use_backend(self.backend):
            yield

    def shuffle(self, seed: int) -> None:
        """Another order of threads, where there is a choice."""
        if self.emulated:
            importlib.import_module("cuda_host").set_seed(seed)


def _isa(name: str) -> Lane:
    running = backend.native.cpu_isa() if backend.native is not None else None
    why_not = backend.native_error
    if running is not None and backend.CPU_ISAS.index(name) > backend.CPU_ISAS.index(running):
        why_not = f"this process runs {running}"
    itself = SERVING is None and name == running
    return Lane(name, "cpp", why_not, environment=None if itself else lambda: {"FASTDA_CPU_ISA": name})


def _emulated_environment() -> dict[str, str]:
    build = importlib.import_module("tests.cuda_host.build")
    build.build()
    return build.environment()


def _ptx_environment() -> dict[str, str]:
    return {
        **_emulated_environment(),
        "FASTDA_TEST_PTX": str(importlib.import_module("tests.cuda_host.build").PTX),
    }


def _interpreter_why_not() -> str | None:
    """Asked in the lane's own process, whose interpreter it is: Triton 3.6's cannot count to an argument
    with NumPy 2.4, which no longer takes an array of one entry for an index."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if SERVING != "triton":
        return None
    triton = importlib.import_module("triton")

    def count(end):
        for _ in range(end):
            pass

    try:
        triton.jit(count)[(1,)](2)
    except triton.runtime.errors.InterpreterError as error:
        numpy = importlib.import_module("numpy").__version__
        return f"the interpreter of Triton {triton.__version__} fails with NumPy {numpy}: {error}"
    return None


def _lanes() -> tuple[Lane, ...]:
    without_nvcc = None if shutil.which("nvcc") else "nvcc is not installed"
    elsewhere = None if sys.platform == "linux" else "the executor switches stacks as Linux has them"
    lanes = (
        Lane("reference", "reference", None),
        *map(_isa, reversed(backend.CPU_ISAS)),
        Lane(
            *("triton", "triton", _interpreter_why_not()),
            environment=lambda: {"TRITON_INTERPRET": "1"},
            folders=("tests/conformance", "tests/triton"),
            interpreted=True,
        ),
        Lane(
            *("emulated", "cuda", backend.native_error or elsewhere),
            environment=_emulated_environment,
            folders=("tests/conformance", "tests/cuda"),
            interpreted=True,
        ),
        Lane(
            *("ptx", "cuda", backend.native_error or elsewhere or without_nvcc),
            environment=_ptx_environment,
            folders=("tests/conformance", "tests/cuda"),
            interpreted=True,
        ),
    )
    if not torch.cuda.is_available():
        return lanes
    gpu = (("gpu", "cuda"), ("gpu_triton", "triton"))
    return (*lanes, *(Lane(name, served, backend.why_not(served, "cuda"), "cuda") for name, served in gpu))


LANES = _lanes()
KERNELS = tuple(lane.name for lane in LANES if lane.backend != "reference")
EVERY = tuple(lane.name for lane in LANES)
CPU = tuple(lane.name for lane in LANES if lane.backend == "cpp")


def parameters(names: tuple[str, ...]) -> list[Any]:
    """The lanes of a test, in the process of a lane that one alone.

    Without `names` all but PTX, whose kernels alone are others than those of the emulated device.
    """
    return [
        pytest.param(
            lane, id=lane.name, marks=[pytest.mark.skip(reason=lane.why_not)] * (lane.why_not is not None)
        )
        for lane in LANES
        if (lane.name in names or (not names and lane.name != "ptx")) and SERVING in (None, lane.name)
    ]


class _Process:
    """The pytest of a lane, started with its first test."""

    def __init__(self, lane: Lane) -> None:
        assert lane.environment is not None
        self.connection, there = multiprocessing.Pipe()
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with this process)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        pipe = {"FASTDA_TEST_LANE": lane.name, "FASTDA_TEST_PIPE": str(there.fileno())}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", *lane.folders],
            env={**environment, "PYTHONPATH": path(), **lane.environment(), **pipe},
            cwd=ROOT,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            pass_fds=[there.fileno()],
        )
        there.close()
        atexit.register(self.close)

    def run(self, test: str) -> tuple[str, str]:
        """Its outcome, and what there is to say about it."""
        try:
            self.connection.send(test)
            return self.connection.recv()
        except (EOFError, OSError):
            status = self.process.wait()
            self.output.seek(0)
            _process.cache_clear()
            return "failed", f"its process ended with status {status}\n{self.output.read()[-20000:]}"

    def close(self) -> None:
        self.connection.close()
        self.process.wait()


def path() -> str:
    """PYTHONPATH with the tests, and behind what is on it already: another build may be under test."""
    return os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))


@functools.cache
def _process(name: str) -> _Process:
    return _Process(next(lane for lane in LANES if lane.name == name))


def run_elsewhere(lane: Lane, test: str) -> None:
    """Run the test with this id in the process of the lane; its outcome is raised here."""
    outcome, text = _process(lane.name).run(test)
    if outcome == "skipped":
        pytest.skip(text)
    if outcome == "failed":
        pytest.fail(text, pytrace=False)


class _Reports:
    def __init__(self) -> None:
        self.reports: list[pytest.TestReport] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def outcome(self) -> tuple[str, str]:
        for report in self.reports:
            if report.failed:
                return "failed", report.longreprtext
        for report in self.reports:
            if report.skipped:
                return "skipped", report.longrepr[2] if isinstance(report.longrepr, tuple) else str(
                    report.longrepr
                )
        return "passed", ""


def serve(session: pytest.Session) -> None:
    """In the process of a lane: run what the other side of the pipe asks for, until it hangs up."""
    assert PIPE is not None
    connection = Connection(int(PIPE))
    tests = {item.nodeid: item for item in session.items}
    with contextlib.suppress(EOFError):
        while True:
            item, reports = tests[connection.recv()], _Reports()
            session.config.pluginmanager.register(reports)
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            session.config.pluginmanager.unregister(reports)
            connection.send(reports.outcome())


def launched() -> set[str]:
    """Names of the kernels that the emulated device has run in this test."""
    return {name for name, *_ in importlib.import_module("cuda_host").launches()}
