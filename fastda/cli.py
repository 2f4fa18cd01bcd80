"""The command line: `fastda info`, `fastda verify`, `fastda bench` (also as `python -m fastda`)."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastda import backend

T = TypeVar("T")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastda", description="Fused kernels for domain adaptation.")
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", metavar="FILE", help="write all results as JSON; - for standard output")
    shared.add_argument("--out", metavar="DIR", type=Path, help="write the JSON to DIR/<command>.json")
    shared.add_argument("--seed", type=int, default=0, help="seed of the random inputs (default: 0)")
    shared.add_argument("--op", action="append", metavar="NAME", help="only this operator; repeatable")

    info = commands.add_parser("info", help="what is built, and which kernels serve which device")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    verify = commands.add_parser(
        "verify",
        parents=[shared],
        help="compare every operator with its float64 reference",
        description="Compare every operator with its reference in float64, values and all gradients, over "
        "odd shapes, dtypes, layouts and backends. Exits with 1 if any error exceeds its tolerance.",
    )
    verify.add_argument(
        "--backend", action="append", choices=backend.BACKENDS, help="only this backend; repeatable"
    )
    verify.set_defaults(run=_verify)

    bench = commands.add_parser(
        "bench",
        parents=[shared],
        help="time every operator against eager PyTorch",
        description="Time forward and backward of every operator against its reference in eager PyTorch, "
        "taken in turn in one process. A ratio above 1 means that fastda is faster.",
    )
    bench.add_argument("--quick", action="store_true", help="one shape an operator; takes about a minute")
    bench.add_argument("--rounds", type=int, default=20, help="rounds per shape (default: 20)")
    bench.set_defaults(run=_bench)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.version:
        print(backend.info()["fastda"])
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return args.run(args)
    except _UsageError as error:
        print(f"fastda {args.command}: {error}", file=sys.stderr)
        return 2


class _UsageError(Exception):
    pass


def _rich() -> tuple[Any, Any]:
    """A console on standard error, where progress and tables go, and the rich package."""
    try:
        import rich
        import rich.console
        import rich.progress
        import rich.table
    except ImportError:
        raise _UsageError(
            "needs the package rich for its tables: pip install 'fastda-kernels[cli]' (or pip install rich)"
        ) from None
    console = rich.console.Console(stderr=True)
    if not console.is_terminal:
        console.width = 120  # a log has no edge to wrap at
    return console, rich


def _progress(rich: Any, console: Any, items: Iterable[T], total: int, what: str) -> Iterator[T]:
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as progress:
        yield from progress.track(items, total=total, description=what)


def _operators(wanted: Sequence[str] | None) -> Sequence[str]:
    from fastda import verify

    known = [op.name for op in verify.OPERATORS]
    for name in wanted or ():
        if name not in known:
            raise _UsageError(f"--op must be one of {', '.join(known)}, got {name}")
    return wanted or known


def _write(args: argparse.Namespace, report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=1) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
    elif args.json:
        _write_file(Path(args.json), text)
    if args.out:
        _write_file(args.out / f"{args.command}.json", text)


def _write_file(path: Path, text: str) -> None:
    """All or nothing: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _info(args: argparse.Namespace) -> int:
    info = backend.info()
    if args.json:
        print(json.dumps(info, indent=1))
        return 0
    print(f"fastda {info['fastda']}, torch {info['torch']}, Python {info['python']}, {info['machine']}")
    print(f"CPU kernels: {info['cpu_isa'] or 'none'}, {info['threads']} threads")
    if info["forced_backend"]:
        print(f"forced backend: {info['forced_backend']}")
    for device, state in info["devices"].items():
        print(f"{device}: served by {state['serving']}")
        for name, reason in state["backends"].items():
            print(f"  {name:<10} {reason}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from fastda import verify

    console, rich = _rich()
    info = backend.info()
    forced = [info["forced_backend"]] if info["forced_backend"] else None
    cases = list(verify.cases(_operators(args.op), args.backend or forced, list(info["devices"])))
    start = time.perf_counter()
    rows: list[verify.Row] = []
    for case in _progress(rich, console, cases, len(cases), "verify"):
        rows += verify.check(case, args.seed)
    seconds = time.perf_counter() - start
    failed = [row for row in rows if not row.passed]

    title = f"largest error against the float64 reference, as a share of its tolerance ({_setting(info)})"
    table = rich.table.Table(title=title, title_justify="left")
    dtypes = [str(dtype).removeprefix("torch.") for dtype in verify.DTYPES]
    for name in ("operator", "backend", "checks", *dtypes, "verdict"):
        table.add_column(name, justify="right" if name in ("checks", *dtypes) else "left", no_wrap=True)
    groups: dict[tuple[str, str], list[verify.Row]] = {}
    for row in rows:
        served = row.backend if row.device == "cpu" else f"{row.backend} on {row.device}"
        groups.setdefault((row.op, served), []).append(row)
    for key, members in groups.items():
        worst = [max((row.used for row in members if row.dtype == dtype), default=0.0) for dtype in dtypes]
        bad = sum(not row.passed for row in members)
        verdict = f"[red]{bad} FAILED[/red]" if bad else "[green]ok[/green]"
        table.add_row(*key, str(len(members)), *(f"{share:.2f}" for share in worst), verdict)
    console.print(table)
    for row in failed[:20]:
        where = f"{row.op}({row.options}) {row.sizes} {row.dtype} {row.layout} {row.backend} {row.device}"
        detail = row.message or f"{row.error} exceeds {row.tolerance}"
        console.print(f"[red]FAILED[/red] {where} {row.what}: {detail}", soft_wrap=True, highlight=False)
    if len(failed) > 20:
        console.print(f"… and {len(failed) - 20} more")
    console.print(f"{len(rows) - len(failed)} of {len(rows)} checks passed in {seconds:.1f} s")
    report = {
        "info": info,
        "seed": args.seed,
        "seconds": seconds,
        "passed": len(rows) - len(failed),
        "failed": len(failed),
        "rows": [row.as_dict() for row in rows],
    }
    _write(args, report)
    return 1 if failed or not rows else 0


def _bench(args: argparse.Namespace) -> int:
    from fastda import bench

    console, rich = _rich()
    if args.rounds < 1:
        raise _UsageError(f"--rounds must be at least 1, got {args.rounds}")
    info = backend.info()
    jobs = bench.jobs(_operators(args.op), quick=args.quick)
    rows = [
        bench.measure(*job, rounds=args.rounds, seed=args.seed)
        for job in _progress(rich, console, jobs, len(jobs), "bench")
    ]
    title = f"forward + backward, eager time / fastda time ({_setting(info)})"
    table = rich.table.Table(title=title, title_justify="left")
    for name in ("operator", "sizes", "fastda", "eager", "ratio", "rounds"):
        table.add_column(name, justify="left" if name in ("operator", "sizes") else "right")
    for row in rows:
        times = [f"{1e3 * row[who]['median']:.3f} ms" for who in ("fastda", "eager")]
        colour = "green" if row["ratio"] >= 1 else "red"
        sizes = "×".join(map(str, row["sizes"]))
        table.add_row(row["op"], sizes, *times, f"[{colour}]{row['ratio']:.2f}[/{colour}]", str(args.rounds))
    console.print(table)
    console.print("eager: the faster of contiguous and channels_last. Times are medians; only ratios travel.")
    _write(args, {"info": info, "seed": args.seed, "rounds": args.rounds, "rows": rows})
    return 0


def _setting(info: dict[str, Any]) -> str:
    isa = info["cpu_isa"] or "reference only"
    return f"fastda {info['fastda']}, torch {info['torch']}, {isa}, {info['threads']} threads"
