"""Compiles every CUDA kernel for GPUs that are not there: registers, spills, shared memory, occupancy, the
innermost loop of products, and passes over the banks of shared memory.

    python -m tests.cuda.compile_all                     # exits with 1 on a spill, too much shared memory, …
    python -m tests.cuda.compile_all --against ../old    # with another checkout's figures: before → now

ptxas tells registers and spills; loops are read off the machine code of one target, by nvdisasm, which
Triton brings. Shared memory and its passes are those of 64 channels of 35×55 pixels, run on the CPU
(tests/cuda_host): the launches' host side, and nvcc's PTX.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.cuda_host import build

CUDA = build.ROOT / "csrc" / "cuda"


class Target(NamedTuple):
    block_shared: int  # bytes that one block may have
    shared: int  # of a multiprocessor
    warps: int
    blocks: int = 32
    registers: int = 65536


TARGETS = {
    "sm_80": Target(163 << 10, 164 << 10, 64),
    "sm_86": Target(99 << 10, 100 << 10, 48, 16),
    "sm_89": Target(99 << 10, 100 << 10, 48, 24),
    "sm_90": Target(227 << 10, 228 << 10, 64),
    "sm_100": Target(227 << 10, 228 << 10, 64),
    "sm_120": Target(99 << 10, 100 << 10, 48, 24),
}
LOOPS = "sm_90"  # the target whose loops are shown
THREADS = {"conv": 128, "filter_grad": 128, "refiner_block": 256, "head": 128, "add_pieces": 128}
THREADS |= {"direct_filter_grad": 128}
# The products that each kernel must consist of, by its first template argument; the rest must have none.
MMA = {
    "bf16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "f16": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "float": "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
}
LAUNCHES = """
import json, sys
import torch, fastda
sys.argv = [""]
from tests.cuda import emulated as t
found = {}
for limit in (99, 163, 227):
    t.cuda_host.set_device(100, limit << 10)
    for dtype in (torch.bfloat16, torch.float32):
        t.cuda_host.forget()
        x = torch.zeros(1, 64, 35, 55, dtype=dtype).contiguous(memory_format=torch.channels_last)
        w = torch.zeros(64, 64, 3, 3, dtype=dtype)
        t.ops.conv_same_backward(x, x, w, None, True, True, False)
        t.ops.refiner_block(x, w, None, w, None, False)
        for name, grid, threads, shared in t.cuda_host.launches():
            found[f"{limit} {name} {dtype.itemsize}"] = shared
print(json.dumps(found))
"""


PASSES = """
import json
import torch, fastda
from tests.cuda import emulated as t
t.cuda_host.set_device(16, 227 << 10)
for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True)):
    x = torch.randn(1, 64, 35, 55).to(dtype).contiguous(memory_format=torch.channels_last)
    w = torch.randn(64, 64, 3, 3).to(dtype)
    t.ops.conv_same(x, w, None, None, True, tf32)
    t.ops.conv_same_backward(x, x, w, x, False, True, True, tf32)
    t.ops.refiner_block(x, w, None, w, None, False, tf32)
