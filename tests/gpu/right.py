"""Stages that ask whether results are right."""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections.abc import Callable
from typing import Any

import torch

import fastda
from fastda import backend
from fastda.tools import verify
from tests.gpu.device import LAST, TF32, Device, Report, shell
from tests.gpu.fast import peaks


def info(device: Device, report: Report) -> None:
    report.add(info=backend.info(), torch=torch.__version__, cuda=torch.version.cuda)
    if not device.dry:
        properties = torch.cuda.get_device_properties(0)
        report.add(device=str(properties), driver=shell("nvidia-smi"))
        report.add(failed="" if "cuda" in device.backends() else backend.why_not("cuda", "cuda"))
    bandwidth, products = peaks(device)
    report.add(bandwidth_gbs=bandwidth, products_tflops=products)


def verify_backend(name: str, tf32: bool, device: Device, report: Report) -> None:
    """`fastda verify` on the device; float32 as it stands, or convolutions in TF32."""
    name = "cpp" if device.dry else name
    if reason := backend.why_not(name, device.name):
        report.add(failed=reason)
        return
    torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"
    operators = ["conv_same", "refiner_block"] if tf32 else None
    cases = list(verify.cases(operators, backends=[name], devices=[device.name]))
    cases = [case for case in cases if case.dtype == torch.float32] if tf32 else cases
    cases = [case for case in cases if not backend.lacking(name, case.operator.name)]

    def turn(case: verify.Case) -> int:
        return zlib.crc32(repr((case.option, case.sizes, case.layout)).encode()) % 97

    # Every operator early: a run that ends at its limit has seen something of each.
    cases = sorted(cases, key=turn)
    for case in cases[:: len(cases) // 24 if device.dry else 1]:
        for row in verify.check(case):
            bound = TF32 if tf32 else row.tolerance
            passed = row.passed or bool(tf32 and row.error and row.error.within(bound))
            report.add(**row.as_dict(), failed=None if passed else row.message or "beyond its tolerance")
            if "CUDA error" in row.message:
                raise RuntimeError(row.message)


def conformance(device: Device, report: Report) -> None:
    from tests.conformance import edges

    torch.backends.cudnn.conv.fp32_precision = "ieee"
    for name in device.backends():
        for check in edges.EVERYWHERE:
            with report.attempt(f"{name}: {check.__name__}"), torch.device(device.name):
                torch.manual_seed(0)  # a failure can be had again
                check(backend.kernels(name))


def calls(device: Device, dtype: torch.dtype) -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
    """A forward and all gradients of every operator: images in both layouts, convolutions of two sizes."""
    generator = torch.Generator().manual_seed(0)
    n, h, w = (1, 9, 14) if device.dry else (4, 35, 55)

    def draw(*shape: int, gain: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * gain).to(device.name, dtype).requires_grad_()

    def step(function: Callable[..., Any], *inputs: torch.Tensor, **options: Any) -> Any:
        def run() -> tuple[torch.Tensor, ...]:
            out = function(*inputs, **options)
            out = out if isinstance(out, tuple) else (out,)
            return (*out, *torch.autograd.grad(out[0], inputs, torch.ones_like(out[0])))

        return run

    found = {}
    for size in (3, 7):
        gain = (64 * size * size) ** -0.5
        x, filters, bias = draw(n, 64, h, w), draw(64, 64, size, size, gain=gain), draw(64)
        found[f"conv_same {size}x{size}"] = step(fastda.conv_same, x, filters, bias)
    x, bias1, bias2 = draw(n, 64, h, w), draw(64), draw(64)
    one, two = draw(64, 64, 3, 3, gain=1 / 24), draw(64, 64, 3, 3, gain=1 / 24)
    found["refiner_block"] = step(fastda.refiner_block, x, one, bias1, two, bias2)
    last = x.detach().contiguous(memory_format=LAST).requires_grad_()
    found["refiner_block channels_last"] = step(fastda.refiner_block, last, one, bias1, two, bias2)
    for suffix, images in (("", x), (" channels_last", last)):
        for norm in (fastda.batch_norm_act, fastda.instance_norm_act):
            options = {"residual": images.detach(), "negative_slope": 0.01}
            found[f"{norm.__name__}{suffix}"] = step(norm, images, bias1, bias2, **options)
        found[f"relu_max_pool{suffix}"] = step(
            fastda.relu_max_pool, images, kernel_size=3, stride=2, padding=1
        )
    logits, more = draw(n, 2, h, w), draw(n, 2, h, w)
    found["patch_discriminator_loss"] = step(fastda.patch_discriminator_loss, logits, more)
    images, others = draw(n, 1, h, w), draw(n, 1, h, w)
    found["self_regularization"] = step(fastda.self_regularization, images, others, scale=0.3)
    found["refiner_loss"] = step(fastda.refiner_loss, logits, images, others, reg_scale=0.3)
    found["grad_reverse"] = step(lambda x: fastda.grad_reverse(x, 0.7) * 2, draw(128, 768))
    return found


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def repeats(device: Device, report: Report) -> None:
    """Fifty times the same, bit for bit."""
    for name in device.backends():
        for dtype in (torch.float32, torch.bfloat16):
            for what, call in calls(device, dtype).items():
                with report.attempt(f"{name} {dtype}: {what}"), backend.use_backend(name):
                    first = call()
                    for _ in range(3 if device.dry else 50):
                        assert same(call(), first), "another result"


def graphs(device: Device, report: Report) -> None:
    """Forward and backward in a CUDA graph, replayed after its inputs have changed."""
    for name in device.backends():
        for dtype in (torch.float32, torch.bfloat16):
            for what, call in calls(device, dtype).items():
                with report.attempt(f"{name} {dtype}: {what}"), backend.use_backend(name):
                    replay, out = device.captured(call)
                    if not device.dry:
                        for cell in call.__closure__ or ():
                            for x in cell.cell_contents if isinstance(cell.cell_contents, tuple) else ():
                                with torch.no_grad():
                                    x.mul_(0.5)
                        replay()
                    device.synchronize()
                    assert same(out, call()), "the replay differs"


def streams(device: Device, report: Report) -> None:
    """Another stream, two threads each on its own, two devices."""
    found = calls(device, torch.bfloat16)
    expected = {what: call() for what, call in found.items()}
    device.synchronize()

    def on_a_stream(what: str, times: int, wrong: list[str]) -> None:
        with contextlib.nullcontext() if device.dry else torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(times):
                out = found[what]()
                if not device.dry:
                    torch.cuda.current_stream().synchronize()
                if not same(out, expected[what]):
                    wrong.append(what)

    wrong: list[str] = []
    for what in found:
        with report.attempt(f"another stream: {what}"):
            on_a_stream(what, 1, wrong)
            assert not wrong, wrong
    # Kernels of one function that ask for different amounts of shared memory.
    with report.attempt("two threads: 3x3 and 7x7"):
        workers = [
            threading.Thread(target=on_a_stream, args=(what, 2 if device.dry else 200, wrong))
            for what in ("conv_same 3x3", "conv_same 7x7")
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not wrong, wrong
    for other in range(1, 0 if device.dry else torch.cuda.device_count()):
        with report.attempt(f"device {other}"):
            x = torch.randn(2, 64, 35, 55, device=other)
            w = torch.randn(64, 64, 3, 3, device=other)
            assert torch.equal(fastda.conv_same(x, w).to(0), fastda.conv_same(x.to(0), w.to(0)))
