"""The device code of gradient reversal and the losses: alignment, lanes, every order of threads."""

import pytest
import torch

from fastda import reference
from tests.conformance.raw import LAST, check_discriminator, matches

pytestmark = [pytest.mark.lanes("emulated", "ptx"), pytest.mark.isa_independent]
SEEDS = range(5)


def test_grad_reverse_of_misaligned_memory(ops):
    for shift in range(1, 4):
        grad = torch.randn(4 * 64 + shift)[shift:].view(4, 64)
        for scale in (torch.tensor(0.5), torch.rand(4)):
            out = ops.grad_reverse_backward(grad, scale)
            assert torch.equal(out, -scale.view(-1, 1) * grad)


def test_patch_losses_of_many_blocks_repeat_bit_for_bit(cuda_host, ops):
    real, fake = torch.randn(3, 2, 61, 53), torch.randn(5, 2, 37, 53)
    runs = []
    for seed in SEEDS:
        cuda_host.set_seed(seed)
        runs.append(check_discriminator(ops, real, fake, "softmax", real_weight=torch.ones(3, 1, 61, 53)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_patch_head_with_several_patches_a_lane(ops):
    real, fake = torch.randn(260, 3, 16, 16), torch.randn(3, 3, 16, 16)
    weight, bias = torch.randn(1, 3, 1, 1), torch.randn(1)
    for r, f in ((real, fake), (real.contiguous(memory_format=LAST), fake.contiguous(memory_format=LAST))):
        out = ops.patch_head_discriminator_loss(r, f, weight, bias, "bce", "mean", 0.0, True, True, True)
        exact = [t.double().requires_grad_() for t in (r, f, weight, bias)]
        expected = reference.patch_head_discriminator_loss(*exact, "bce")
        matches("patch_head_discriminator_loss", "value", out[0], expected, torch.float32)
        for o, e in zip(out[3:6], torch.autograd.grad(expected, exact), strict=False):
            matches("patch_head_discriminator_loss", "weight", o, e, torch.float32)