found = {
    kernel: [(text, passes, least) for _, text, _, passes, least in lines if least]
    for kernel, lines in t.cuda_host.ptx_executed().items()
}
print(json.dumps(found))
"""


def nvcc(*arguments: str) -> str:
    command = ["nvcc", "-std=c++20", "-O3", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return done.stdout + done.stderr


def demangled(symbols: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    names = []
    for line in done.stdout.splitlines():
        name = re.sub(r"fastda::|cuda::|void |\(.*", "", line)
        names.append(name.replace("<", " ").replace(">", "").replace("_kernel", ""))
    return names


def resources(source: Path, *targets: str) -> list[dict]:
    """Registers, spilled bytes and static shared memory of every kernel in a file, by kernel and target."""
    codes = ",".join(targets)
    lowest = min(int(t.removeprefix("sm_")) for t in targets)
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder, "out.fatbin"))
        options = [f"-gencode=arch=compute_{lowest},code=[{codes}]", f"-I{source.parents[1]}"]
        log = nvcc("-fatbin", "-o", output, *options, "-Xptxas", "-v", str(source))
    entries = re.split(r"Compiling entry function '", log)[1:]
    rows = []
    for entry, name in zip(entries, demangled([e.split("'")[0] for e in entries]), strict=True):
        spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", entry)))
        registers = re.search(r"Used (\d+) registers", entry)
        if registers is None:
            raise RuntimeError(f"no resource usage for {name}: {entry}")
        static = re.search(r"(\d+) bytes smem", entry)
        rows.append(
            {
                "kernel": name,
                "target": re.search(r"for '(\w+)'", entry)[1],
                "registers": int(registers[1]),
                "spills": spills,
                "shared": int(static[1]) if static else 0,
            }
        )
    return rows


def nvdisasm() -> str | None:
    bundled = importlib.util.find_spec("triton")
    folder = Path(bundled.origin).parent / "backends" / "nvidia" / "bin" if bundled else Path()
    return shutil.which("nvdisasm", path=os.pathsep.join([str(folder), os.environ.get("PATH", "")]))


def loops(source: Path) -> dict[str, Counter]:
    """By kernel: the instructions of its innermost loop of products."""
    tool, found = nvdisasm(), {}
    if tool is None:
        return found
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder, "out.cubin"))
        nvcc("-cubin", "-o", output, f"-arch={LOOPS}", f"-I{source.parents[1]}", str(source))
        text = subprocess.run([tool, "-c", output], capture_output=True, text=True, check=True).stdout
    sections = re.split(r"\n\s*\.section\s+\.text\.", text)[1:]
    for section, name in zip(
        sections, demangled([re.match(r"[\w$]+", section)[0] for section in sections]), strict=True
    ):
        labels, code, best = {}, [], None
        for line in section.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = len(code)
            elif one := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)(.*)", line):
                code.append((one[1], one[2]))
        for end, (operation, operands) in enumerate(code):
            target = re.search(r"\.L_x_\d+", operands)
            if operation != "BRA" or target is None or labels.get(target[0], end + 1) > end:
                continue
            body = Counter(operation for operation, _ in code[labels[target[0]] : end + 1])
            products = body["HMMA"] + body["FFMA"]
            if products >= 16 and (best is None or body.total() < best.total()):
                best = body
        if best is not None:
            found[name] = best
    return found


def ptx_of(csrc: Path, folder: Path) -> Path:
    """The PTX of all kernels of a tree of sources, in one file."""
    parts = []
    for source in sorted((csrc / "cuda").glob("*.cu")):
        output = folder / f"{source.stem}.ptx"
        nvcc("-ptx", "-o", str(output), "-arch=compute_90", f"-I{csrc}", str(source))
        parts.append(output.read_text())
    (folder / "kernels.ptx").write_text("\n".join(parts))
    return folder / "kernels.ptx"


def passes(csrc: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """By kernel and kind of access: passes over the banks, and the least that so many bytes take."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = build.PTX if csrc == CUDA.parent else ptx_of(csrc, Path(folder))  # of here, it is there
        executed = on_the_cpu(PASSES, FASTDA_TEST_PTX=str(ptx))
    found = {}
    for name, symbol in zip(demangled(list(executed)), executed, strict=True):
        kinds = found.setdefault(name, {})
        for text, its_passes, least in executed[symbol]:
            kind = re.sub(r"^@\S+ ", "", text).split()[0].split(".")[0]
            before = kinds.get(kind, (0, 0))
            kinds[kind] = (before[0] + its_passes, before[1] + least)
    return found


