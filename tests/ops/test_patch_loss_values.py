"""Patch losses: values and gradients."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import grad

import fastda
from fastda import reference, registry
from fastda.testing import error, tolerance
from fastda.tools import verify
from tests import common
from tests.ops.patch_loss import KINDS, arguments_of, calls, channels

DTYPES = verify.DTYPES


@calls
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(op, sizes, options, dtype):
    common.check_against_reference(op, arguments_of(op, sizes, options, dtype))


@calls
def test_first_and_second_derivatives(op, sizes, options):
    common.check_gradients(op, arguments_of(op, sizes, options))


def plain(kind, real, fake, real_weight, fake_weight, smoothing):
    """Mean discriminator loss in float64, written once more from the table of formulas."""
    right, wrong = 1 - smoothing / 2, smoothing / 2

    def soft(y):
        return torch.logaddexp(y, torch.zeros_like(y))

    def mean(terms, weight):
        weight = torch.ones_like(terms) if weight is None else weight.double().expand_as(terms)
        return torch.where(weight > 0, terms * weight, 0).sum() / weight.sum()

    s, t = (x[:, :1] - x[:, 1:] if kind == "softmax" else x for x in (real.double(), fake.double()))
    terms = {
        "softmax": (right * soft(-s) + wrong * soft(s), right * soft(t) + wrong * soft(-t)),
        "bce": (right * soft(-s) + wrong * soft(s), right * soft(t) + wrong * soft(-t)),
        "lsgan": ((s - right) ** 2, (t - wrong) ** 2),
        "hinge": ((1 - s).clamp(min=0), (1 + t).clamp(min=0)),
        "wgan": (-s, t),
    }[kind]
    return mean(terms[0], real_weight) + mean(terms[1], fake_weight)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    batches=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    masks=st.tuples(st.sampled_from([None, "mask", "weight"]), st.sampled_from([None, "mask", "weight"])),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
    layouts=st.tuples(st.sampled_from(verify.LAYOUTS), st.sampled_from(verify.LAYOUTS)),
    seed=st.integers(0, 2**31),
)
def test_any_shape_kind_and_weight(kind, dtype, batches, size, smoothing, masks, spread, layouts, seed):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def weight(n, how):
        if how is None:
            return None
        w = random(n, 1, *size).sub(0.3).relu().float()
        w[0, 0, 0, 0] = 1
        return w > 0 if how == "mask" else w

    smoothing = 0.0 if kind in ("hinge", "wgan") else smoothing
    logits = [spread * random(n, channels(kind), *size) for n in batches]
    if kind == "hinge":  # clear of its edge
        logits = [torch.where((x.abs() - 1).abs() < 0.05, x * 1.2, x) for x in logits]
    exact = [x.to(dtype).double().requires_grad_() for x in logits]
    given = [
        verify.lay_out(x.detach().to(dtype), layout).requires_grad_()
        for x, layout in zip(exact, layouts, strict=True)
    ]
    weights = [weight(n, how) for n, how in zip(batches, masks, strict=True)]
    options = {"label_smoothing": smoothing, "real_weight": weights[0], "fake_weight": weights[1]}
    loss = fastda.patch_discriminator_loss(*given, kind, **options)
    expected = plain(kind, *exact, *weights, smoothing)
    # A wgan loss is a difference, which can vanish; its terms are as large as the logits.
    assert error(loss, expected, spread).within(tolerance("patch_discriminator_loss", "value", dtype))
    bound = tolerance("patch_discriminator_loss", "grad", dtype).relative_l2
    for actual, exact_grad, n, w in zip(
        grad(loss, given), grad(expected, exact), batches, weights, strict=True
    ):
        share = torch.ones(n, 1, *size) if w is None else w.float()
        share = share / share.sum()
        # A slope is a sigmoid or a score less its target, a difference of terms of about one; and far out the
        # sigmoid has the relative error that rounding its argument makes.
        terms = 0.0 if kind in ("hinge", "wgan") else share.norm()
        # One patch may carry all of the gradient: against its norm, not its rms.
        floor = 2.0**-24 if dtype == torch.float16 else 0.0
        off = (actual.double() - exact_grad).norm()
        assert off <= bound * max(exact_grad.norm(), terms) + floor * size[0] * size[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_huge_logits_stay_finite(kind, dtype):
    size = 1e4
    values = torch.tensor([size, -size, size, -size, 100.0, -100.0, 89.0, -89.0, 1e-3, 0.0])
    real = torch.stack([values, values.roll(1)])[None, :, None].to(dtype)[:, : channels(kind)]
    fake = -real
    for a in (real, fake):
        a.requires_grad_()
    loss = fastda.patch_discriminator_loss(real, fake, kind, reduction="sum")
    exact = [x.detach().double().requires_grad_() for x in (real, fake)]
    expected = reference.patch_discriminator_loss(*exact, kind, reduction="sum")
    assert loss.isfinite()
    # A wgan loss is a difference of terms as large as the logits.
    assert error(loss, expected, size).within(tolerance("patch_discriminator_loss", "value", dtype))
    for actual, right in zip(grad(loss, (real, fake)), grad(expected, exact), strict=True):
        assert error(actual, right).within(tolerance("patch_discriminator_loss", "grad", dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_go_through_as_in_pytorch(kind, bad, dtype):
    """A clamp inside a fast exponential once turned NaN into a loss of 0.69 and a gradient of 0."""
    for channel, place in itertools.product(range(channels(kind)), (0, 17, 34)):
        logits = torch.randn(1, channels(kind), 5, 7).to(dtype)
        logits.view(channels(kind), 35)[channel, place] = bad
        other = torch.randn(1, channels(kind), 2, 2).to(dtype)
        for pair in ((logits, other), (other, logits)):
            given = [x.clone().requires_grad_() for x in pair]
            exact = [x.double().requires_grad_() for x in pair]
            loss = fastda.patch_discriminator_loss(*given, kind, reduction="sum")
            expected = reference.patch_discriminator_loss(*exact, kind, reduction="sum")
            assert error(loss, expected).nonfinite_equal, (loss, expected)
            assert loss.isnan() or not math.isnan(bad)
            for actual, right in zip(grad(loss, given), grad(expected, exact), strict=True):
                assert error(actual, right).nonfinite_equal, (actual, right)


def test_nan_in_images_and_features():
    a, b = torch.randn(2, 1, 5, 7), torch.randn(2, 1, 5, 7)
    a[1, 0, 2, 3] = math.nan
    a.requires_grad_()
    loss = fastda.self_regularization(a, b)
    assert loss.isnan()
    expected = grad(reference.self_regularization(a, b), a)[0]
    assert error(grad(loss, a)[0], expected).nonfinite_equal
    features, weight = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 1, 1)
    features[0, 1, 2, 3] = math.nan
    features.requires_grad_()
    loss = fastda.patch_head_discriminator_loss(features, torch.randn(1, 3, 2, 2), weight, None)
    got = grad(loss, features)[0]
    assert loss.isnan()
    assert got[0, :, 2, 3].isnan().all() and got.isnan().sum() == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_masked_patch_may_hold_anything(kind, bad):
    logits = torch.randn(2, channels(kind), 5, 7, dtype=torch.float64)
    weight = torch.rand(2, 1, 5, 7) + 0.1
    weight[1, 0, 2, 3] = 0
    clean = logits.clone().requires_grad_()
    logits[1, :, 2, 3] = bad
    logits.requires_grad_()
    for masks in (weight, weight > 0):
        results = [
            fastda.patch_discriminator_loss(
                x, x, kind, real_weight=masks, fake_weight=masks, return_accuracy=True
            )
            for x in (logits, clean)
        ]
        assert results[0] == results[1]
        got = grad(results[0][0], logits)[0]
        assert torch.equal(got, grad(results[1][0], clean)[0])
        assert not got[1, :, 2, 3].any()
        maps = fastda.patch_generator_loss(logits, kind, reduction="none", weight=masks)
        assert maps[1, 0, 2, 3] == 0


def test_a_whole_side_can_be_masked_out():
    real, fake = (torch.randn(2, 2, 3, 4, requires_grad=True) for _ in range(2))
    loss = fastda.patch_discriminator_loss(real, fake, reduction="sum", real_weight=torch.zeros(1))
    d_real, d_fake = grad(loss, (real, fake))
    assert not d_real.any() and d_fake.all()
    # A mean over no weight is 0 / 0, as in F.cross_entropy where every target is ignored.
    assert fastda.patch_discriminator_loss(real, fake, real_weight=torch.zeros(1)).isnan()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 9, 14), (2, 0, 3), (2, 3, 0)])
def test_nothing_to_reduce(kind, shape):
    empty = torch.randn(shape[0], channels(kind), *shape[1:], requires_grad=True)
    other = torch.zeros(1, channels(kind), 1, 1)
    for reduction in registry.REDUCTIONS:
        loss = fastda.patch_discriminator_loss(empty, other, kind, reduction=reduction)
        expected = reference.patch_discriminator_loss(empty, other, kind, reduction=reduction)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        assert grad(loss, empty)[0].shape == empty.shape
    maps = fastda.patch_discriminator_loss(empty, other, kind, reduction="none")
    assert maps[0].shape == (shape[0], 1, *shape[1:])
    head = torch.randn(shape[0], 3, *shape[1:], requires_grad=True)
    weight = torch.randn(channels(kind), 3, 1, 1, requires_grad=True)
    loss = fastda.patch_head_discriminator_loss(
        head, torch.randn(1, 3, 2, 2), weight, None, kind, reduction="sum"
    )
    assert [g.shape for g in grad(loss, (head, weight))] == [head.shape, weight.shape]


def test_pixels_are_paired_channel_first():
    """A logit belongs with the other channel's at the same pixel, not with its neighbour in memory."""
    logits = torch.zeros(1, 2, 2, 3)
    logits[0, 1, 1, 2] = 50.0  # one pixel is certainly fake
    loss_as_fake = fastda.patch_discriminator_loss(torch.zeros(1, 2, 1, 1), logits, reduction="none")[1]
    expected = torch.full((1, 1, 2, 3), math.log(2))
    expected[0, 0, 1, 2] = 0
    torch.testing.assert_close(loss_as_fake, expected)
    _, right, _ = fastda.patch_discriminator_loss(logits, torch.zeros(1, 2, 1, 1), return_accuracy=True)
    assert right == 0  # no pixel is more likely real than fake
    target = torch.ones(1, 2, 3, dtype=torch.long)
    logits = torch.randn(1, 2, 2, 3)
    maps = fastda.patch_discriminator_loss(logits[:0], logits, reduction="none")[1]
    torch.testing.assert_close(maps[:, 0], F.cross_entropy(logits, target, reduction="none"))


