"""What the trainings' commands share: errors in one line, folders for results, trainings side by side."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from fastda import files
from fastda.recipes.common.checkpoint import CheckpointError
from fastda.recipes.common.folders import DataError, hidden

CHECKPOINT = "checkpoint.safetensors"


class SettingsError(ValueError):
    """Settings that cannot be, by themselves or for the data; the message names the setting."""


class Diverged(RuntimeError):
    """A training whose numbers are no longer finite; `curves` is what it logged before."""

    def __init__(self, message: str, curves: list[dict[str, float]]) -> None:
        super().__init__(message)
        self.curves = curves


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def run(program: str, command: Callable[[], int]) -> int:
    """The command's exit status; what a user can mend is one line on standard error.

    2: the data, the settings or the folder cannot be used; 1: the disk did not take the results.
    """
    try:
        return command()
    except (DataError, SettingsError, CheckpointError, files.FolderError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except BrokenProcessPool:
        print(
            f"{program}: a training's process was killed, by lack of memory perhaps; --resume goes on, "
            f"--jobs 1 takes the least",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


@contextmanager
def results_in(out: Path, resume: bool = False, overwrite: bool = False) -> Iterator[None]:
    """`out` is this run's alone. Results that it holds already are refused, gone on from or removed."""
    with files.claimed(out):
        earlier = [*out.glob("results.json"), *out.glob(f"*/{CHECKPOINT}")]
        if earlier and not (resume or overwrite):
            raise files.FolderError(
                f"{out}: holds the results of a run ({earlier[0].relative_to(out)}); "
                f"--resume goes on from them, --overwrite removes them"
            )
        if overwrite and not resume:
            for path in (*earlier, *out.glob("report.html"), *out.glob("*/grid*.png"),
                         *out.glob("*/measures.json")):  # fmt: skip
                path.unlink()
            shutil.rmtree(out / "tensorboard", ignore_errors=True)
        yield


@contextmanager
def files_in(out: Path, overwrite: bool) -> Iterator[None]:
    """`out` is this run's alone, and holds nothing yet, unless what has the same name is to be replaced."""
    with files.claimed(out):
        held = next((path for path in sorted(out.iterdir()) if not hidden(path.name)), None)
        if held is not None and not overwrite:
            raise files.FolderError(f"{out}: is not empty ({held.name}); --overwrite replaces what it holds")
        yield


def side_by_side(
    jobs: int, run_one: Callable[..., Any], runs: Sequence[tuple[Any, ...]], start: Callable[..., None],
    *arguments: Any,
) -> Iterator[Any]:  # fmt: skip
    """Results of `run_one(*run, index)` in order of the runs, `jobs` at a time.

    Beyond one, each process begins with `start(lock of the progress bars, *arguments)`.
    """
    if jobs == 1:
        for index, one in enumerate(runs):
            yield run_one(*one, index)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, _start_worker, (start, context.RLock(), arguments))
    try:
        for future in [pool.submit(run_one, *one, index) for index, one in enumerate(runs)]:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(start: Callable[..., None], lock: Any, arguments: tuple[Any, ...]) -> None:
    from tqdm import tqdm

    tqdm.set_lock(lock)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the workers; the parent alone speaks of it
    start(*arguments)


def bar(shown: bool = True, **options: Any) -> Any:
    """A progress bar; in a log, which is no terminal, nothing."""
    from tqdm import tqdm

    return tqdm(dynamic_ncols=True, mininterval=0.5, disable=None if shown else True, **options)


def in_log(text: str) -> None:
    """A line for who reads a log; a terminal has its bars."""
    if not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def check_finite(name: str, step: str, values: dict[str, float], curves: list[dict[str, float]]) -> None:
    """Raises Diverged where a logged value is not finite."""
    bad = [key for key, value in values.items() if not math.isfinite(value)]
    if bad:
        what, value = bad[0].replace("_", " "), values[bad[0]]
        raise Diverged(f"{' '.join(name.split())}: diverged, {what} is {value} at {step}", curves)
