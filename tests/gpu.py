"""On a machine with a GPU: `fastda verify` on the device, the test suite, timings; one results file.

    python tests/gpu.py --out out/gpu

Timings use CUDA events and take contenders in turn: fastda, eager PyTorch contiguous and channels_last with
cudnn.benchmark, and torch.compile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

import fastda
from fastda import backend, bench, verify, workloads


def device_checks() -> list[str]:
    """Other streams, CUDA graphs, other devices: what went wrong."""
    wrong = []
    x, w = torch.randn(2, 64, 35, 55, device="cuda"), torch.randn(64, 64, 3, 3, device="cuda") / 24
    expected = fastda.conv_same(x, w)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = fastda.conv_same(x, w)
    stream.synchronize()
    wrong += ["another stream"] * (not torch.equal(y, expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fastda.conv_same(x, w)
    x.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    wrong += ["CUDA graph"] * (not torch.equal(y, fastda.conv_same(x, w)))
    for i in range(1, torch.cuda.device_count()):
        same = torch.equal(fastda.conv_same(x.to(i), w.to(i)).cpu(), fastda.conv_same(x, w).cpu())
        wrong += [f"device {i}"] * (not same)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py: torch finds no GPU", file=sys.stderr)
        return 2
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # what the tolerances of float32 are for
    cases = verify.cases(backends=[backend.info()["devices"]["cuda"]["serving"]], devices=["cuda"])
    rows = [row for case in cases for row in verify.check(case)]
    failed = [row.as_dict() for row in rows if not row.passed]
    print(f"verify on {torch.cuda.get_device_name()}: {len(rows) - len(failed)} of {len(rows)} checks passed")
    wrong = device_checks()
    print("streams, graphs, devices:", ", ".join(wrong) or "ok")
    tests = subprocess.run([sys.executable, "-m", "pytest"], cwd=Path(__file__).parents[1])
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    timings = []
    for case in workloads.cases(dtypes=("float32", "bfloat16"), threads=(1,)):
        if case.mode == "step":  # written for the CPU
            continue
        timings.append(bench.measure(case, bench.PROVIDERS, rounds=args.rounds, device="cuda"))
        row = timings[-1]["contenders"]
        print(case.id, {name: f"{t['ratio']['ratio']:.2f}" for name, t in row.items()}, flush=True)
    report = {
        "device": torch.cuda.get_device_name(),
        "info": backend.info(),
        "verify": {"checks": len(rows), "failed": failed},
        "wrong": wrong,
        "test_suite": tests.returncode,
        "timings": timings,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    partial = args.out / "gpu.json.part"
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(args.out / "gpu.json")
    return 1 if failed or wrong or tests.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
