"""Stages that time."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

import fastda
from fastda import backend
from fastda.tools import bench, workloads
from tests.gpu.device import LAST, Device, Report


def peaks(device: Device) -> tuple[float, dict[str, float]]:
    """GB/s of a copy, and Tflop/s of a matrix product of each dtype (cuBLAS: wgmma where there is one)."""
    n = 1 << (20 if device.dry else 28)
    a, b = torch.empty(n, device=device.name), torch.empty(n, device=device.name)
    replay, _ = device.captured(lambda: b.copy_(a), 10)
    bandwidth = 2 * a.nbytes * 10 / min(device.seconds(replay) for _ in range(5)) / 1e9
    side, products = 256 if device.dry else 8192, {}
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, y = (torch.randn(side, side, device=device.name).to(dtype) for _ in range(2))
        replay, _ = device.captured(functools.partial(torch.mm, x, y), 3)
        took = min(device.seconds(replay) for _ in range(5))
        products[str(dtype).removeprefix("torch.")] = 2 * side**3 * 3 / took / 1e12
    return bandwidth, products


@contextlib.contextmanager
def two_launches() -> Iterator[None]:
    os.environ["FASTDA_CUDA_BLOCK_LAUNCHES"] = "2"
    try:
        yield
    finally:
        del os.environ["FASTDA_CUDA_BLOCK_LAUNCHES"]


def contenders(task: bench.Task, device: Device, compiled: bool) -> Iterator[tuple[str, Callable, Any]]:
    """Name, call, and what it must be captured under."""
    images = task.has_formats or task.workload.family in ("norm", "pool")
    layouts = ("contiguous", "channels_last") if images else ("contiguous",)
    function = getattr(fastda, task.workload.op)
    for name in device.backends():
        for layout in layouts:
            yield f"{name} {layout}", task.call(function, layout), backend.use_backend(name)
    if task.workload.op == "refiner_block":
        call = task.call(function, "channels_last")
        yield "two launches channels_last", call, two_launches()
    for layout in layouts:
        yield f"eager {layout}", task.call(task.workload.formulas["eager"], layout), contextlib.nullcontext()
    if compiled:
        for name, call in bench.PROVIDERS["compile"](task):
            yield name, call, contextlib.nullcontext()


def timings(name: str, compiled: bool, device: Device, report: Report) -> None:
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    bandwidth, products = peaks(device)
    for case in timed_cases(name, device):
        task = bench.Task(case, device.name)
        cost, replays, times = task.cost(), {}, 2 if device.dry else 20
        for who, call, under in contenders(task, device, compiled and not device.dry):
            with report.attempt(f"{case.id}: {who} captured"), under:
                replays[who] = device.captured(call, times)[0]
        samples: dict[str, list[float]] = {who: [] for who in replays}
        for _ in range(2 if device.dry else 7):
            for who, replay in replays.items():
                samples[who].append(device.seconds(replay) / times)
        for who, took in samples.items():
            seconds = median(took[1:])
            report.add(
                case=case.id,
                contender=who,
                microseconds=seconds * 1e6,
                spread=max(took[1:]) / min(took[1:]),
                bandwidth=cost["bytes"] / seconds / 1e9 / bandwidth,
                products=cost["flops"] / seconds / 1e12 / products.get(case.dtype, products["float32"]),
            )
            print(f"{case.id:60} {who:28} {seconds * 1e6:10.1f} us", flush=True)
        replays.clear()


def timed_cases(name: str, device: Device) -> list[workloads.Case]:
    if name == "losses":
        names = ["patch_discriminator_loss softmax", "self_regularization", "grad_reverse"]
        known = [w.name for w in workloads.WORKLOADS]
        names = [known_name for known_name in known if known_name.startswith(tuple(names))]
        found = workloads.cases(names, dtypes=("float32", "bfloat16"), threads=(1,), quick=device.dry)
        return [case for case in found if "linear" not in case.workload and case.mode != "step"]
    if name == "norm":
        return workloads.cases(
            ["norm", "pool"],
            shapes=[(2, 64, 9, 14)] if device.dry else (),
            dtypes=("float32", "bfloat16"),
            threads=(1,),
            modes=("backward",),
        )
    sizes = [(1, 64, 3, 9, 14)] if device.dry else [(32, 64, 3, 35, 55), (1, 64, 3, 35, 55)]
    sizes += [] if device.dry else [(8, 64, 3, 224, 224)]
    return workloads.cases(
        ["refiner_block"],
        shapes=sizes,
        dtypes=("bfloat16", "float16", "float32") if name == "block" else ("bfloat16",),
        threads=(1,),
        modes=("forward", "backward") if name == "block" else ("forward",),
    )


def convolutions(device: Device, report: Report) -> None:
    """One convolution alone, which no workload is: ours, Triton's, and cuDNN's in both layouts."""
    import torch.nn.functional as F

    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    _, products = peaks(device)
    for n, h, w in ((1, 9, 14),) if device.dry else ((32, 35, 55), (1, 35, 55), (8, 224, 224)):
        for dtype in (torch.bfloat16, torch.float32):
            replays, times = {}, 2 if device.dry else 20
            weight = (torch.randn(64, 64, 3, 3) / 24).to(device.name, dtype)
            for layout in (torch.contiguous_format, LAST):
                x = torch.randn(n, 64, h, w).to(device.name, dtype).contiguous(memory_format=layout)
                label = "channels_last" if layout == LAST else "contiguous"
                filters = weight.contiguous(memory_format=layout)
                ways = {b: functools.partial(fastda.conv_same, x, weight) for b in device.backends()}
                ways |= {"cuDNN": functools.partial(F.conv2d, x, filters, padding=1)}
                for who, call in ways.items():
                    under = contextlib.nullcontext() if who == "cuDNN" else backend.use_backend(who)
                    with report.attempt(f"{n}x{h}x{w} {dtype}: {who} {label}"), under, torch.no_grad():
                        replays[f"{who} {label}"] = device.captured(call, times)[0]
            samples: dict[str, list[float]] = {who: [] for who in replays}
            for _ in range(2 if device.dry else 7):
                for who, replay in replays.items():
                    samples[who].append(device.seconds(replay) / times)
            for who, took in samples.items():
                seconds, flops = median(took[1:]), 2 * 9 * 64 * 64 * n * h * w
                peak = products[str(dtype).removeprefix("torch.")]
                report.add(
                    case=f"conv_same {n}x64x{h}x{w} {dtype}",
                    contender=who,
                    microseconds=seconds * 1e6,
                    products=flops / seconds / 1e12 / peak,
                )
