"""Patch losses in torch's machinery: opcheck, compilers, transforms."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

import fastda
from fastda import reference
from tests import common
from tests.ops.patch_loss import arguments_of, few, isa_independent, native


@native
@isa_independent
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_raw_operators_pass_opcheck(memory_format):
    def image(*shape):
        return torch.randn(shape).contiguous(memory_format=memory_format)

    pair, other, scores, weight = (
        image(3, 2, 4, 5),
        image(2, 2, 4, 5),
        image(2, 1, 4, 5),
        torch.rand(2, 1, 4, 5),
    )
    a, b, features, head = image(2, 3, 4, 5), image(2, 3, 4, 5), image(1, 3, 4, 5), torch.randn(2, 3, 1, 1)
    check = common.check_opcheck
    check("patch_discriminator_loss", pair, other, None, weight, "softmax", "mean", 0.1, True, True)
    check(
        "patch_discriminator_loss",
        scores.bfloat16(),
        scores.bfloat16(),
        None,
        None,
        "bce",
        "sum",
        0.0,
        False,
        True,
    )
    check("patch_generator_loss", other, weight, "softmax", "batchmean", True)
    check("patch_loss_map", other, weight, "softmax", True, 0.0, True)
    check("self_regularization", a, b, None, 0.3, "mean", True, True)
    check("self_regularization", a, b.contiguous(), torch.tensor(0.3), 0.0, "mean", True, False)
    check("refiner_loss", other, a, b, None, 0.3, "softmax", "mean", True, True, False)
    check(
        "refiner_loss", scores.double(), a, b, torch.tensor(0.3), 0.0, "lsgan", "batchmean", False, True, True
    )
    check(
        "patch_head_discriminator_loss",
        a,
        features,
        head,
        torch.randn(2),
        "softmax",
        "mean",
        0.1,
        True,
        True,
        True,
    )
    check(
        "patch_head_discriminator_loss", a, features, head[:1], None, "lsgan", "sum", 0.0, False, True, False
    )
    check("patch_loss_scale_", a.contiguous(), scores.contiguous(), torch.tensor(0.3))


def uses_kernels(counter):
    nodes = (n for g in counter.graphs for m in g.modules() if hasattr(m, "graph") for n in m.graph.nodes)
    return any("fastda" in str(node.target) for node in nodes)


@native
@isa_independent
@few
def test_compiles_without_a_break(op, sizes, options):
    arguments = arguments_of(op, sizes, options, torch.float32)
    common.check_compiled(op, arguments, backend="aot_eager")
    fast, counter = common.compiled(getattr(fastda, op), "aot_eager")
    fast(**arguments)
    assert uses_kernels(counter)


@native
@isa_independent
def test_a_training_step_compiled_by_inductor():
    refined, synthetic = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    weight = torch.randn(2, 1, 3, 3, requires_grad=True)

    def step(module, refined, synthetic, weight, scale):
        logits = F.conv2d(refined, weight, padding=1)
        loss = module.refiner_loss(logits, refined, synthetic, scale)
        return loss + module.patch_discriminator_loss(logits, -logits, return_accuracy=True)[0]

    fast, counter = common.compiled(functools.partial(step, fastda))
    for scale in (0.1, 0.7):
        inputs = (refined.requires_grad_(), synthetic, weight, torch.tensor(scale))
        results = [grad(f(*inputs), (refined, weight)) for f in (fast, functools.partial(step, reference))]
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1 and uses_kernels(counter)


@native
@isa_independent
@pytest.mark.parametrize("make", [torch.tensor, float], ids=["tensor", "float"])
def test_no_recompilation_while_the_scale_changes(make):
    fake, refined, synthetic = torch.randn(2, 2, 3, 4), torch.randn(2, 1, 9, 9), torch.randn(2, 1, 9, 9)
    refined.requires_grad_()
    fast, counter = common.compiled(fastda.refiner_loss, "aot_eager")
    for step in range(10):
        scale = make(0.05 + step / 10)
        loss = fast(fake, refined, synthetic, scale)
        torch.testing.assert_close(loss, fastda.refiner_loss(fake, refined, synthetic, scale))
        torch.testing.assert_close(
            grad(loss, refined)[0], float(scale) * (refined - synthetic).sign() / refined.numel()
        )
        if step == 1:
            # PyTorch takes a float for a constant once, and for a variable when it has changed.
            expected = counter.frame_count
            assert expected == (1 if make is torch.tensor else 2)
    assert counter.frame_count == expected


@isa_independent
@few
def test_torch_func(op, sizes, options):
    common.check_transforms(op, arguments_of(op, sizes, options))
