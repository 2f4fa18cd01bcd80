"""Normalisation's device code: which kernels serve, pieces and steps, pivots, every order of threads."""

import pytest
import torch

from tests.conformance.raw import DTYPES, LAST, check_norm, matches, norm_case
from tests.lanes import launched

pytestmark = [pytest.mark.lanes("emulated", "ptx"), pytest.mark.isa_independent]
CONTIGUOUS = torch.contiguous_format
SEEDS = range(5)
IN_PIECES = {"norm_moments", "norm_statistics", "norm_apply", "norm_sums", "norm_add", "norm_weight"}
IN_PIECES |= {"norm_input_gradient"}
both_layouts = pytest.mark.parametrize("layout", [CONTIGUOUS, LAST], ids=["contiguous", "channels_last"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_image", [False, True], ids=["batch", "instance"])
@pytest.mark.parametrize("sizes", [(3, 5, 4, 6), (2, 3, 5, 7), (2, 2, 32, 28), (3, 2, 23, 29)], ids=str)
def test_planes_of_a_warp_and_of_a_block_take_one_pass(ops, sizes, per_image, dtype):
    check_norm(ops, *norm_case(*sizes, dtype), per_image)
    assert launched() == {"norm_whole", "norm_whole_backward", "norm_weight"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes, layout",
    [
        *(((5, 2, 64, 56), CONTIGUOUS), ((3, 2, 35, 55), CONTIGUOUS)),  # packs, single entries
        *(((2, 40, 13, 17), LAST), ((2, 33, 13, 11), LAST), ((70, 8, 1, 1), CONTIGUOUS)),
    ],
    ids=str,
)
def test_several_pieces_of_a_statistic(ops, sizes, layout, dtype):
    per_image = sizes[2] == 13
    check_norm(ops, *norm_case(*sizes, dtype, layout), per_image and sizes[1] == 40)
    if dtype == torch.float32 and sizes[2] > 1:
        assert launched() == IN_PIECES


def test_blocks_of_several_steps(ops):
    """So many statistics that a block has two tiles of one, and the last of a piece a single row."""
    check_norm(ops, *norm_case(700, 2, 129, 1, torch.float32, LAST), per_image=True)
    assert launched() == IN_PIECES


@both_layouts
@pytest.mark.parametrize("slope", [None, 0.0, 1.5])
def test_stored_statistics(ops, layout, slope):
    x, weight, bias, residual, grad = norm_case(2, 5, 6, 7, torch.bfloat16, layout)
    stored = torch.randn(5).bfloat16(), torch.rand(5).bfloat16() + 0.5
    for added in (residual, None):
        _, mean, variance, *_ = check_norm(ops, x, weight, bias, added, grad, False, stored, slope)
        assert torch.equal(mean, stored[0].double()) and torch.equal(variance, stored[1].double())
    whole = {"norm_apply", "norm_whole_backward", "norm_weight"}
    assert launched() == (whole if layout == CONTIGUOUS else IN_PIECES - {"norm_moments", "norm_statistics"})


@both_layouts
@pytest.mark.parametrize("sizes", [(2, 4, 9, 8), (3, 4, 44, 40)], ids=str)
@pytest.mark.parametrize("mean", [1e3, 1e6])
def test_a_mean_far_above_the_deviation(ops, sizes, layout, mean):
    x, weight, bias, residual, grad = norm_case(*sizes, torch.float32, layout, mean)
    for per_image in (False, True):
        check_norm(ops, x, weight, bias, residual, grad, per_image)


@both_layouts
@pytest.mark.parametrize("sizes", [(2, 3, 8, 9), (2, 4, 44, 52)], ids=str)
@pytest.mark.parametrize(
    "values", [(1e30, 3e30), (torch.inf,), (torch.inf, torch.inf), (torch.nan,)], ids=str
)
def test_moments_that_float32_cannot_hold(ops, values, sizes, layout):
    """As PyTorch stores them, and none of other channels."""
    x = torch.randn(sizes)
    for i, value in enumerate(values):
        x[i, 1, 4, 5 + i] = value
    x = x.contiguous(memory_format=layout)
    _, mean, variance = ops.norm_act(x, None, None, None, None, None, False, 1e-5, None)
    wide = x.double()
    torch.testing.assert_close(mean, wide.mean((0, 2, 3)), rtol=1e-6, atol=1e-6, equal_nan=True)
    if x.isfinite().all():
        torch.testing.assert_close(variance, wide.var((0, 2, 3), correction=0), rtol=1e-6, atol=1e-6)
    else:
        assert variance.isnan().tolist() == [c == 1 for c in range(sizes[1])]


@both_layouts
def test_the_same_bits_in_every_order_and_from_misaligned_memory(cuda_host, ops, layout):
    for sizes in ((2, 4, 6, 8), (3, 4, 44, 40)):
        x, weight, bias, residual, grad = norm_case(*sizes, torch.float32, layout)
        shifted = torch.empty(x.numel() + 1)[1:].as_strided(x.shape, x.stride()).copy_(x)
        runs = []
        for seed in SEEDS:
            cuda_host.set_seed(seed)
            runs.append(check_norm(ops, x if seed else shifted, weight, bias, residual, grad))
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@both_layouts
@pytest.mark.parametrize("sizes", [(2, 4, 6, 8), (3, 4, 44, 40)], ids=str)
def test_what_is_not_needed_is_not_computed(cuda_host, ops, sizes, layout):
    x, weight, bias, residual, grad = norm_case(*sizes, torch.float32, layout)
    y, mean, variance, *every = check_norm(ops, x, weight, bias, residual, grad)
    for alone in range(4):
        cuda_host.forget()
        needs = [i == alone for i in range(4)]
        out = ops.norm_act_backward(
            *(grad, x, weight, bias, mean, variance, y, False, True, 1e-5, 0.1, *needs)
        )
        for i, (got, right) in enumerate(zip(out, every, strict=True)):
            if i == alone:
                matches("batch_norm_act", "x", got, right, torch.float32)
            else:
                assert got.numel() == 0
        assert ("norm_weight" in launched()) == (alone in (1, 2))
    cuda_host.forget()
    ops.norm_act_backward(
        *(grad, x, weight, bias, mean, variance, y, False, False, 1e-5, 0.1, True, False, False, False)
    )
    assert launched() == {"norm_input_gradient"}
