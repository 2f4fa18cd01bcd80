"""What one line more is worth in the steps of fifteen public trainings.

Measures each as published and with `fastda.optimize`, contiguous and in channels_last, prints a table, and
writes OUT/trainings.json. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cli import ISAS, hold
from benchmarks.trainings import TRAININGS, page
from benchmarks.trainings.measure import LAYOUTS, Case, own_process, peak_memory
from fastda.tools import bench, cli
from fastda.tools.console import Cell, Column, Console


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.trainings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(t.name for t in TRAININGS)
    p.add_argument("--only", type=cli._words, default=[], metavar="A,B", help=f"some of: {names}")
    p.add_argument("--sessions", type=int, default=3, help="processes per training (default: 3)")
    p.add_argument(
        "--rounds", type=int, help="rounds per session at least (default: 2, or what is done after 10 s)"
    )
    p.add_argument(
        "--layout",
        type=cli._words,
        default=list(LAYOUTS),
        metavar="A,B",
        help=f"of {', '.join(LAYOUTS)} (both)",
    )
    p.add_argument("--compile", action="store_true", help="torch.compile, too")
    p.add_argument("--no-memory", action="store_true", help="without the peaks, half of the time")
    p.add_argument("--quick", action="store_true", help="tiny sizes, one session: whether it runs")
    p.add_argument("--isa", choices=ISAS, help="hold fastda and torch to an instruction set; in OUT/ISA")
    p.add_argument("--render", action="store_true", help="measure nothing: docs/trainings.md from OUT")
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("out/trainings"), help="out/trainings")
    p.add_argument("--json", metavar="FILE", help="write this run as JSON; - for standard output")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.command = "trainings"
    try:
        if args.render:
            page.publish(args.out)
            return 0
        if args.isa:
            hold(args.isa, args.out, "benchmarks.trainings", argv)
            args.out = args.out / args.isa
        return _run(args)
    except (cli.UsageError, ValueError) as error:
        print(f"trainings: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    cli.check_writable(args)
    cli._check("--only", args.only, [t.name for t in TRAININGS])
    sessions = 1 if args.quick else args.sessions
    for option, value in (("--sessions", sessions), ("--rounds", args.rounds)):
        if value is not None and value < 1:
            raise cli.UsageError(f"{option} must be at least 1, got {value}")
    cli._check("--layout", args.layout, LAYOUTS)
    if "contiguous" not in args.layout:
        raise cli.UsageError("--layout must have contiguous, as the trainings are published")
    chosen = [t.name for t in TRAININGS if not args.only or t.name in args.only]
    todo = [Case(name, tuple(args.layout), args.quick, args.compile) for name in chosen]
    settings: dict[str, Any] = {"rounds": args.rounds or 2, "seconds": 0.0 if args.quick else 0.8}
    if args.rounds is None:
        settings["patience"] = 10.0
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((args.out / "inductor").resolve()))
    stamp = bench.machine()
    run = functools.partial(
        bench.run, todo, {"eager": None, "fastda": None}, args.out / "cases", sessions=sessions
    )
    also = _nothing if args.quick or args.no_memory else _memory
    console, rows = Console(), {}
    with console.progress("trainings", sessions * len(todo)) as progress:
        for done, row in enumerate(run(also=also, session=own_process, **settings), 1):
            rows[row["id"]] = row
            progress.update(completed=done, left=row["case"]["name"])
            if not console.is_terminal:
                console.print(f"{done} of {sessions * len(todo)}: {row['id']}")
    report = {"machine": stamp, "rows": list(rows.values())}
    _print(console, report)
    cli._write(args, report)
    return 0


def _nothing(case: Case, row: dict[str, Any]) -> dict[str, Any]:
    return {}


def _memory(case: Case, row: dict[str, Any]) -> dict[str, Any]:
    return {"memory": peak_memory(case, row)}


def _print(console: Console, report: dict[str, Any]) -> None:
    columns = [Column(name, right=i > 0) for i, name in enumerate(page.HEADINGS)]
    lines: list[list[Cell | str]] = []
    for row in report["rows"]:
        first, *rest = page.cells(row)
        lines.append([first, *(Cell(c.strip("*"), "bold red" if c.startswith("**") else "") for c in rest)])
    console.table("time of a step as published / time with fastda.optimize", columns, lines)
    for row in report["rows"]:
        for name, why in row["absent"].items():
            console.print(Cell(f"{row['case']['name']} without {name}: {why}", "dim"))
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in row["spent"].items())
        console.print(Cell(f"{row['case']['name']} is spent on: {shares}", "dim"))
    m = report["machine"]
    console.print(f"{m['processor']}, {m['isa']}, torch {m['torch']}. CPU time; only ratios travel.")


if __name__ == "__main__":
    sys.exit(main())
