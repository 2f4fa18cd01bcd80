"""The raw operators of the losses."""

import itertools

import pytest
import torch

from fastda import reference, testing
from fastda.registry import KINDS, REDUCTIONS
from tests import lanes
from tests.conformance.cases import every_dtype
from tests.conformance.raw import (
    LAST,
    check_discriminator,
    discriminator_reference,
    layouts,
    matches,
    strided,
    wide,
)

pytestmark = pytest.mark.lanes(*lanes.KERNELS)


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_patch_discriminator_loss(lane, kind, dtype):
    ops = lane.ops
    c = 2 if kind == "softmax" else 1
    sizes = itertools.cycle([(1, 2, 1, 1), (3, 2, 9, 14), (2, 3, 37, 53), (4, 3, 1, 3)])
    smoothings = (0.0, 0.1) if kind in ("softmax", "bce", "lsgan") else (0.0,)
    cases = itertools.product(smoothings, ("contiguous", "channels_last", "strided"), (False, True))
    for seed, (reduction, (smoothing, layout, weighted)) in enumerate(
        zip(itertools.cycle(REDUCTIONS), cases, strict=False)
    ):
        lane.shuffle(seed)
        n, m, h, w = next(sizes)
        real, fake = torch.randn(n, c, h, w).to(dtype), torch.randn(m, c, h, w).to(dtype)
        weight = torch.rand(n, 1, h, 1) + 0.1
        weight[:, :, ::2] *= torch.rand(n, 1, 1, 1) > 0.5
        weight[0] = 0.5
        check_discriminator(
            ops,
            layouts(real)[layout],
            layouts(fake)[layout],
            kind,
            reduction,
            smoothing,
            weight if weighted else None,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_patch_loss_of_extreme_logits(lane, kind):
    ops = lane.ops
    c = 2 if kind == "softmax" else 1
    extremes = torch.tensor([1e4, -1e4, 88.0, -88.0, 30.0, 1e-6, 0.0, -0.0])
    logits = torch.randn(1, c, 2, 8)
    logits[:, 0, 0] = extremes
    logits[:, -1, 1] = extremes.flip(0)
    check_discriminator(ops, logits, -logits, kind)
    for bad in (float("nan"), float("inf"), -float("inf")):
        logits = torch.randn(1, c, 3, 5)
        logits[0, 0, 1, 2] = bad
        zeros = torch.zeros(1, c, 1, 1)
        loss, _, _, grad, _ = ops.patch_discriminator_loss(
            logits, zeros, None, None, kind, "sum", 0.0, True, True
        )
        expected, _, _, expected_grad, _ = discriminator_reference(logits, zeros, kind, reduction="sum")
        assert testing.error(loss, expected).nonfinite_equal, (bad, loss, expected)
        assert testing.error(grad, expected_grad).nonfinite_equal, (bad, grad, expected_grad)
        # A weight of zero takes the patch out, whatever it holds.
        weight = torch.ones(1, 1, 3, 5)
        weight[0, 0, 1, 2] = 0
        check_discriminator(ops, logits, zeros, kind, real_weight=weight)


def test_patch_loss_of_nothing(lane):
    ops = lane.ops
    for reduction, expected in zip(REDUCTIONS, (float("nan"), 0.0, float("nan")), strict=True):
        empty = torch.randn(0, 2, 9, 14)
        loss, accuracy, _, grad, _ = ops.patch_discriminator_loss(
            empty, torch.zeros(1, 2, 1, 1), None, None, "softmax", reduction, 0.0, True, False
        )
        assert grad.shape == empty.shape and accuracy.isnan()
        torch.testing.assert_close(loss, torch.tensor(expected) + torch.tensor(2.0).log(), equal_nan=True)


@every_dtype
def test_patch_l1(lane, dtype):
    ops = lane.ops
    scale = 0.3
    for seed, shape in enumerate(((), (5,), (4099,), (3, 1, 35, 55), (2, 3, 9, 14))):
        lane.shuffle(seed)
        a, b = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        pairs = [(a, b)]
        if a.dim() == 4:
            last = [layouts(t)["channels_last"] for t in (a, b)]
            pairs += [(a, last[1]), tuple(last), (strided(a), b)]
        if a.dim() == 1:
            pairs += [(a[1:], b[:-1])]
        for (x, y), reduction in itertools.product(pairs, REDUCTIONS):
            exact = [t.double().requires_grad_() for t in (x, y)]
            given = torch.tensor(scale, dtype=torch.float64) if reduction != "mean" else None
            expected = reference.self_regularization(
                *(t[None] if not shape else t for t in exact), scale, reduction=reduction
            )
            grads = torch.autograd.grad(expected, exact)
            out = ops.self_regularization(
                x, y, given, scale if given is None else 99.0, reduction, True, True
            )
            for what, o, e in zip(("value", "grad", "grad"), out, (expected, *grads), strict=True):
                matches("self_regularization", what, o, e, wide(x))


def test_patch_refiner_loss_of_two_dtypes(lane):
    ops = lane.ops
    fake, a, b = (
        torch.randn(3, 2, 4, 5),
        torch.randn(3, 1, 9, 14).bfloat16(),
        torch.randn(3, 1, 9, 14).bfloat16(),
    )
    for logits in (fake, fake.double()):
        exact = [t.double().requires_grad_() for t in (logits, a, b)]
        expected = reference.refiner_loss(*exact, 0.3, "softmax")
        out = ops.refiner_loss(logits, a, b, None, 0.3, "softmax", "mean", True, True, True)
        for what, o, e in zip(
            ("value", "fake_logits", "refined", "synthetic"),
            out,
            (expected, *torch.autograd.grad(expected, exact)),
            strict=True,
        ):
            matches("refiner_loss", what, o, e, torch.float32)


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_patch_head_discriminator_loss(lane, kind, dtype):
    ops = lane.ops
    classes = 2 if kind == "softmax" else 1
    smoothing = 0.1 if kind in ("softmax", "lsgan") else 0.0
    cases = [
        (1, 1, 1, 1, 1, "contiguous"),
        (3, 2, 32, 9, 14, "channels_last"),
        (1, 2, 37, 7, 11, "strided"),
        (2, 3, 40, 9, 5, "channels_last"),
        (2, 1, 35, 5, 9, "channels_last"),
    ]
    for seed, (n, m, c, h, w, layout) in enumerate(cases):
        lane.shuffle(seed)
        r, reduction = seed % 3, REDUCTIONS[seed % 3]
        real, fake = torch.randn(n, c, h, w).to(dtype), torch.randn(m, c, h, w).to(dtype)
        weight = (torch.randn(classes, c, 1, 1) / c**0.5).to(dtype)
        bias = torch.randn(classes).to(dtype) if r else None
        exact = [t.double().requires_grad_() for t in (real, fake, weight, *([bias] if r else []))]
        expected, *accuracies = reference.patch_head_discriminator_loss(
            *exact,
            *([] if r else [None]),
            kind,
            reduction=reduction,
            label_smoothing=smoothing,
            return_accuracy=True,
        )
        grads = torch.autograd.grad(expected, exact)
        fake_layout = "contiguous" if seed == 1 else layout
        out = ops.patch_head_discriminator_loss(
            *(
                layouts(real)[layout],
                layouts(fake)[fake_layout],
                weight,
                bias,
                kind,
                reduction,
                smoothing,
            ),
            *(True, True, True),
        )
        names = ("value", "value", "value", "real_features", "fake_features", "weight", "bias")
        for what, o, e in zip(names, out, (expected, *accuracies, *grads), strict=False):
            if what == "bias":  # a sum of slopes of both signs, about 1 each before the reduction's factor
                terms = h * w * (n + m) / (n if r == 2 else 1)
                bound = testing.tolerance("patch_head_discriminator_loss", "bias", wide(real))
                assert (o.double() - e).abs().max() <= bound.relative_l2 * terms
                continue
            terms = {0: 1, 1: (n + m) * h * w, 2: h * w}[r] if what == "value" else 0.0
            if what == "weight":  # likewise a sum over pixels: its size where none of them cancel
                score = weight.double()[:1] - weight.double()[1:] if classes == 2 else weight.double()
                slopes = [(g * score).sum(1, keepdim=True) / score.square().sum() for g in grads[:2]]
                parts = [
                    (x.double() * s).square().sum((0, 2, 3))
                    for x, s in zip((real, fake), slopes, strict=True)
                ]
                terms = sum(parts).mean().sqrt().item()
            matches("patch_head_discriminator_loss", what, o, e, wide(real), terms=terms)


def test_patch_loss_scale(lane):
    ops = lane.ops
    first, second = torch.randn(3, 700), torch.randn(2, 3, 5, 7).double().contiguous(memory_format=LAST)
    for factor in (1.0, -0.5):
        for pair in ((first, second), (second, first), (first[:, :0], second), (torch.randn(9)[1:], first)):
            a, b = pair[0].clone() if pair[0].storage_offset() == 0 else pair[0], pair[1].clone()
            expected = a * factor, b * factor
            ops.patch_loss_scale_(a, b, torch.tensor(factor))
            assert torch.equal(a, expected[0]) and torch.equal(b, expected[1])
