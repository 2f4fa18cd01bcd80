"""This work tree against another revision of it: "did my change help?"

Two builds of fastda cannot live in one process, so each has one of its own, and samples are taken from them
in turn. The other revision is unpacked and compiled in a folder of its own, kept for the next time. Both run
the benchmarks of this tree, so a revision is comparable as long as it has the operator.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# What measures is this tree's in both processes. What `import fastda` loads besides is each one's own.
SHARED = ("fastda.registry", "fastda.timing", "fastda.tools")


class BaseError(Exception):
    """The other revision cannot be had or does not build."""


def checkout(revision: str, folder: Path) -> tuple[str, Path]:
    """The revision's short hash, and its files under `folder` with the extension built in place."""
    commit = _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").decode().strip()
    tree = (folder / commit[:12]).resolve()
    if not (tree / ".built").exists():
        with tarfile.open(fileobj=io.BytesIO(_git("archive", "--format=tar", commit))) as archive:
            archive.extractall(tree, filter="data")
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        environment = {**os.environ, "FASTDA_REQUIRE_NATIVE": "1", "PYTHONPATH": str(tree)}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise BaseError(f"{revision} does not build in {tree}:\n{(done.stdout + done.stderr)[-2000:]}")
        (tree / ".built").touch()
    return commit[:9], tree


def _git(*arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    if done.returncode:
        why = done.stderr.decode().strip() or "no such revision"
        raise BaseError(f"git {' '.join(arguments)}: {why}")
    return done.stdout


class Worker:
    """A process that imports the fastda of `tree` and times its calls on request."""

    def __init__(self, tree: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(tree)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(tree)},
        )

    def ask(self, message: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):  # it has ended, as the answer that does not come says
            print(json.dumps(message), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise BaseError("a worker process ended; its message stands above")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def sample(self, n: int) -> float:
        return self.ask(n)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def session(name: str, tree: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """For `bench.run`: measures `fastda` against `base`, the revision `name` that `checkout` put in
    `tree`, in a process each."""
    workers = {"fastda": Worker(ROOT), f"base {name}": Worker(tree)}
    try:
        yield functools.partial(_measure, workers)
    finally:
        for worker in workers.values():
            worker.close()


def _measure(
    workers: dict[str, Worker], case: Any, providers: Any, *, device: str, seed: int, **settings: Any
) -> dict[str, Any]:
    from fastda.tools import bench

    begin = time.perf_counter()
    samplers, absent = {}, {}
    for label, worker in workers.items():
        try:
            worker.ask({"case": vars(case), "device": device, "seed": seed})
            samplers[label] = worker.sample
        except RuntimeError as error:
            if label == "fastda":
                raise
            absent[label] = str(error)
    row = bench.result(bench.Task(case, device, seed), samplers, seed=seed, **settings)
    # This process only waits, so its share of the core says nothing.
    row |= {"busy": 1.0, "absent": absent, "seconds": time.perf_counter() - begin}
    row["warnings"].pop("shared", None)
    return row


def _serve(tree: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anybody prints does not mix with the answers
    sys.path[:] = [
        str(tree),
        *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "benchmarks")),
    ]
    import fastda

    own = list(fastda.__path__)
    fastda.__path__[:] = [str(ROOT / "fastda")]
    for name in [n for n in sys.modules if n.startswith(SHARED)]:
        del sys.modules[name]
    from fastda import timing
    from fastda.tools import bench, workloads

    fastda.__path__[:] = own
    assert Path(fastda.__file__).resolve().is_relative_to(tree.resolve())
    sample, settings = None, None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if isinstance(message, int):
                value = sample(message)
            else:
                if settings is not None:
                    settings.__exit__(None, None, None)
                bench.keep_freed_memory()
                case = workloads.Case(**{**message["case"], "sizes": tuple(message["case"]["sizes"])})
                settings = bench.task_settings(case)
                settings.__enter__()
                task = bench.Task(case, message["device"], message["seed"])
                _, call = next(bench.PROVIDERS["fastda"](task))
                call()  # an operator that the tree lacks shows here
                sample, value = timing.timed(call, task.clock()), True
            answer = {"value": value}
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
