"""The convolutions' device code: which kernel serves, tensor cores, banks, every order of threads."""

import itertools

import pytest
import torch

import fastda
from fastda import reference, use_backend
from tests.conformance.raw import (
    DTYPES,
    LAST,
    block_case,
    check_block,
    check_conv,
    conv_case,
    layouts,
    matches,
    strided,
)
from tests.lanes import launched

pytestmark = [pytest.mark.lanes("emulated", "ptx"), pytest.mark.isa_independent]
SEEDS = range(5)
A100, H100 = 163 << 10, 227 << 10  # shared memory of a block, bytes


# (n, c, k, filter, h, w): channels and pixels that fill a tile, that fall short of one, that need several
CONVOLUTIONS = [
    *((1, 64, 64, 3, 11, 13), (2, 64, 64, 3, 3, 5), (1, 64, 64, 1, 19, 7), (1, 40, 33, 5, 5, 37)),
    *((1, 70, 40, 3, 6, 9), (1, 72, 136, 3, 5, 4), (3, 33, 65, 1, 1, 1), (1, 40, 33, 7, 10, 3)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", CONVOLUTIONS, ids=str)
def test_conv_by_tiles(cuda_host, ops, sizes, dtype):
    x, weight, bias, residual, grad = conv_case(*sizes, dtype)
    cuda_host.set_seed(sum(sizes))
    check_conv(
        ops,
        *(t.contiguous(memory_format=LAST) for t in (x, weight)),
        bias,
        residual.contiguous(memory_format=LAST),
        grad,
    )
    if dtype in (torch.float32, torch.bfloat16):
        check_conv(ops, x, weight, bias, residual, grad)
    if sizes[1] == 70:
        check_conv(
            ops,
            strided(x),
            weight.transpose(2, 3).contiguous().transpose(2, 3),
            bias,
            layouts(residual)["channels_last"],
            strided(grad),
        )
    assert ("conv" in launched()) == (dtype != torch.float64)
    assert ("filter_grad" in launched()) == (dtype != torch.float64)


@pytest.mark.parametrize("sizes", [CONVOLUTIONS[0], CONVOLUTIONS[4], CONVOLUTIONS[7]], ids=str)
def test_conv_same_in_tf32(cuda_host, ops, sizes):
    for memory_format in (LAST, torch.contiguous_format):
        x, weight, bias, residual, grad = conv_case(*sizes, torch.float32, memory_format)
        check_conv(ops, x, weight, bias, residual, grad, tf32=True)
    assert cuda_host.products() > 0


def test_conv_same_in_float32_uses_no_tensor_cores_unless_allowed(cuda_host, ops):
    x, weight, bias, residual, grad = conv_case(*CONVOLUTIONS[0], torch.float32)
    check_conv(ops, x, weight, bias, residual, grad)
    assert cuda_host.products() == 0


@pytest.mark.parametrize("op", ["conv_same", "refiner_block"])
def test_public_functions_take_tf32_from_torchs_setting(cuda_host, op):
    """In the forward and, set anew, in the backward."""
    x, weight, bias, _, grad = conv_case(*CONVOLUTIONS[0], torch.float32)
    filters = (weight, bias) if op == "conv_same" else (weight, bias, weight, bias)
    with use_backend("cuda"):
        for allowed in (False, True):
            torch.backends.cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"
            cuda_host.forget()
            y = getattr(fastda, op)(x.requires_grad_(), *filters)
            assert (cuda_host.products() > 0) == allowed
            torch.backends.cudnn.conv.fp32_precision = "ieee" if allowed else "tf32"
            cuda_host.forget()
            y.backward(grad)
            assert (cuda_host.products() > 0) != allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1, 1, 1), (2, 3, 5, 1, 7, 9), (1, 7, 4, 5, 3, 2), (1, 1, 64, 3, 9, 11), (2, 64, 1, 1, 5, 7)],
)
def test_conv_same_directly(ops, sizes, dtype):
    for memory_format in (LAST, torch.contiguous_format):
        check_conv(ops, *conv_case(*sizes, dtype, memory_format))
    assert launched() == {"direct_conv", "direct_filter_grad", "add_pieces"}


