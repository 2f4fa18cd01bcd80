"""The command line: `fastda info`, `verify`, `bench`, and the trainings (also as `python -m fastda`)."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastda import backend, files, recipes, registry
from fastda.tools.console import Cell, Column, Console


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

    for name, what in recipes.NAMES.items():
        commands.add_parser(name, help=what, add_help=False)  # its arguments are its own affair
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    if argv and argv[0] in recipes.NAMES:
        args = argparse.Namespace(version=False, command=argv[0], run=lambda args: _recipe(args, argv[1:]))
    else:
        args = parser.parse_args(argv)
    if args.version:
        print(backend.info()["fastda"])
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    if damage := backend.damage():
        print(f"fastda: {damage}", file=sys.stderr)
    try:
        return args.run(args)
    except UsageError as error:
        print(f"fastda {args.command}: {error}", file=sys.stderr)
        return 2
    except files.WriteError as error:
        print(f"fastda {args.command}: {error}", file=sys.stderr)
        return 1


class UsageError(Exception):
    pass


def _recipe(args: argparse.Namespace, argv: Sequence[str]) -> int:
    try:
        return recipes.run(args.command, argv)
    except recipes.MissingPackages as error:
        raise UsageError(str(error)) from None


def _operators(wanted: Sequence[str] | None) -> Sequence[str]:
    known = [op.name for op in registry.OPERATORS]
    for name in wanted or ():
        if name not in known:
            raise UsageError(f"--op must be one of {', '.join(known)}, got {name}")
    return wanted or known


def _write(args: argparse.Namespace, report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=1) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
    elif args.json:
        files.write(Path(args.json), text)
    if args.out:
        files.write(args.out / f"{args.command}.json", text)


def check_writable(args: argparse.Namespace) -> None:
    """Raise UsageError now, not after the work, where --out or --json could not be written."""
    for option, folder in (
        ("--out", args.out),
        ("--json", args.json not in (None, "-") and Path(args.json).parent),
    ):
        if not folder:
            continue
        try:
            files.check_writable(folder)
        except files.WriteError as error:
            raise UsageError(f"{option}: {error}") from None
    if args.json not in (None, "-") and Path(args.json).is_dir():
        raise UsageError(f"--json: {args.json} is a folder")


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
        if state["serving"] is None:
            print(f"{device}: not served, calls raise: {state['backends'][info['forced_backend']]}")
        else:
            print(f"{device}: served by {state['serving']}")
        for name, reason in state["backends"].items():
            print(f"  {name:<10} {reason}")
    for backends in dict.fromkeys(tuple(b) for b in info["only"].values()):
        ops = ", ".join(op for op, only in info["only"].items() if tuple(only) == backends)
        print(f"kernels of {' and '.join(backends)} alone, elsewhere the reference serves: {ops}")
    if info["damage"]:
        print(f"damaged: {info['damage']}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from fastda.tools import verify

    check_writable(args)
    console = Console()
    info = backend.info()
    devices = list(info["devices"])
    forced = [info["forced_backend"]] if info["forced_backend"] else None
    wanted = args.backend or forced
    for name in wanted or ():
        if all(backend.why_not(name, device) for device in devices):
            raise UsageError(f"backend {name} cannot be verified here: {backend.why_not(name, devices[-1])}")
    cases = list(verify.cases(_operators(args.op), wanted, devices))
    start = time.perf_counter()
    rows: list[verify.Row] = []
    with console.progress("verify", len(cases)) as progress:
        for done, case in enumerate(cases, 1):
            rows += verify.check(case, args.seed)
            progress.update(completed=done)
    seconds = time.perf_counter() - start
    failed = [row for row in rows if not row.passed]

    dtypes = [str(dtype).removeprefix("torch.") for dtype in verify.DTYPES]
    columns = [Column("operator"), Column("backend"), Column("checks", right=True)]
    columns += [Column(name, right=True, rank=2) for name in dtypes]
    columns += [Column("worst", right=True), Column("verdict")]
    groups: dict[tuple[str, str], list[verify.Row]] = {}
    for row in rows:
        served = row.backend if row.device == "cpu" else f"{row.backend} on {row.device}"
        groups.setdefault((row.op, served), []).append(row)
    lines: list[list[Cell | str]] = []
    for key, members in groups.items():
        worst = [max((row.used for row in members if row.dtype == dtype), default=0.0) for dtype in dtypes]
        bad = sum(not row.passed for row in members)
        verdict = Cell(f"{bad} FAILED", "red") if bad else Cell("ok", "green")
        shares = [f"{share:.2f}" for share in (*worst, max(worst))]
        lines.append([*key, str(len(members)), *shares, verdict])
    console.table("largest error against the float64 reference, as a share of its tolerance", columns, lines)
    for row in failed[:20]:
        where = f"{row.op}({row.options}) {row.sizes} {row.dtype} {row.layout} {row.backend} {row.device}"
        detail = row.message or f"{row.error} exceeds {row.tolerance}"
        console.print(Cell("FAILED ", "red"), f"{where} {row.what}: {detail}")
    if len(failed) > 20:
        console.print(f"… and {len(failed) - 20} more")
    console.print(_setting(info))
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
    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        message = f"must be whole numbers with commas between, such as 1,2, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def _shapes(text: str) -> list[tuple[int, ...]]:
    try:
        return [tuple(int(size) for size in word.replace("×", "x").split("x")) for word in _words(text)]
    except ValueError:
        message = f"must be sizes with x between and commas between shapes, such as 8x4,128x768, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def run_bench(
    args: argparse.Namespace,
    peers: Mapping[str, Any] | None = None,
    run: Callable[..., Iterable[dict[str, Any]]] | None = None,
) -> int:
    """Measure what the arguments say and print a table per family.

    `peers`: providers beyond torch's own; `run`: what measures, in place of `fastda.tools.bench.run`.
    """
    from fastda.tools import bench, workloads

    check_writable(args)
    providers = {**bench.PROVIDERS, **(peers or {})}
    console = Console()
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
        rows = _collect(console, results, plan, len(todo))
    except KeyboardInterrupt:
        print("interrupted" + "; the same command goes on from here" * bool(args.out), file=sys.stderr)
        return 130
    _print_bench(console, {w.name: w.family for w in workloads.WORKLOADS}, stamp, rows)
    _write(args, {"machine": stamp, "seed": args.seed, "rows": rows})
    return 0


def _collect(console: Console, results: Iterable[Any], plan: Any, total: int) -> list[Any]:
    """The last row of each case; shows how long it still takes."""
    rows = {}
    begin = time.perf_counter()
    with console.progress("bench", plan.left) as progress:
        for done, row in enumerate(results, 1):
            rows[row["id"]] = row
            plan.add(row)
            left = f"about {plan.left / 60:.1f} min left"
            session, case = divmod(done - 1, total)
            progress.update(
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
    console: Console, families: Mapping[str, str], stamp: dict[str, Any], rows: list[Any]
) -> None:
    for family in dict.fromkeys(families[row["case"]["workload"]] for row in rows):
        members = [row for row in rows if families[row["case"]["workload"]] == family]
        others = dict.fromkeys(name for row in members for name in row["contenders"] if name != "fastda")
        columns = [Column("operator"), Column("sizes"), Column("mode"), Column("best peer [95 % interval]")]
        columns += [Column("threads", True, rank=2), Column("fastda ms", True, rank=1)]
        columns += [Column(name, True, rank=3) for name in ("GFLOP/s", "% of peak", "GB/s")]
        columns += [Column(_short(name), True, rank=4) for name in others]
        lines: list[list[Cell | str]] = []
        for row in members:
            case, ours = row["case"], row["contenders"]["fastda"]
            peak = stamp["peaks"].get(str(case["threads"]))
            speed = 1e-9 * row["flops"] / ours["median"]
            lines.append(
                [
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
                ]
            )
            if "added_ratio" in ours:
                cells = (_cell(row, name, "added_ratio") for name in others)
                added = f"{1e3 * ours['added']:.3f}"
                lines.append(["", "", "  added", _best(row, "added_ratio"), "", added, "", "", "", *cells])
        console.table(f"{family}: time of each / time of fastda, above 1 fastda is faster", columns, lines)
    absent = dict.fromkeys(f"without {name}: {why}" for row in rows for name, why in row["absent"].items())
    for line in absent:
        console.print(Cell(line, "dim"))
    warned = [row["warnings"] for row in rows]
    for kind in dict.fromkeys(kind for warnings in warned for kind in warnings):
        noisy = [f"{row['id']}: {row['warnings'][kind]}" for row in rows if kind in row["warnings"]]
        console.print(Cell(f"{len(noisy)} of {len(rows)} cases are noisy, as {noisy[0]}", "yellow"))
    held = " ".join(f"{name}={value}" for name, value in stamp["held"].items())
    peaks = "; ".join(
        f"{t} thread{'s' * (t != '1')}: {p['gflops']:.0f} GFLOP/s, {p['gbs']:.1f} GB/s"
        for t, p in stamp["peaks"].items()
    )
    console.print(f"{stamp['processor']}, {stamp['isa']}, torch {stamp['torch']} {held}".rstrip())
    console.print(f"measured peaks: {peaks}. CL: channels_last. Times are medians; only ratios travel.")


def _short(name: str) -> str:
    return name.replace("channels_last", "CL").replace("torch.compile", "compile")


def _cell(row: dict[str, Any], name: str, what: str) -> Cell:
    r = row["contenders"].get(name, {}).get(what)
    return Cell("") if r is None else Cell(_number(r["ratio"]), "green" if r["ratio"] >= 1 else "red")


def _number(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 100 else ">100"


def _best(row: dict[str, Any], what: str) -> Cell:
    if row["best"] is None:
        return Cell("")
    r = row["contenders"][row["best"]][what]
    ratio, style = _cell(row, row["best"], what)
    return Cell(f"{ratio} [{_number(r['low'])}–{_number(r['high'])}] {_short(row['best'])}", style)


def _setting(info: dict[str, Any]) -> str:
    isa = info["cpu_isa"] or "reference only"
    return f"fastda {info['fastda']}, torch {info['torch']}, {isa}, {info['threads']} threads"
