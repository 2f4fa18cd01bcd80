"""Compiles every Triton kernel ahead of time for GPUs that need not be there, and reports what each takes.

    python -m tests.triton.compile_all [--target sm_90 …] [--kernel conv …] [--all]

What is compiled is what the operators would launch: they run on fake CUDA tensors and their launches
are recorded with the block sizes, warps and specialisations that a device would see. --all adds float16,
float64, 7×7 filters and the remaining kinds of loss.
Exit status 1 where a kernel spills registers, takes more shared memory than there is, or fails to compile.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fastda.triton
from fastda.registry import KINDS

KIB = 1024
# Compute capability or gfx name: target, shared memory that one program may take.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx90a": (GPUTarget("hip", "gfx90a", 64), 64 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
FILES = [m for m in vars(fastda.triton).values() if getattr(m, "__package__", "") == "fastda.triton"]
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Job:
    """One kernel as one launch specialises it."""

    module: str
    kernel: str
    label: str
    target: str
    signature: dict = field(hash=False)
    constants: dict = field(hash=False)
    attributes: dict = field(hash=False)
    options: dict = field(hash=False)


def describe(kernel, args, options: dict) -> tuple[dict, dict, dict, dict]:
    """Signature, constants and attributes as Triton's launcher specialises the arguments; its options."""
    names = [p.name for p in kernel.params]
    values = dict(zip(names, args, strict=False))
    values |= {n: v for n, v in options.items() if n in names}
    signature, constants, attributes = {}, {}, {}
    for param in kernel.params:
        value, name = values[param.name], param.name
        if param.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            attributes[(param.num,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            if value == 1 and not param.do_not_specialize:
                signature[name], constants[name] = "constexpr", 1
            else:
                signature[name] = "i32" if value < 2**31 else "i64"
                if value % 16 == 0 and not param.do_not_specialize:
                    attributes[(param.num,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return signature, constants, attributes, {n: v for n, v in options.items() if n not in names}


def jobs(everything: bool) -> list[Job]:
    """Every distinct launch of a set of calls that reaches all kernels and all of their branches."""
    found: dict[tuple, Job] = {}
    state = {"label": "", "platform": "cuda"}

    def record(kernel, grid, *args, **options):
        if isinstance(args[0], torch.Tensor) and args[0].numel() == 0:
            return
        signature, constants, attributes, rest = describe(kernel, args, options)
        module = next(m for m in FILES if hasattr(m, kernel.__name__))
        for name, (target, _) in TARGETS.items():
            if target.backend == state["platform"]:
                job = Job(
                    module.__name__,
                    kernel.__name__,
                    state["label"],
                    name,
                    signature,
                    constants,
                    attributes,
                    rest,
                )
                # The two sides of a loss differ in numbers alone.
                alike = {
                    n: v
                    for n, v in constants.items()
                    if n not in ("SIGN", "TARGET", "HIT", "MISS", "THRESHOLD")
                }
                key = (job.kernel, name, *map(str, (signature, alike, attributes, rest)))
                found.setdefault(key, job)

    replaced = {"launch": record, "platform": lambda x: state["platform"]}
    for module in FILES:
        vars(module).update({name: new for name, new in replaced.items() if name in vars(module)})

    def calls(dtype: torch.dtype) -> None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        t = fastda.triton
        short = TYPES[dtype]
        state["label"] = short
        t.grad_reverse_backward(empty(128, 768), empty(dtype=torch.float32))
        t.grad_reverse_backward(empty(128, 768), empty(128, dtype=torch.float32))
        weight = empty(8, 1, 9, 14, dtype=wide)
        for kind in KINDS:
            logits = empty(8, 2 if kind == "softmax" else 1, 9, 14)
            state["label"] = f"{short} {kind}"
            if everything or kind == "softmax" or dtype == torch.float32:
                t.patch_discriminator_loss(logits, logits, None, weight, kind, "mean", 0.0, True, False)
            for smoothing in (0.0, 0.1) if kind in ("softmax", "bce") else (0.0,):
                if everything or (kind, smoothing) in (("softmax", 0.0), ("bce", 0.1)):
                    features, filters = empty(8, 32, 9, 14), empty(logits.shape[1], 32, 1, 1)
                    bias = empty(logits.shape[1])
                    t.patch_head_discriminator_loss(
                        features, features, filters, bias, kind, "mean", smoothing, True, True, True
                    )
        state["label"] = short
        t.patch_loss_map(logits, weight, "bce", True, 0.1, True)
        t.self_regularization(weight, weight, None, 0.5, "mean", True, True)
        t.self_regularization(weight, weight, weight.new_empty(()), 0.5, "mean", True, False)
        t.patch_loss_scale_(weight, weight, weight.new_empty(()))
        for name, n, c, size, h, w in (
            ("3x3", 8, 64, 3, 35, 55),
            ("7x7", 2, 64, 7, 56, 56),
            ("odd", 2, 3, 5, 9, 11),
        ):
            for last in (False, True):
                if not everything and (name == "7x7" or (name == "odd" and last)):
                    continue
                state["label"] = f"{short} {name} {'NHWC' if last else 'NCHW'}"
                fmt = torch.channels_last if last else torch.contiguous_format
                x = empty(n, c, h, w).contiguous(memory_format=fmt)
                filters, bias = empty(c, c, size, size), empty(c)
                if not everything and name == "odd":
                    y = t.conv_same(x, filters, bias, x, True)
                    t.conv_same_backward(x, x, filters, y, True, True, True)
                    y = t.conv_same(x, filters, bias, x, True, False, 0.01)
                    t.conv_same_backward(x, x, filters, y, True, True, True, False, 0.01)
                    continue
                y, places = t.relu_max_pool(x, (3, 3), (2, 2), (1, 1), False, True, True)
                t.relu_max_pool_backward(y, places, (h, w), last, (3, 3), (2, 2), (1, 1))
                t.relu_max_pool(x, (2, 2), (2, 2), (0, 0), False, False, False)
                y, *statistics = t.norm_act(x, bias, bias, None, None, x, False, 1e-5, 0.01)
                t.norm_act_backward(*(x, x, bias, bias, *statistics, y, False, True, 1e-5, 0.01, *[True] * 4))
                y, *statistics = t.norm_act(x, None, None, None, None, None, True, 1e-5, 0.0)
                t.norm_act_backward(
                    *(x, x, None, None, *statistics, None, True, True, 1e-5, 0.0, True, *[False] * 3)
                )
                _, *statistics = t.norm_act(x, bias, bias, bias, bias, None, False, 1e-5, None)
                t.norm_act_backward(
                    *(x, x, bias, bias, *statistics, None, False, False, 1e-5, None, True, *[False] * 3)
                )
                y, inner = t.refiner_block(x, filters, bias, filters, bias, True)
                t.refiner_block_backward(x, x, inner, y, filters, bias, filters, *[True] * 5)

    with FakeTensorMode():
        for state["platform"] in ("cuda", "hip"):
            for dtype in (
                (torch.float32, torch.bfloat16, torch.float16, torch.float64)
                if everything
                else (torch.float32, torch.bfloat16)
            ):
                calls(dtype)
    return list(found.values())


def compile_one(job: Job) -> dict:
    """Registers, shared memory (bytes) and spills of one kernel; `error` where it does not compile."""
    target, limit = TARGETS[job.target]
    kernel = getattr(sys.modules[job.module], job.kernel)
    row = {"kernel": job.kernel, "label": job.label, "target": job.target, "limit": limit}
    source = ASTSource(kernel, job.signature, job.constants, job.attributes)
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, target=target, options=job.options)
    except Exception as failure:
        return row | {"error": f"{type(failure).__name__}: {failure}".splitlines()[0]}
    row |= {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
    if target.backend == "cuda":
        return row | resources_cuda(compiled.asm["ptx"], target.arch)
    return row | resources_hip(compiled.asm["amdgcn"])


def faults(row: dict) -> list[str]:
    """What is wrong with a result of `compile_one`."""
    if "error" in row:
        return [row["error"]]
    found = [f"{row['shared']} of {row['limit']} bytes of shared memory"] * (row["shared"] > row["limit"])
    return found + ["spills"] * (row["spills"] > 0)


def resources_cuda(ptx: str, arch: int) -> dict:
    """What ptxas says of this code; triton's own run of it keeps no log."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [
            get_ptxas(arch).path,
            "-v",
            "--regAllocOptLevel=2",
            f"--gpu-name={sm_arch_from_capability(arch)}",
        ]
        log = subprocess.run(
            [*command, str(path), "-o", str(Path(folder, "out"))], capture_output=True, text=True, check=True
        ).stderr
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if not registers or not spills:
        return {"error": "no resource usage in what ptxas printed"}
    return {"registers": int(registers[1]), "spills": sum(map(int, spills))}


def resources_hip(assembly: str) -> dict:
    """What the code object's metadata says."""
    found = dict(re.findall(r"\.((?:vgpr|agpr|sgpr)_(?:count|spill_count)):\s*(\d+)", assembly))
    if "vgpr_spill_count" not in found:
        return {"error": "no resource usage in the assembly"}
    return {
        "registers": int(found["vgpr_count"]),
        "spills": int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernel", nargs="+", default=[""], help="parts of kernel names")
    parser.add_argument("--label", nargs="+", default=[""], help="parts of labels")
    parser.add_argument("--all", action="store_true", help="float16, float64, 7x7 and all losses too")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    todo = [
        j
        for j in jobs(args.all)
        if j.target in args.target
        and any(k in j.kernel for k in args.kernel)
        and any(k in j.label for k in args.label)
    ]
    bad = 0
    print(f"{'kernel':22}{'case':24}{'target':9}{'warps':>6}{'registers':>11}{'shared':>9}{'spills':>8}")
    with ProcessPoolExecutor(args.jobs) as pool:
        for row in pool.map(compile_one, todo):
            line = f"{row['kernel'].removesuffix('_kernel'):22}{row['label']:24}{row['target']:9}"
            if "error" not in row:
                line += f"{row['warps']:6}{row['registers']:11}{row['shared']:9}{row['spills']:8}"
            wrong = faults(row)
            bad += bool(wrong)
            print(line + ("  FAILED " + ", ".join(wrong) if wrong else ""), flush=True)
    print(f"{len(todo)} kernels compiled, {bad} failed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