def test_conv_same_with_a_filter_wider_than_shared_memory(cuda_host, ops):
    cuda_host.set_device(3, A100)
    x, weight, bias, residual, _ = conv_case(1, 64, 64, 37, 3, 4, torch.bfloat16, LAST)
    y = ops.conv_same(x, weight, bias, residual, False)
    expected = reference.conv_same(*(t.double() for t in (x, weight, bias)), residual=residual.double())
    matches("conv_same", "value", y, expected, torch.bfloat16)
    assert launched() == {"direct_conv"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv_same_repeats_bit_for_bit_in_every_order(cuda_host, ops, dtype):
    for memory_format, size in ((LAST, (2, 13, 11)), (torch.contiguous_format, (1, 5, 7))):
        n, h, w = size
        x, weight, bias, residual, grad = conv_case(n, 64, 64, 3, h, w, dtype, memory_format)
        runs = []
        for seed in SEEDS:
            cuda_host.set_seed(seed)
            y = ops.conv_same(x, weight, bias, residual, True, True)
            runs.append((y, *ops.conv_same_backward(grad, x, weight, y, True, True, True, True)))
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
        # What tensor cores read lies in different banks, but for rows that are computed in vain.
        if dtype == torch.bfloat16:
            assert max(cuda_host.passes().values()) < 1.1, cuda_host.passes()
            # And so do the sums that are read back for the last step; in the emulator nothing is counted.
            for _, text, _, passes, least in itertools.chain(*cuda_host.ptx_executed().values()):
                assert "ld.shared.v4" not in text or passes < 1.1 * least, text
        cuda_host.forget()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("memory_format", [LAST, torch.contiguous_format])
def test_conv_of_large_tiles_agrees_with_small_ones_bit_for_bit(cuda_host, ops, dtype, memory_format):
    """Which tile serves hangs on the device's multiprocessors, and the result must not."""
    tf32 = dtype == torch.float32
    x, weight, bias, residual, grad = conv_case(2, 72, 40, 3, 19, 21, dtype, memory_format)
    runs, shared = {}, {}
    for multiprocessors in (1, 132):
        cuda_host.set_device(multiprocessors, H100)
        cuda_host.forget()
        y = ops.conv_same(x, weight, bias, residual, True, tf32)
        d_x, *_ = ops.conv_same_backward(grad, x, weight, y, True, False, False, tf32)
        runs[multiprocessors] = y, d_x
        shared[multiprocessors] = min(s for name, *_, s in cuda_host.launches() if name == "conv")
    assert shared[1] > 256 * 64 * 4 > shared[132]  # large tiles' sums do not fit what small ones take
    assert all(torch.equal(a, b) for a, b in zip(runs[1], runs[132], strict=True))
    exact = reference.conv_same(
        *(t.double() for t in (x, weight, bias)), residual=residual.double(), relu=True
    )
    matches("conv_same", "value", y, exact, dtype, tf32)


BLOCKS = [
    *((2, 64, 64, 3, 3, 7, 5), (1, 64, 64, 3, 3, 11, 21), (1, 48, 33, 3, 1, 7, 37), (1, 40, 64, 1, 3, 13, 5)),
    *((1, 5, 3, 3, 3, 7, 9), (1, 40, 64, 5, 5, 4, 3)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", BLOCKS, ids=str)
def test_block_by_tiles(cuda_host, ops, sizes, dtype):
    for shared, memory_format in (
        (H100, LAST),
        (A100, torch.contiguous_format),
        (H100, torch.contiguous_format),
    ):
        if memory_format != LAST and (dtype == torch.float16 or sizes[0] == 2):
            continue
        cuda_host.set_device(3, shared)
        cuda_host.set_seed(sum(sizes))
        cuda_host.forget()
        check_block(ops, *block_case(*sizes, dtype, memory_format))
        half, small = dtype in (torch.bfloat16, torch.float16), sizes[3:5] == (5, 5) or sizes[1] == 5
        one_launch = half and not small and (shared == H100 or sizes[3] + sizes[4] < 6)
        assert ("refiner_block" in launched()) == one_launch, launched()


def test_refiner_block_in_one_launch_agrees_with_two_in_every_order(cuda_host, ops):
    cases = block_case(2, 64, 64, 3, 3, 13, 21, torch.bfloat16, LAST)[:-1]
    cuda_host.set_device(108, A100)
    expected = ops.refiner_block(*cases, True)
    assert "refiner_block" not in launched()
    for seed, multiprocessors in zip(SEEDS, (1, 2, 3, 5, 132), strict=True):
        cuda_host.set_seed(seed)
        cuda_host.set_device(multiprocessors, H100)
        out = ops.refiner_block(*cases, True)
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    assert "refiner_block" in launched()


def test_refiner_block_in_tf32(ops):
    check_block(ops, *block_case(*BLOCKS[0], torch.float32, LAST), tf32=True)
