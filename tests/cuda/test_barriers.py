"""Barriers and waits left out of the device code: the executor's checks see each."""

import contextlib
import importlib
import os
import re

import pytest
import torch

from fastda import reference
from tests.conformance.raw import (
    LAST,
    block_case,
    check_conv,
    check_discriminator,
    check_norm,
    conv_case,
    matches,
    norm_case,
)

pytestmark = [pytest.mark.lanes("emulated"), pytest.mark.isa_independent]
SEEDS = range(5)
H100 = 227 << 10


def conv_tiles(ops, dtype, memory_format=LAST, sizes=(1, 64, 64, 3, 19, 21)):
    check_conv(ops, *conv_case(*sizes, dtype, memory_format))


def conv_exact(ops):
    conv_tiles(ops, torch.float32)


def conv_many_channels(ops):
    conv_tiles(ops, torch.bfloat16, sizes=(1, 136, 64, 3, 9, 14))


def conv_scalar(ops):
    conv_tiles(ops, torch.bfloat16, torch.contiguous_format, (1, 37, 41, 3, 9, 14))


def weight_gradient(ops, shared=H100):
    importlib.import_module("cuda_host").set_device(3, shared)
    # So many tiles that a block has three.
    x, weight, _, _, grad = conv_case(173, 64, 64, 3, 6, 6, torch.float32, LAST)
    exact = weight.double().requires_grad_()
    (expected,) = torch.autograd.grad(reference.conv_same(x.double(), exact), exact, grad.double())
    _, d_weight, d_bias = ops.conv_same_backward(grad, x, weight, None, False, True, True)
    matches("conv_same", "weight", d_weight, expected, torch.float32)
    matches("conv_same", "bias", d_bias, grad.double().sum((0, 2, 3)), torch.float32)


def weight_gradient_of_one_stage(ops):
    weight_gradient(ops, 64 << 10)


def block(ops):
    importlib.import_module("cuda_host").set_device(1, H100)
    x, weight1, bias1, weight2, bias2, _ = block_case(1, 64, 64, 3, 3, 17, 21, torch.bfloat16, LAST)
    y, inner = ops.refiner_block(x, weight1, bias1, weight2, bias2, True)
    expected = reference.conv_same(x.double(), weight1.double(), bias1.double(), relu=True)
    matches("conv_same", "value", inner, expected, torch.bfloat16)
    expected = reference.conv_same(
        *(t.double() for t in (inner, weight2, bias2)), residual=x.double(), relu=True
    )
    matches("refiner_block", "value", y, expected, torch.bfloat16)


def grad_reverse(ops):
    grad = torch.randn(37, 53)
    matches(
        "grad_reverse", "grad", ops.grad_reverse_backward(grad, torch.tensor(0.5)), -0.5 * grad, torch.float32
    )


def losses(ops):
    check_discriminator(ops, torch.randn(3, 2, 61, 53), torch.randn(5, 2, 37, 53), "softmax")


def weighted_losses(ops):
    weight = torch.rand(3, 1, 9, 14) + 0.1
    check_discriminator(
        ops, torch.randn(3, 2, 9, 14), torch.randn(3, 2, 9, 14), "softmax", "mean", 0.0, weight, weight
    )


def head(ops):
    x, y, weight = torch.randn(3, 32, 9, 14), torch.randn(2, 32, 9, 14), torch.randn(2, 32, 1, 1)
    exact = [t.double().requires_grad_() for t in (x, y, weight)]
    expected = reference.patch_head_discriminator_loss(*exact, None)
    out = ops.patch_head_discriminator_loss(x, y, weight, None, "softmax", "mean", 0.0, True, True, True)
    matches("patch_head_discriminator_loss", "value", out[0], expected, torch.float32)
    for o, e in zip(out[3:6], torch.autograd.grad(expected, exact), strict=True):
        matches("patch_head_discriminator_loss", "weight", o, e, torch.float32)


def norm_of_planes(ops):
    check_norm(ops, *norm_case(3, 2, 23, 29, torch.float32))


def norm_in_pieces(ops):
    check_norm(ops, *norm_case(3, 2, 35, 55, torch.float32))


def norm_of_rows(ops):
    check_norm(ops, *norm_case(2, 40, 13, 17, torch.bfloat16, LAST), per_image=True)


def survives(cuda_host, ops, check, seeds=SEEDS):
    """Whether a check passes in every order; in a process of its own, which AddressSanitizer may end."""
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(AssertionError, RuntimeError):
            for seed in seeds:
                cuda_host.set_seed(seed)
                torch.manual_seed(seed)
                check(ops)
            status = 0
        os._exit(status)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    "check",
    [
        *(grad_reverse, losses, head, conv_exact, conv_many_channels, conv_scalar, weight_gradient),
        *(weight_gradient_of_one_stage, block, norm_of_planes, norm_in_pieces, norm_of_rows),
    ],
    ids=lambda check: check.__name__,
)
def test_removal_of_any_barrier_is_caught(cuda_host, ops, check):
    check(ops)
    harmless = []
    for file, line in sorted(cuda_host.barriers()):
        cuda_host.skip_barrier(file, line)
        if survives(cuda_host, ops, check, range(12)):
            harmless.append(f"{file}:{line}")
    assert not harmless, harmless


SYNCHRONISES = re.compile(r"bar\.sync|cp\.async\.wait_group")


@pytest.mark.lanes("ptx")
def test_removal_of_any_barrier_or_wait_from_the_ptx_is_caught(cuda_host, ops):
    """Races are seen whatever they do to the result, so that one order is enough."""
    checks = [
        losses,
        weighted_losses,
        head,
        conv_exact,
        conv_many_channels,
        conv_scalar,
        weight_gradient,
        weight_gradient_of_one_stage,
        block,
        norm_of_planes,
        norm_in_pieces,
        norm_of_rows,
    ]
    met, caught = {}, set()
    for check in checks:
        cuda_host.ptx_forget()
        check(ops)
        for kernel, lines in cuda_host.ptx_executed().items():
            here = {(kernel, n): text for n, text, *_ in lines if SYNCHRONISES.match(text)}
            met |= here
            for kernel, number in here.keys() - caught:
                cuda_host.ptx_skip(kernel, number)
                try:
                    check(ops)
                except (AssertionError, RuntimeError):
                    caught.add((kernel, number))
        cuda_host.ptx_skip("", -1)
        check(ops)
    kernels = {"loss", "finish", "head", "head_weight", "conv", "filter_grad", "refiner_block"}
    norms = {"moments", "statistics", "apply", "sums", "add", "weight", "input_gradient", "whole"}
    kernels |= {f"norm_{name}" for name in norms} | {"norm_whole_backward"}
    assert all(any(f"{name}_kernel" in kernel for kernel, _ in met) for name in kernels)
    # A block_sum waits for those before it, of which a kernel's first has none.
    begins = r"(loss|finish|weight_sum|head|norm_(moments|statistics|add|weight|whole))_kernel"
    sums = {kernel for kernel, _ in met if re.search(begins, kernel)}
    first = {(kernel, min(n for k, n in met if k == kernel)) for kernel in sums}
    assert met.keys() - caught <= first
