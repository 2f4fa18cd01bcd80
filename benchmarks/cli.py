"""Benchmarks of fastda against every peer that is installed, against other revisions, and over sizes.

Measures, prints a table per family, and writes OUT/bench.json and OUT/report.html. An interrupted run goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import agreement, base, growth, published, report
from benchmarks.memory import peak_memory
from benchmarks.peers import PEERS
from benchmarks.rows import load
from fastda import files
from fastda.tools import bench, cli
from fastda.tools.workloads import WORKLOADS, Case

# What holds torch, and the engines that have such a setting, to an instruction set.
ISAS = {
    "avx2": {"FASTDA_CPU_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "base": {"FASTDA_CPU_ISA": "base", "ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cli.add_bench_arguments(p, [*bench.PROVIDERS, *PEERS])
    p.add_argument("--isa", choices=ISAS, help="hold fastda and its peers to an instruction set; in OUT/ISA")
    p.add_argument("--base", metavar="REV", help="compare with another revision instead; into OUT/base-REV")
    p.add_argument("--growth", action="store_true", help="how times grow with sizes instead; OUT/growth.json")
    p.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A.json", "B.json"),
        help="measure nothing: how far two runs agree, by their bench.json",
    )
    p.add_argument("--render", action="store_true", help="measure nothing: the page, README and docs")
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("out/bench"), help="default: out/bench")
    p.add_argument("--json", metavar="FILE", help="write this run as JSON; - for standard output")
    p.add_argument("--seed", type=int, default=0, help="seed of the random inputs (default: 0)")
    return p


def hold(isa: str, out: Path, module: str, argv: Sequence[str] | None) -> None:
    """Start this command again, unless its process is held to the instruction set already."""
    wanted = ISAS[isa]
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        # They are read when the libraries load, which has happened. What torch.compile keeps on disk for
        # the whole instruction set fails in a process that is held to a lower one.
        os.environ.update(wanted, TORCHINDUCTOR_CACHE_DIR=str((out / isa / "inductor").resolve()))
        os.execv(sys.executable, [sys.executable, "-m", module, *(argv or sys.argv[1:])])


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.command = "bench"
    out = args.out
    if args.isa:
        hold(args.isa, out, "benchmarks", argv)
        args.out = out / args.isa
    try:
        if args.compare:
            return _compare(*args.compare)
        if args.render:
            return _render(out, readme=True)
        if args.growth:
            return _growth(args, out)
        if args.base:
            return _base(args, out)
        # What torch.compile made is kept for the further sessions, and for the next run.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((out / "inductor").resolve()))
        providers = [name for name in ("eager", "compile") if not args.peers or name in args.peers]
        also = functools.partial(_memory, providers=["fastda", *providers], quick=args.quick)
        status = cli.run_bench(args, PEERS, functools.partial(bench.run, also=also))
        return status or _render(out)
    except (cli.UsageError, base.BaseError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def _memory(case: Case, row: dict[str, Any], providers: list[str], quick: bool) -> dict[str, Any]:
    """For convolutions in training, at the batch of a training; of small tensors the resident set tells of
    the allocator."""
    family = next(w.family for w in WORKLOADS if w.name == case.workload)
    if quick or family != "refiner" or (case.mode, case.threads) != ("backward", 1) or case.sizes[0] < 32:
        return {}
    return {"memory": peak_memory(case, providers)}


def _base(args: argparse.Namespace, out: Path) -> int:
    name, tree = base.checkout(args.base, out / "trees")
    args.out = args.out / f"base-{name}"
    session = functools.partial(base.session, name, tree)
    return cli.run_bench(args, {}, functools.partial(bench.run, session=session))


def _growth(args: argparse.Namespace, out: Path) -> int:
    rows = []
    for row in growth.run(args.names, args.seed):
        e = row["exponents"]
        finding = "  <- grows faster than it should" if row["finding"] else ""
        print(
            f"{row['workload']:<40} time ~ {row['axis']}^{e['fastda']:.2f} (eager {e['eager']:.2f}){finding}",
            flush=True,
        )
        rows.append(row)
    if not rows:
        raise cli.UsageError(
            f"NAME must be one of {', '.join(dict.fromkeys(s.workload for s in growth.SWEEPS))}"
        )
    files.write(out / "growth.json", json.dumps(rows, indent=1) + "\n")
    return _render(out) if (out / "bench.json").exists() else 0


def _compare(first: Path, second: Path) -> int:
    try:
        a, b = (json.loads(path.read_text())["rows"] for path in (first, second))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise cli.UsageError(f"--compare: no results in {first}, {second}: {error!r}") from None
    print(agreement.text(agreement.pairs(a, b)))
    return 0


def _render(out: Path, readme: bool = False) -> int:
    if not load(out):
        raise cli.UsageError(f"there are no results in {out}; run python -m benchmarks --out {out} first")
    try:
        print(report.page(out))
    except ImportError as error:
        print(f"benchmarks: no page: {error} (pip install matplotlib jinja2)", file=sys.stderr)
    if readme:
        try:
            published.publish(out)
        except ValueError as error:
            raise cli.UsageError(str(error)) from None
    return 0
