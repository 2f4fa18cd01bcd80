"""Subnormal numbers, and products near the largest number of a dtype."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fastda
from fastda import backend, reference

native = pytest.mark.skipif(backend.native is None, reason="the native extension is not built")

SUBNORMAL = """
import torch, fastda
torch.set_num_threads(2)
def zeros():
    x = torch.full((4, 4, 64, 64), 1e-39)
    large = torch.full((4, 4, 5, 5), 1e10)
    grad = torch.full((8, 100_000), 1e-39)
    l1 = fastda.self_regularization(x, torch.zeros_like(x), 1e10)
    scaled = torch.ops.fastda.grad_reverse_backward(grad, torch.full((8,), 1e10))
    return [(t == 0).float().mean().item() for t in (fastda.conv_same(x, large), scaled, l1, grad * 1e10)]
def halves():
    bits = torch.arange(1, 1024, dtype=torch.int16).view(1, 1, 11, 93).view(torch.float16)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float16)
    exact = torch.arange(1, 1024, dtype=torch.float64) * 2.0**-24
    same = fastda.conv_same(bits, one)
    total = fastda.self_regularization(bits, torch.zeros_like(bits), reduction="sum")
    return torch.equal(same, bits) and abs(total.item() - exact.sum().item()) < 1e-6
assert zeros() == [0, 0, 0, 0] and halves()
if torch.set_flush_denormal(True):
    assert zeros() == [1, 1, 1, 1], zeros()
    assert halves()
    torch.set_flush_denormal(False)
    assert zeros() == [0, 0, 0, 0]
print("as PyTorch")
"""


@native
def test_subnormal_numbers_are_flushed_where_the_user_asks_for_it_and_halves_are_not():
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", SUBNORMAL], env=env, capture_output=True, text=True)
    assert done.stdout == "as PyTorch\n", done.stderr


@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("terms", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_overflows_no_earlier_than_pytorchs(dtype, terms, scale):
    weight = torch.ones(terms, 4, dtype=dtype)
    for share in (0.2, 0.6, 1.1, 1.6):
        grad = torch.full((3, terms), torch.finfo(dtype).max / terms * min(share, 0.99 * terms), dtype=dtype)

        def gradient(function, dtype=dtype, grad=grad):
            x = torch.zeros(3, 4, dtype=dtype, requires_grad=True)
            return torch.autograd.grad(function(x, weight.to(dtype)), x, grad.to(dtype))[0]

        got = gradient(lambda x, w: fastda.grad_reverse_linear(x, w, None, scale))
        theirs = gradient(lambda x, w: F.linear(fastda.grad_reverse(x, scale), w))
        exact = gradient(lambda x, w: reference.grad_reverse_linear(x, w, None, scale), torch.float64)
        finite = got.isfinite()
        assert (finite | ~theirs.isfinite()).all()
        torch.testing.assert_close(got[finite].double(), exact[finite], rtol=1e-2, atol=0)
        assert (got[~finite] == -torch.inf).all()
