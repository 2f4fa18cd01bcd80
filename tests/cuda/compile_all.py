"""Compiles every CUDA kernel for GPUs that are not there: registers, spills, shared memory, occupancy.

    python -m tests.cuda.compile_all    # exits with 1 on a spill, too much shared memory, missing mma

ptxas tells registers and spills. How much dynamic shared memory the launches ask for is read off the host
side itself, run on the CPU (tests/cuda_host) for 64 channels of 35×55 pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
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
    "sm_90": Target(227 << 10, 228 << 10, 64),
    "sm_100": Target(227 << 10, 228 << 10, 64),
}
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
from tests.cuda import cuda_host_executed as t
found = {}
for limit in (163, 227):
    t.cuda_host.set_device(100, limit << 10)
    for dtype in (torch.bfloat16, torch.float32):
        t.cuda_host.forget()
        x = torch.zeros(1, 64, 35, 55, dtype=dtype).contiguous(memory_format=t.LAST)
        w = torch.zeros(64, 64, 3, 3, dtype=dtype)
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        t.ops.conv_same_backward(x, x, w, None, True, True, False)
        t.ops.refiner_block(x, w, None, w, None, False)
        for name, grid, threads, shared in t.cuda_host.launches():
            found[f"{limit} {name} {dtype.itemsize}"] = shared
print(json.dumps(found))
"""


def nvcc(*arguments: str) -> str:
    command = ["nvcc", "-std=c++20", "-O3", f"-I{build.ROOT / 'csrc'}", *arguments]
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


def resources(source: Path, target: str, *options: str) -> list[dict]:
    """Registers, spilled bytes and static shared memory of every kernel in a file."""
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder, "out.cubin"))
        log = nvcc("-cubin", "-o", output, f"-arch={target}", "-Xptxas", "-v", *options, str(source))
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
                "target": target,
                "registers": int(registers[1]),
                "spills": spills,
                "shared": int(static[1]) if static else 0,
            }
        )
    return rows


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
    for source in sorted(CUDA.glob("refiner*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "out.ptx")
            nvcc("-ptx", "-o", str(path), "-arch=compute_80", str(source))
            entries = re.split(r"\.entry ", path.read_text())[1:]
        for entry, name in zip(entries, demangled([re.match(r"\w+", e)[0] for e in entries]), strict=True):
            kernel, _, arguments = name.partition(" ")
            dtype, _, exact = arguments.partition(", ")
            meant = kernel in ("conv", "filter_grad", "refiner_block") and exact != "true"
            found = set(re.findall(r"mma\.sync[\w.]+", entry))
            if found != ({MMA[dtype]} if meant else set()):
                wrong.append(f"{name}: {sorted(found) or 'no matrix instruction'}")
            elif meant:
                print(f"{name:30}{entry.count(MMA[dtype]):5} × {MMA[dtype]}")
    return wrong


def dynamic_shared() -> dict[str, int]:
    """Bytes by '<limit of the device, KiB> <launch> <bytes of an element>'."""
    build.build()
    environment = {**os.environ, **build.environment()}
    done = subprocess.run([sys.executable, "-c", LAUNCHES], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    args = parser.parse_args()
    dynamic = dynamic_shared()
    jobs = [(source, target) for target in args.target for source in sorted(CUDA.glob("*.cu"))]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        rows = [row for found in pool.map(lambda job: resources(*job), jobs) for row in found]
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
    wrong = matrix_instructions()
    for line in wrong:
        print("FAILED", line)
    print(f"{len(rows)} kernels compiled, {bad + len(wrong)} failed")
    return 1 if bad or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
