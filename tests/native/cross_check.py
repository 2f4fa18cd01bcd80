"""The CPU kernels without torch, compiled for another architecture and run under qemu: `make neon-check`.

Every SIMD header's functions in every lane (simd.cpp), and every kernel against double loops (kernels.cpp),
on each instruction set that csrc/common/isa.h has for the architecture. Exits with 1 where a check fails.
"""

import argparse
import os
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
build = runpy.run_path(str(ROOT / "csrc/common/instruction_sets.py"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machine", default="aarch64", help="as `uname -m` has it (default: %(default)s)")
    machine = parser.parse_args().machine
    here = machine == os.uname().machine
    compiler = "c++" if here else f"{machine}-linux-gnu-g++"
    emulator = [] if here else [f"qemu-{machine}"]
    for program in (compiler, *emulator):
        if shutil.which(program) is None:
            print(f"{program} was not found (Debian: g++-{machine}-linux-gnu, qemu-user)")
            return 1
    folder = ROOT / "build" / f"native-{machine}"
    folder.mkdir(parents=True, exist_ok=True)
    headers = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "tests/native").glob("*.h")]
    newest = max(path.stat().st_mtime for path in headers)

    def compiled(source: Path, isa: str, flags: list[str]) -> Path:
        target = folder / f"{source.name}.{isa}.o"
        stamp = max(newest, source.stat().st_mtime)
        if not target.exists() or target.stat().st_mtime < stamp:
            command = [compiler, *build["FLAGS"], f"-I{ROOT / 'csrc'}", *flags, "-x", "c++", "-c", source]
            subprocess.run([*command, "-o", target], check=True)
        return target

    def linked(name: str, objects: list[Path]) -> Path:
        subprocess.run([compiler, "-static", *objects, "-o", folder / name], check=True)
        return folder / name

    def run(program: Path, isa: str) -> int:
        return subprocess.run([*emulator, program], env={**os.environ, "FASTDA_CPU_ISA": isa}).returncode

    rows = build["instruction_sets"](machine)
    kernels = sorted((ROOT / "csrc/cpu").glob("*/*.inl"))
    sources = [(ROOT / "tests/native/kernels.cpp", "host", []), (ROOT / "csrc/common/isa.cpp", "host", [])]
    sources += [(source, isa, flags) for isa, flags in rows.items() for source in kernels]
    sources += [(ROOT / "tests/native/simd.cpp", isa, flags) for isa, flags in rows.items()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda row: compiled(*row), sources))
        together, of_simd = linked("kernels", objects[: -len(rows)]), objects[-len(rows) :]
        runs = [(linked(f"simd-{isa}", [path]), isa) for isa, path in zip(rows, of_simd, strict=True)]
        runs += [(together, isa) for isa in rows]
        return max(pool.map(lambda row: run(*row), runs))


if __name__ == "__main__":
    sys.exit(main())
