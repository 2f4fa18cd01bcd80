"""What the operators' Python side could get wrong and most calls do not show."""

import pytest
import torch

import fastda
from fastda import nn, reference
from tests import common

F64 = torch.float64
isa_independent = pytest.mark.isa_independent

CALLS = [
    ("conv_same", (2, 3, 4, 3, 5, 6), {"bias": True, "residual": True, "relu": True}),
    ("refiner_block", (2, 3, 3, 5, 6), {}),
    ("patch_discriminator_loss", (2, 3, 2, 3), {"kind": "bce", "reduction": "sum"}),
    ("self_regularization", (2, 1, 2, 3), {"scale": 0.3}),
    ("patch_head_discriminator_loss", (2, 1, 3, 2, 2), {"kind": "softmax"}),
]
calls = pytest.mark.parametrize(("op", "sizes", "options"), CALLS, ids=[op for op, *_ in CALLS])


@isa_independent
@common.both_routes
@calls
def test_a_gradient_is_the_same_with_and_without_a_graph_of_it(op, sizes, options):
    arguments = common.draw(op, sizes, F64, **options)
    wanted = [arguments[n] for n in common.wanted(arguments)]
    out = getattr(fastda, op)(**arguments)
    seed = torch.randn_like(out)
    plain = torch.autograd.grad(out, wanted, seed, retain_graph=True)
    recorded = torch.autograd.grad(out, wanted, seed, create_graph=True)
    for a, b in zip(plain, recorded, strict=True):
        torch.testing.assert_close(a, b.detach())


@isa_independent
@common.both_routes
@calls
def test_a_gradient_is_linear_in_what_comes_in(op, sizes, options):
    arguments = common.draw(op, sizes, torch.float32, **options)
    wanted = [arguments[n] for n in common.wanted(arguments)]
    out = getattr(fastda, op)(**arguments)
    once = torch.autograd.grad(out, wanted, torch.ones_like(out), retain_graph=True)
    for factor in (4.0, 0.5, 0.0):
        scaled = torch.autograd.grad(out, wanted, torch.full_like(out, factor), retain_graph=True)
        for a, b in zip(once, scaled, strict=True):
            torch.testing.assert_close(factor * a, b)


@isa_independent
@common.both_routes
@calls
def test_every_gradient_can_be_wanted_alone(op, sizes, options):
    arguments = common.draw(op, sizes, F64, **options)
    for name in common.wanted(arguments):
        alone = {
            n: v.detach().requires_grad_(n == name) if isinstance(v, torch.Tensor) else v
            for n, v in arguments.items()
        }
        common.check_against_reference(op, alone)


@isa_independent
def test_autocast_leaves_float64_alone():
    x, weight = torch.randn(2, 3, 5, 6, dtype=F64), torch.randn(4, 3, 3, 3, dtype=F64)
    rows = torch.randn(5, 3, dtype=F64, requires_grad=True)
    linear = torch.randn(2, 3, dtype=F64)
    with torch.autocast("cpu", torch.bfloat16):
        y = fastda.conv_same(x, weight)
        z = fastda.grad_reverse_linear(rows, linear)
        expected = torch.nn.functional.linear(rows, linear)
    assert y.dtype == F64 and z.dtype == expected.dtype
    torch.testing.assert_close(y, reference.conv_same(x, weight))
    torch.testing.assert_close(z, expected)


@isa_independent
@pytest.mark.parametrize("kind", ["softmax", "bce", "lsgan"])
def test_the_loss_module_smooths_labels(kind):
    logits = [torch.randn(2, 2 if kind == "softmax" else 1, 3, 4) for _ in range(2)]
    smoothed = nn.PatchDiscriminatorLoss(kind, label_smoothing=0.3)(*logits)
    assert torch.equal(smoothed, fastda.patch_discriminator_loss(*logits, kind, label_smoothing=0.3))
    assert not torch.equal(smoothed, nn.PatchDiscriminatorLoss(kind)(*logits))


@isa_independent
def test_the_reference_reversal_keeps_what_is_not_finite():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 2.0])
    torch.testing.assert_close(reference.grad_reverse(x, 0.5), x, rtol=0, atol=0, equal_nan=True)
