"""The command line: `fastda info`, `fastda verify`, `fastda bench` (also as `python -m fastda`)."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    verify.add_argument("--op", action="append", metavar="NAME", help="only this operator; repeatable")
    verify.add_argument(
        "--backend", action="append", choices=backend.BACKENDS, help="only this backend; repeatable"
    )
    verify.set_defaults(run=_verify)

    bench = commands.add_parser(
        "bench",
        parents=[shared],
        help="time every operator against PyTorch at its best",
        description="Time every operator against what people run otherwise: eager PyTorch, contiguous and "
        "channels_last, and torch.compile, taken in turn in one process. Above 1, fastda is "
        "faster. With --out, an interrupted run goes on where it stopped.",
    )
    add_bench_arguments(bench, ["fastda", "eager", "compile"])
    bench.set_defaults(run=run_bench)
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
    except UsageError as error:
        print(f"fastda {args.command}: {error}", file=sys.stderr)
        return 2


class UsageError(Exception):
    pass


def _rich() -> tuple[Any, Any]:
    """A console on standard error, where progress and tables go, and the rich package."""
    try:
        import rich
        import rich.box
        import rich.console
        import rich.progress
        import rich.table
    except ImportError:
        raise UsageError(
            "needs the package rich for its tables: pip install 'fastda-kernels[cli]' (or pip install rich)"
        ) from None
    console = rich.console.Console(stderr=True)
    if not console.is_terminal:
        console.width = 200  # a log has no edge to wrap at
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
            raise UsageError(f"--op must be one of {', '.join(known)}, got {name}")
    return wanted or known


def _write(args: argparse.Namespace, report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=1) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
    elif args.json:
        write_file(Path(args.json), text)
    if args.out:
        write_file(args.out / f"{args.command}.json", text)


def write_file(path: Path, text: str) -> None:
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
    print(f"CUDA kernels: {info['cuda_architectures'] or 'none'}")
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


def add_bench_arguments(parser: argparse.ArgumentParser, peers: Sequence[str]) -> None:
    """What `fastda bench` and `python -m benchmarks` share."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="a family or an operator (default: all)")
    parser.add_argument("--peers", type=_words, metavar="A,B", help=f"contenders, of {', '.join(peers)}")
    parser.add_argument("--threads", type=_numbers, default=[], metavar="1,2", help="numbers of threads")
    parser.add_argument(
        "--shapes",
        type=_shapes,
        default=[],
        metavar="NxCx…",
        help="sizes other than the usual, as in the table",
    )
    parser.add_argument("--dtype", type=_words, default=["float32"], metavar="A,B", help="default: float32")
    parser.add_argument(
        "--mode", type=_words, default=[], metavar="A,B", help="forward, backward (both ways), step"
    )
    parser.add_argument(
        "--layout",
        type=_words,
        default=["contiguous"],
        metavar="A,B",
        help="of fastda's input; peers have both",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or xpu (default: cpu)")
    parser.add_argument("--sessions", type=int, default=3, help="processes per case (default: 3)")
    parser.add_argument(
        "--rounds", type=int, help="rounds per session at least (default: 2, or what is done after 10 s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one size an operator, eager peers; about a minute"
    )


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


def _shapes(text: str) -> list[tuple[int, ...]]:
    return [tuple(int(size) for size in word.replace("×", "x").split("x")) for word in _words(text)]


def run_bench(
    args: argparse.Namespace,
    peers: Mapping[str, Any] | None = None,
    run: Callable[..., Iterable[dict[str, Any]]] | None = None,
) -> int:
    """Measure what the arguments say and print a table per family.

    `peers`: providers beyond torch's own; `run`: what measures, in place of `fastda.bench.run`.
    """
    from fastda import bench, workloads

    providers = {**bench.PROVIDERS, **(peers or {})}
    console, rich = _rich()
    rounds = 2 if args.rounds is None else args.rounds
    wanted = args.peers or (["eager"] if args.quick else list(providers))
    _check("--peers", wanted, providers)
    _check("NAME", args.names, [n for w in workloads.WORKLOADS for n in (w.family, w.op, w.name)])
    _check("--dtype", args.dtype, ("float32", "float64", "bfloat16", "float16"))
    _check("--mode", args.mode, ("forward", "backward", "step"))
    _check("--layout", args.layout, ("contiguous", "channels_last"))
    _check("--device", [args.device], backend.info()["devices"])
    numbers = {"--sessions": [args.sessions], "--rounds": [rounds], "--threads": args.threads}
    for option, values in numbers.items():
        for value in values:
            if value < 1:
                raise UsageError(f"{option} must be at least 1, got {value}")
    try:
        todo = workloads.cases(
            args.names,
            shapes=args.shapes,
            dtypes=args.dtype,
            threads=args.threads,
            modes=args.mode,
            layouts=args.layout,
            quick=args.quick,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    if args.device != "cpu":
        todo = [case for case in todo if case.mode != "step"]
    chosen = {name: providers[name] for name in ("fastda", *wanted) if name in providers}
    stamp = bench.machine({1, *(case.threads for case in todo)})
    settings: dict[str, Any] = {
        "sessions": args.sessions,
        "rounds": rounds,
        "seconds": 0.3 if args.quick else 0.8,
        "device": args.device,
        "seed": args.seed,
    }
    if args.rounds is None:
        settings["patience"] = 10.0
    results = (run or bench.run)(todo, chosen, args.out / "cases" if args.out else None, **settings)
    plan = bench.TimeLeft(todo, args.sessions, len(chosen) + 1)
    try:
        rows = _collect(rich, console, results, plan, len(todo))
    except KeyboardInterrupt:
        print("interrupted" + "; the same command goes on from here" * bool(args.out), file=sys.stderr)
        return 130
    _print_bench(console, rich, {w.name: w.family for w in workloads.WORKLOADS}, stamp, rows)
    _write(args, {"machine": stamp, "seed": args.seed, "rows": rows})
    return 0


def _collect(rich: Any, console: Any, results: Iterable[Any], plan: Any, total: int) -> list[Any]:
    """The last row of each case; shows how long it still takes."""
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("{task.fields[left]}"),
    )
    rows = {}
    begin = time.perf_counter()
    with rich.progress.Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("bench", total=plan.left, left="")
        for done, row in enumerate(results, 1):
            rows[row["id"]] = row
            plan.add(row)
            left = f"about {plan.left / 60:.1f} min left"
            session, case = divmod(done - 1, total)
            progress.update(
                task,
                description=f"session {session + 1}, {case + 1}/{total}",
                completed=time.perf_counter() - begin,
                total=time.perf_counter() - begin + plan.left,
                left=left,
            )
            if not console.is_terminal and plan.left and (done % total == 0 or case % 10 == 9):
                console.print(f"session {session + 1} of {plan.sessions}, case {case + 1} of {total}: {left}")
    return list(rows.values())


def _check(option: str, values: Iterable[str], known: Iterable[str]) -> None:
    known = list(dict.fromkeys(known))
    for value in values:
        if value not in known:
            raise UsageError(f"{option} must be one of {', '.join(known)}, got {value}")


def _print_bench(
    console: Any, rich: Any, families: Mapping[str, str], stamp: dict[str, Any], rows: list[Any]
) -> None:
    for family in dict.fromkeys(families[row["case"]["workload"]] for row in rows):
        members = [row for row in rows if families[row["case"]["workload"]] == family]
        others = dict.fromkeys(name for row in members for name in row["contenders"] if name != "fastda")
        title = f"{family}: time of each / time of fastda, above 1 fastda is faster"
        table = rich.table.Table(
            title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for name in ("operator", "sizes", "mode", "best peer [95 % interval]"):
            table.add_column(name, no_wrap=True)
        for name in ("threads", "fastda ms", "GFLOP/s", "% of peak", "GB/s", *map(_short, others)):
            table.add_column(name, justify="right", min_width=6, overflow="fold")
        for row in members:
            case, ours = row["case"], row["contenders"]["fastda"]
            peak = stamp["peaks"].get(str(case["threads"]))
            speed = 1e-9 * row["flops"] / ours["median"]
            table.add_row(
                case["workload"],
                "×".join(map(str, case["sizes"])),
                case["mode"],
                _best(row, "ratio"),
                str(case["threads"]),
                f"{1e3 * ours['median']:.3f}",
                f"{speed:.0f}" if row["flops"] else "",
                f"{100 * speed / peak['gflops']:.0f}" if row["flops"] and peak else "",
                f"{1e-9 * row['bytes'] / ours['median']:.1f}" if row["bytes"] else "",
                *(_cell(row, name, "ratio") for name in others),
            )
            if "added_ratio" in ours:
                cells = (_cell(row, name, "added_ratio") for name in others)
                added = f"{1e3 * ours['added']:.3f}"
                table.add_row("", "", "  added", _best(row, "added_ratio"), "", added, "", "", "", *cells)
        for column in [c for c in table.columns if not any(c._cells)]:
            table.columns.remove(column)
        console.print(table)
    absent = dict.fromkeys(f"without {name}: {why}" for row in rows for name, why in row["absent"].items())
    for line in absent:
        console.print(line, style="dim", highlight=False, soft_wrap=True)
    warned = [row["warnings"] for row in rows]
    for kind in dict.fromkeys(kind for warnings in warned for kind in warnings):
        lines = [f"{row['id']}: {row['warnings'][kind]}" for row in rows if kind in row["warnings"]]
        console.print(
            f"{len(lines)} of {len(rows)} cases are noisy, as", lines[0], style="yellow", soft_wrap=True
        )
    held = " ".join(f"{name}={value}" for name, value in stamp["held"].items())
    peaks = "; ".join(
        f"{t} thread{'s' * (t != '1')}: {p['gflops']:.0f} GFLOP/s, {p['gbs']:.1f} GB/s"
        for t, p in stamp["peaks"].items()
    )
    console.print(f"{stamp['processor']}, {stamp['isa']}, torch {stamp['torch']} {held}".rstrip())
    console.print(f"measured peaks: {peaks}. CL: channels_last. Times are medians; only ratios travel.")


def _short(name: str) -> str:
    return name.replace("channels_last", "CL").replace("torch.compile", "compile")


def _cell(row: dict[str, Any], name: str, what: str) -> str:
    r = row["contenders"].get(name, {}).get(what)
    if r is None:
        return ""
    colour = "green" if r["ratio"] >= 1 else "red"
    return f"[{colour}]{_number(r['ratio'])}[/{colour}]"


def _number(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 100 else ">100"


def _best(row: dict[str, Any], what: str) -> str:
    if row["best"] is None:
        return ""
    r = row["contenders"][row["best"]][what]
    interval = f"[dim]\\[{_number(r['low'])}–{_number(r['high'])}][/dim]"
    return f"{_cell(row, row['best'], what)} {interval} {_short(row['best'])}"


def _setting(info: dict[str, Any]) -> str:
    isa = info["cpu_isa"] or "reference only"
    return f"fastda {info['fastda']}, torch {info['torch']}, {isa}, {info['threads']} threads"