def occupancy(row: dict) -> float:
    """The share of a multiprocessor's warps that these resources let run at once."""
    target, warps = TARGETS[row["target"]], row["threads"] // 32
    per_warp = -(-row["registers"] * 32 // 256) * 256
    blocks = min(target.blocks, target.warps // warps, target.registers // per_warp // warps)
    if row["shared"]:
        blocks = min(blocks, target.shared // (row["shared"] + 1024))  # a block takes 1 KiB more
    return blocks * warps / target.warps


def faults(row: dict) -> list[str]:
    """What is wrong with a kernel."""
    found = ["spills"] * (row["spills"] > 0)
    if row["shared"] > TARGETS[row["target"]].block_shared:
        found.append("more shared memory than a block may have")
    return found + ["does not fit a multiprocessor"] * (occupancy(row) == 0)


def matrix_instructions() -> list[str]:
    """Kernels whose PTX lacks the matrix instructions that were meant, or has others."""
    wrong = []
    entries = re.split(r"\.entry ", build.PTX.read_text())[1:]
    for entry, name in zip(entries, demangled([re.match(r"\w+", e)[0] for e in entries]), strict=True):
        kernel, _, arguments = name.partition(" ")
        dtype, exact = [*arguments.split(", "), ""][:2]
        meant = kernel in ("conv", "filter_grad", "refiner_block") and exact != "true"
        found = set(re.findall(r"mma\.sync[\w.]+", entry))
        if found != ({MMA[dtype]} if meant else set()):
            wrong.append(f"{name}: {sorted(found) or 'no matrix instruction'}")
        elif meant:
            print(f"{name:30}{entry.count(MMA[dtype]):5} × {MMA[dtype]}")
    return wrong


def on_the_cpu(script: str, **settings: str) -> dict:
    """What a script prints, as JSON, in a process that has the emulated device."""
    build.build()
    environment = {**os.environ, **build.environment(), **settings}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def show_loops(csrc: Path, against: Path | None) -> None:
    """Of every kernel with a loop of products: registers, that loop, passes; before → now."""
    trees = [csrc] if against is None else [against / "csrc", csrc]
    columns: dict[str, list[dict[str, str]]] = {}
    for tree in trees:
        banks = passes(tree)
        for source in sorted((tree / "cuda").glob("refiner*.cu")):
            registers = {row["kernel"]: row["registers"] for row in resources(source, LOOPS)}
            for name, loop in loops(source).items():
                if "direct" in name:
                    continue
                kinds = {k: f"{p}/{least}" for k, (p, least) in sorted(banks.get(name, {}).items())}
                row = {
                    "registers": str(registers[name]),
                    "products": str(loop["HMMA"] + loop["FFMA"]),
                    "ldmatrix": str(loop["LDSM"]),
                    "loop": str(loop.total()),
                }
                columns.setdefault(name, []).append(row | {f"{k} passes/least": v for k, v in kinds.items()})
    for name, rows in columns.items():
        shown = {key: " → ".join(row.get(key, "-") for row in rows) for key in rows[-1]}
        print(f"{name:24}" + ", ".join(f"{key} {value}" for key, value in shown.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="to show its figures as well")
    args = parser.parse_args()
    dynamic = on_the_cpu(LAUNCHES)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        compiled = pool.map(lambda source: resources(source, *args.target), sorted(CUDA.glob("*.cu")))
        rows = [row for found in compiled for row in found]
    bad = 0
    print(f"{'kernel':30}{'target':8}{'registers':>10}{'spills':>8}{'shared':>9}{'occupancy':>11}")
    for row in rows:
        kernel, _, dtype = row["kernel"].partition(" ")
        size = 4 if dtype.startswith("float") else 2
        limit = TARGETS[row["target"]].block_shared >> 10
        row["shared"] += dynamic.get(f"{limit} {kernel} {size}", 0)
        row["threads"] = THREADS.get(kernel, 256)
        wrong = faults(row)
        if kernel == "refiner_block" and f"{limit} {kernel} {size}" not in dynamic:
            wrong = ["spills"] * (row["spills"] > 0)  # two launches there: both filters do not fit
        bad += bool(wrong)
        line = f"{row['kernel']:30}{row['target']:8}{row['registers']:10}{row['spills']:8}{row['shared']:9}"
        print(f"{line}{occupancy(row):11.0%}" + ("  FAILED " + ", ".join(wrong) if wrong else ""))
    show_loops(CUDA.parent, args.against)
    wrong = matrix_instructions()
    for line in wrong:
        print("FAILED", line)
    print(f"{len(rows)} kernels compiled, {bad + len(wrong)} failed")
    return 1 if bad or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