@pytest.mark.parametrize("kind", KINDS)
def test_accuracies_count_patches_on_their_side(kind):
    middle = 0.5 if kind == "lsgan" else 0.0
    scores = torch.tensor([2.0, 1.0, 3.0, -4.0]).view(1, 1, 2, 2) + middle
    logits = torch.cat([scores, torch.zeros_like(scores)], 1) if kind == "softmax" else scores
    _, real, fake = fastda.patch_discriminator_loss(logits, logits, kind, return_accuracy=True)
    assert (real, fake) == (0.75, 0.25)
    weight = torch.tensor([1.0, 0.0, 0.0, 3.0]).view(1, 1, 2, 2)
    _, real, fake = fastda.patch_discriminator_loss(
        logits, logits, kind, return_accuracy=True, real_weight=weight, fake_weight=weight
    )
    assert (real, fake) == (0.25, 0.75)
    assert not real.requires_grad and real.dtype == torch.float32


def test_sums_of_half_precision_do_not_overflow():
    logits = torch.zeros(512, 2, 9, 14, dtype=torch.float16, requires_grad=True)
    loss = fastda.patch_discriminator_loss(logits, logits, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.item(), 2 * 512 * 126 * math.log(2), rtol=1e-6, atol=0)
    assert grad(loss, logits)[0].dtype == torch.float16


def test_two_classes_are_one_channel_of_the_head():
    real, fake = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(3, 5, 3, 4, dtype=torch.float64)
    weight, bias = torch.randn(2, 5, 1, 1, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    weight.requires_grad_(), bias.requires_grad_()
    loss = fastda.patch_head_discriminator_loss(real, fake, weight, bias)
    d_weight, d_bias = grad(loss, (weight, bias))
    assert torch.equal(d_weight[0], -d_weight[1]) and d_bias[0] == -d_bias[1]
    # bce has the sign of a real score, softmax that of a fake one.
    one = fastda.patch_head_discriminator_loss(
        real, fake, weight[:1] - weight[1:], bias[:1] - bias[1:], "bce"
    )
    torch.testing.assert_close(loss, one)
