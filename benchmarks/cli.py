"""`python -m benchmarks`: `fastda bench` with every peer that is installed, and reports."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers import PEERS
from fastda import bench, cli

# What holds torch, and the engines that have such a setting, to an instruction set.
ISAS = {
    "avx2": {"FASTDA_CPU_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "base": {"FASTDA_CPU_ISA": "base", "ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    cli.add_bench_arguments(parser, [*bench.PROVIDERS, *PEERS])
    parser.add_argument("--isa", choices=ISAS, help="hold fastda and its peers to an instruction set")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("out/bench"), help="default: out/bench"
    )
    parser.add_argument("--json", metavar="FILE", help="write all results as JSON; - for standard output")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random inputs (default: 0)")
    args = parser.parse_args(argv)
    args.command = "bench"
    if args.isa:
        wanted = ISAS[args.isa]
        if any(os.environ.get(name) != value for name, value in wanted.items()):
            # They are read when the libraries load, which has happened.
            os.environ.update(wanted)
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *(argv or sys.argv[1:])])
        args.out = args.out / args.isa
    try:
        return cli.run_bench(args, PEERS)
    except cli.UsageError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
