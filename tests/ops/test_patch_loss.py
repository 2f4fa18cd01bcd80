import copy
import functools
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode

import fastda
from fastda import backend, nn, reference, verify
from fastda.ops import patch_loss as ops
from fastda.testing import error, tolerance
from tests import common
from tests.common import both_routes, needs_node

KINDS = verify.KINDS
DTYPES = verify.DTYPES
isa_independent = pytest.mark.isa_independent
native = pytest.mark.skipif(
    backend.info()["devices"]["cpu"]["serving"] != "cpp", reason="the reference serves this run"
)


def channels(kind):
    return 2 if kind == "softmax" else 1


def positive(draw, *sizes):
    return draw(1, 1, sizes[-2], 1).abs() + 0.1


# A call for every raw operator and every way into it: operator, sizes, options.
CALLS = [
    ("patch_discriminator_loss", (3, 2, 2, 3), {"kind": "softmax", "return_accuracy": True}),
    ("patch_discriminator_loss", (2, 3, 2, 3), {"kind": "softmax", "label_smoothing": 0.2}),
    ("patch_discriminator_loss", (2, 3, 2, 3), {"kind": "bce", "reduction": "none"}),
    ("patch_discriminator_loss", (2, 3, 2, 3), {"kind": "lsgan", "real_weight": positive}),
    ("patch_discriminator_loss", (2, 2, 2, 3), {"kind": "hinge", "reduction": "batchmean"}),
    ("patch_discriminator_loss", (2, 2, 2, 3), {"kind": "wgan", "reduction": "sum"}),
    ("patch_generator_loss", (2, 2, 3), {"kind": "softmax", "weight": positive}),
    ("patch_generator_loss", (2, 2, 3), {"kind": "bce", "reduction": "none"}),
    ("patch_generator_loss", (2, 2, 3), {"kind": "hinge"}),
    ("self_regularization", (2, 1, 2, 3), {"scale": 0.3, "reduction": "batchmean"}),
    ("self_regularization", (2, 1, 2, 3), {"scale": 0.3, "reduction": "none"}),
    ("refiner_loss", (2, 1, 3, 2), {"kind": "softmax", "reg_scale": 0.3}),
    ("refiner_loss", (2, 1, 3, 2), {"kind": "lsgan", "reg_scale": 0.3, "reduction": "sum"}),
    ("patch_head_discriminator_loss", (2, 1, 3, 2, 2), {"kind": "softmax", "return_accuracy": True}),
    ("patch_head_discriminator_loss", (1, 2, 3, 2, 2), {"kind": "hinge", "bias": None}),
    ("patch_head_discriminator_loss", (1, 2, 3, 2, 2), {"kind": "bce", "reduction": "none"}),
]
calls = pytest.mark.parametrize(
    ("op", "sizes", "options"), CALLS, ids=[f"{op}-{verify.describe(options)}" for op, _, options in CALLS]
)
# One a raw operator, where each call costs seconds.
few = pytest.mark.parametrize(
    ("op", "sizes", "options"),
    [CALLS[i] for i in (0, 2, 6, 9, 11, 13)],
    ids=[f"{CALLS[i][0]}-{verify.describe(CALLS[i][2])}" for i in (0, 2, 6, 9, 11, 13)],
)


def arguments_of(op, sizes, options, dtype=torch.float64):
    arguments = common.draw(op, sizes, dtype, **options)
    return {n: None if n in options and options[n] is None else v for n, v in arguments.items()}


# -- values and gradients ------------------------------------------------------------------------------------


@calls
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(op, sizes, options, dtype):
    common.check_against_reference(op, arguments_of(op, sizes, options, dtype))


@both_routes
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
    for reduction in verify.REDUCTIONS[:3]:
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


# -- the graph ----------------------------------------------------------------------------------------------


@both_routes
@calls
def test_a_graph_can_be_walked_twice(op, sizes, options):
    """The first backward hands its gradients over; what happens to them must not reach the second."""
    arguments = arguments_of(op, sizes, options)
    inputs = [arguments[n] for n in common.wanted(arguments)]

    def outputs(module):
        out = getattr(module, op)(**arguments)
        return [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]

    expected = outputs(reference)
    out = outputs(fastda)
    for factor in (1.0, -0.5, 3.0):
        weights = [torch.full_like(o, factor) for o in out]
        got = grad(out, inputs, weights, retain_graph=True)
        right = grad(expected, inputs, weights, retain_graph=True)
        torch.testing.assert_close(got, right)
        for g in got:
            g.fill_(math.nan)
    grad(out, inputs, [torch.ones_like(o) for o in out])
    with pytest.raises(RuntimeError, match="second time"):
        grad(out, inputs, [torch.ones_like(o) for o in out])


@both_routes
def test_a_loss_in_a_sum_of_losses():
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def total(module):
        d = module.patch_discriminator_loss(x, x.detach(), "softmax")
        return 0.5 * d + 2 * module.patch_generator_loss(x * 2) + x.square().mean()

    torch.testing.assert_close(grad(total(fastda), x), grad(total(reference), x))


@native
@both_routes
def test_gradients_are_computed_only_where_they_are_wanted():
    real, fake = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4, requires_grad=True)
    with torch.profiler.profile(record_shapes=True) as profile:
        assert fastda.patch_discriminator_loss(real, fake).requires_grad
        with torch.no_grad():
            assert not fastda.patch_discriminator_loss(real, fake).requires_grad
        assert not fastda.patch_discriminator_loss(real, fake.detach()).requires_grad
        with torch.inference_mode():
            assert not fastda.patch_generator_loss(fake).requires_grad
    asked = [e.concrete_inputs for e in profile.events() if e.name.startswith("fastda::")]
    assert [inputs[-2:] for inputs in asked[:3]] == [[False, True], [False, False], [False, False]]
    assert [inputs[-1] for inputs in asked[3:]] == [False]


@needs_node
@few
def test_several_gradients_at_once(op, sizes, options):
    arguments = arguments_of(op, sizes, options)
    inputs = [arguments[n] for n in common.wanted(arguments)]

    def batched(module):
        out = getattr(module, op)(**arguments)
        out = out[0] if isinstance(out, tuple) else out
        weights = torch.stack([torch.full_like(out, factor) for factor in (1.0, -0.5, 3.0)])
        return [
            grad(out, inputs, weights, is_grads_batched=True, retain_graph=True, allow_unused=True)
            for _ in range(2)
        ]

    torch.testing.assert_close(batched(fastda), batched(reference))


@needs_node
@isa_independent
@few
def test_compiled_autograd(op, sizes, options):
    arguments = arguments_of(op, sizes, options)
    inputs = [arguments[n] for n in common.wanted(arguments)]

    def loss(module):
        out = getattr(module, op)(**arguments)
        outs = out if isinstance(out, tuple) else (out,)
        return sum(3 * o.sum() for o in outs if o.requires_grad)

    expected = grad(loss(reference), inputs)
    ours = loss(fastda)
    for _ in range(2):
        for x in inputs:
            x.grad = None
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
            ours.backward(retain_graph=True)
        torch.testing.assert_close([x.grad for x in inputs], list(expected))


@both_routes
@isa_independent
def test_anomaly_mode_names_the_loss(route):
    x = torch.full((1, 1, 2, 2), math.nan, requires_grad=True)
    name = "LossBackward" if route == "node" else "_LossBackward"
    with (
        pytest.warns(UserWarning, match="patch_generator_loss"),
        pytest.raises(RuntimeError, match=f"Function '{name}' returned nan"),
        torch.autograd.detect_anomaly(check_nan=True),
    ):
        loss = fastda.patch_generator_loss(x, "bce")
        assert loss.grad_fn.name() == name
        loss.backward()


@both_routes
@isa_independent
def test_an_argument_changed_in_place_is_noticed_where_it_is_needed_again():
    """The first backward needs none of them: its gradients are of the values that the forward saw."""
    x = torch.randn(2, 2, 3, 4)
    y = (x.requires_grad_() * 1.0).detach().requires_grad_()
    expected = grad(fastda.patch_generator_loss(y), y)
    loss = fastda.patch_generator_loss(y)
    with torch.no_grad():
        y.mul_(2.0)
    torch.testing.assert_close(grad(loss, y, retain_graph=True), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad(loss, y)


@both_routes
@isa_independent
def test_an_error_in_the_reference_reaches_the_caller(monkeypatch):
    def broken(*arguments):
        raise ArithmeticError("broken on purpose")

    x = torch.randn(2, 2, 3, 4, requires_grad=True)
    loss = fastda.patch_generator_loss(x)
    monkeypatch.setitem(ops._OPERATORS, "patch_generator_loss", (1, broken))
    with pytest.raises(ArithmeticError, match="broken on purpose"):
        grad(loss, x, create_graph=True)


@native
def test_head_runs_as_one_operator():
    """So that logits, and their gradients, are nowhere to be materialised."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    features = torch.randn(2, 5, 3, 4, requires_grad=True)
    weight = torch.randn(2, 5, 1, 1, requires_grad=True)
    with Names():
        fastda.patch_head_discriminator_loss(features, features.detach(), weight, None)
    assert [name for name in seen if "detach" not in name] == ["fastda.patch_head_discriminator_loss.default"]


@both_routes
def test_a_scale_changed_after_forward_does_not_reach_the_gradient():
    scale = torch.tensor(0.3)
    a, b = torch.randn(2, 1, 3, 4, requires_grad=True), torch.randn(2, 1, 3, 4)
    loss = fastda.self_regularization(a, b, scale, reduction="sum")
    scale.fill_(7.0)
    assert torch.equal(grad(loss, a)[0], 0.3 * (a - b).sign())


@both_routes
def test_checkpointing_recomputes_the_loss():
    x = torch.randn(2, 2, 3, 4, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        saved = fastda.patch_generator_loss(x * 2)
    expected = grad(reference.patch_generator_loss(x * 2), x)
    for _ in range(2):
        torch.testing.assert_close(grad(saved, x, retain_graph=True), expected)
    loss = torch.utils.checkpoint.checkpoint(fastda.patch_generator_loss, x * 2, use_reentrant=False)
    torch.testing.assert_close(grad(loss, x), grad(reference.patch_generator_loss(x * 2), x))


@isa_independent
def test_autocast():
    d = nn.PatchDiscriminator.gaze()
    images = torch.randn(4, 1, 35, 55)
    with torch.autocast("cpu", torch.bfloat16):
        logits = d(images)
        assert logits.dtype == torch.bfloat16
        loss = fastda.refiner_loss(logits, logits[:, :1], images[:, :, :9, :14], 0.5)
        head = fastda.patch_head_discriminator_loss(
            d.features(images).float(), d.features(images), d.head.weight, d.head.bias
        )
        plain_head = fastda.patch_discriminator_loss(logits, logits)
    assert loss.dtype == head.dtype == torch.float32
    torch.testing.assert_close(head, plain_head, rtol=1e-2, atol=1e-2)
    assert all(p.grad is None for p in d.parameters())
    head.backward()
    assert d.head.weight.grad.dtype == torch.float32


# -- torch's machinery ---------------------------------------------------------------------------------------


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
    check("patch_discriminator_loss", pair, other, None, weight, 0, 0, 0.1, True, True)
    check(
        "patch_discriminator_loss", scores.bfloat16(), scores.bfloat16(), None, None, 1, 1, 0.0, False, True
    )
    check("patch_generator_loss", other, weight, 0, 2, True)
    check("patch_loss_map", other, weight, 0, True, 0.0, True)
    check("self_regularization", a, b, None, 0.3, 0, True, True)
    check("self_regularization", a, b.contiguous(), torch.tensor(0.3), 0.0, 0, True, False)
    check("refiner_loss", other, a, b, None, 0.3, 0, 0, True, True, False)
    check("refiner_loss", scores.double(), a, b, torch.tensor(0.3), 0.0, 2, 2, False, True, True)
    check("patch_head_discriminator_loss", a, features, head, torch.randn(2), 0, 0, 0.1, True, True, True)
    check("patch_head_discriminator_loss", a, features, head[:1], None, 2, 1, 0.0, False, True, False)
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


# -- errors -------------------------------------------------------------------------------------------------

PAIR, SCORE, IMAGE = torch.zeros(8, 2, 3, 4), torch.zeros(8, 1, 3, 4), torch.zeros(8, 1, 9, 9)
HEAD, FEATURES = torch.zeros(2, 5, 1, 1), torch.zeros(8, 5, 3, 4)
DISCRIMINATOR = {"real_logits": PAIR, "fake_logits": PAIR}
GENERATOR, PIXELS = {"fake_logits": PAIR}, {"refined": IMAGE, "synthetic": IMAGE}
REFINER = {**GENERATOR, **PIXELS, "reg_scale": 1.0}
FUSED = {"real_features": FEATURES, "fake_features": FEATURES, "weight": HEAD, "bias": None}
ERRORS = [
    ("patch_discriminator_loss", {**DISCRIMINATOR, **wrong}, kind, message)
    for wrong, kind, message in [
        (
            {"kind": "gan"},
            ValueError,
            "kind must be one of softmax, bce, lsgan, hinge, wgan, got 'gan'",
        ),
        (
            {"reduction": "max"},
            ValueError,
            "reduction must be one of mean, sum, batchmean, none, got 'max'",
        ),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0 and 1, got 1.5"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be between 0 and 1, got -0.1"),
        (
            {"kind": "hinge", "label_smoothing": 0.1},
            ValueError,
            "kind='hinge' has no labels to smooth, got label_smoothing=0.1",
        ),
        (
            {"real_logits": SCORE},
            ValueError,
            "real_logits must be (N, 2, H, W) for kind='softmax', got (8, 1, 3, 4)",
        ),
        (
            {"kind": "bce"},
            ValueError,
            "real_logits must be (N, 1, H, W) for kind='bce', got (8, 2, 3, 4)",
        ),
        (
            {"fake_logits": PAIR[0]},
            ValueError,
            "fake_logits must be (N, 2, H, W) for kind='softmax', got (2, 3, 4)",
        ),
        (
            {"real_logits": PAIR.long()},
            TypeError,
            "real_logits must be float32, float64, bfloat16 or float16, got torch.int64",
        ),
        ({"real_logits": [1.0]}, TypeError, "real_logits must be a tensor, got list"),
        (
            {"fake_logits": PAIR.double()},
            TypeError,
            "fake_logits must have the dtype of real_logits, torch.float32, got torch.float64",
        ),
        (
            {"fake_logits": PAIR.to("meta")},
            ValueError,
            "fake_logits must be on the device of real_logits, cpu, got meta",
        ),
        (
            {"real_weight": torch.ones(8, 2, 3, 4)},
            ValueError,
            "real_weight must be broadcastable to (8, 1, 3, 4), got (8, 2, 3, 4)",
        ),
        (
            {"fake_weight": torch.ones(7, 1, 3, 4)},
            ValueError,
            "fake_weight must be broadcastable to (8, 1, 3, 4), got (7, 1, 3, 4)",
        ),
        (
            {"fake_weight": torch.ones(1, requires_grad=True)},
            ValueError,
            "fake_weight is a constant and must not require grad; pass fake_weight.detach() if that is meant",
        ),
        ({"real_weight": 1.0}, TypeError, "real_weight must be a tensor, got float"),
        (
            {"real_weight": torch.ones(1, device="meta")},
            ValueError,
            "real_weight must be on the device cpu, got meta",
        ),
        (
            {"real_weight": torch.ones(1, dtype=torch.complex64)},
            TypeError,
            "real_weight must be real, got torch.complex64",
        ),
    ]
]
ERRORS += [
    (
        "patch_generator_loss",
        {**GENERATOR, "weight": torch.ones(5)},
        ValueError,
        "weight must be broadcastable to (8, 1, 3, 4), got (5,)",
    ),
    (
        "patch_generator_loss",
        {**GENERATOR, "kind": "wgan"},
        ValueError,
        "fake_logits must be (N, 1, H, W) for kind='wgan', got (8, 2, 3, 4)",
    ),
    (
        "self_regularization",
        {**PIXELS, "reduction": "max"},
        ValueError,
        "reduction must be one of mean, sum, batchmean, none, got 'max'",
    ),
    (
        "self_regularization",
        {**PIXELS, "synthetic": IMAGE[:1]},
        ValueError,
        "synthetic must have the shape of refined, (8, 1, 9, 9), got (1, 1, 9, 9)",
    ),
    (
        "self_regularization",
        {**PIXELS, "synthetic": IMAGE.to("meta")},
        ValueError,
        "synthetic must be on the device of refined, cpu, got meta",
    ),
    (
        "self_regularization",
        {**PIXELS, "refined": IMAGE.to(torch.complex64)},
        TypeError,
        "refined must be float32, float64, bfloat16 or float16, got torch.complex64",
    ),
    (
        "self_regularization",
        {**PIXELS, "scale": torch.ones((), requires_grad=True)},
        ValueError,
        "scale is a constant and must not require grad; pass scale.detach() if that is meant",
    ),
    (
        "self_regularization",
        {**PIXELS, "scale": torch.ones(8)},
        ValueError,
        "scale must be a float or a 0-dim tensor, got shape (8,)",
    ),
    (
        "self_regularization",
        {**PIXELS, "scale": torch.tensor(1)},
        TypeError,
        "scale must be a float or a floating-point tensor, got torch.int64",
    ),
    (
        "self_regularization",
        {**PIXELS, "scale": "1"},
        TypeError,
        "scale must be a float or a 0-dim tensor, got str",
    ),
    (
        "refiner_loss",
        {**REFINER, "reduction": "none"},
        ValueError,
        "reduction must be one of mean, sum, batchmean, got 'none'",
    ),
    (
        "refiner_loss",
        {**REFINER, "reg_scale": None},
        TypeError,
        "reg_scale must be a float or a 0-dim tensor, got NoneType",
    ),
    (
        "refiner_loss",
        {**REFINER, "refined": IMAGE.to("meta"), "synthetic": IMAGE.to("meta")},
        ValueError,
        "refined must be on the device of fake_logits, cpu, got meta",
    ),
    (
        "patch_head_discriminator_loss",
        {**FUSED, "real_features": FEATURES[0]},
        ValueError,
        "real_features must be (N, C, H, W), got (5, 3, 4)",
    ),
    (
        "patch_head_discriminator_loss",
        {**FUSED, "fake_features": FEATURES[:, :3]},
        ValueError,
        "fake_features must have the 5 channels of real_features, got (8, 3, 3, 4)",
    ),
    (
        "patch_head_discriminator_loss",
        {**FUSED, "weight": HEAD[:1]},
        ValueError,
        "weight must be (2, 5, 1, 1) for kind='softmax', got (1, 5, 1, 1)",
    ),
    (
        "patch_head_discriminator_loss",
        {**FUSED, "bias": torch.zeros(3)},
        ValueError,
        "bias must be (2,) for kind='softmax', got (3,)",
    ),
    (
        "patch_head_discriminator_loss",
        {**FUSED, "weight": HEAD.double()},
        TypeError,
        "weight must have the dtype of real_features, torch.float32, got torch.float64",
    ),
]


@isa_independent
@pytest.mark.parametrize(("op", "arguments", "kind", "message"), ERRORS)
def test_one_clear_error(op, arguments, kind, message):
    common.check_error(getattr(fastda, op), arguments, kind, f"{op}: {message}")


@native
@isa_independent
def test_raw_operators_refuse_what_does_not_fit():
    """Called past the public functions, they check before they touch memory."""
    raw, pair, score, image = (
        torch.ops.fastda,
        torch.zeros(2, 2, 3, 4),
        torch.zeros(2, 1, 3, 4),
        torch.zeros(5),
    )
    features = torch.zeros(2, 3, 4, 5)
    for call in (
        lambda: raw.patch_generator_loss(score, None, 0, 0, True),
        lambda: raw.patch_generator_loss(pair[0], None, 0, 0, True),
        lambda: raw.patch_generator_loss(pair.long(), None, 0, 0, True),
        lambda: raw.patch_generator_loss(pair, pair, 0, 0, True),
        lambda: raw.patch_generator_loss(pair, score.double(), 0, 0, True),
        lambda: raw.patch_discriminator_loss(pair, pair.double(), None, None, 0, 0, 0.0, True, True),
        lambda: raw.patch_loss_map(image, None, 0, True, 0.0, True),
        lambda: raw.self_regularization(image, image[:4], None, 1.0, 0, True, True),
        lambda: raw.self_regularization(image, image.double(), None, 1.0, 0, True, True),
        lambda: raw.patch_head_discriminator_loss(
            features, features, torch.zeros(2, 4, 1, 1), None, 0, 0, 0.0, True, True, True
        ),
        lambda: raw.patch_head_discriminator_loss(
            features, features, torch.zeros(2, 3, 1, 1), torch.zeros(1), 0, 0, 0.0, True, True, True
        ),
        lambda: raw.patch_loss_scale_(image.half(), image, torch.tensor(2.0)),
    ):
        with pytest.raises(RuntimeError, match="must"):
            call()


# -- modules -------------------------------------------------------------------------------------------------


@isa_independent
@pytest.mark.parametrize(
    ("make", "image", "parameters", "answers"),
    [
        (nn.PatchDiscriminator.gaze, (1, 35, 55), 75_906, (2, 9, 14)),
        (nn.PatchDiscriminator.hand, (1, 224, 224), 178_050, (2, 7, 7)),
        (nn.PatchDiscriminator.patchgan, (3, 256, 256), 2_765_633, (1, 30, 30)),
        (lambda: nn.PatchDiscriminator.patchgan(6), (6, 256, 256), 2_768_705, (1, 30, 30)),
        (lambda: nn.PatchDiscriminator.gaze(kind="bce"), (1, 35, 55), 75_873, (1, 9, 14)),
    ],
)
def test_discriminators_have_the_published_size(make, image, parameters, answers):
    d = make()
    assert sum(p.numel() for p in d.parameters()) == parameters
    with torch.no_grad():
        assert d(torch.randn(2, *image)).shape == (2, *answers)


@isa_independent
def test_patchgan_sees_70_pixels():
    d = nn.PatchDiscriminator.patchgan(1, norm=None).double()
    x = torch.randn(1, 1, 256, 256, dtype=torch.float64, requires_grad=True)
    seen = grad(d(x)[0, 0, 15, 15], x)[0][0, 0] != 0
    assert seen.any(0).sum() == seen.any(1).sum() == 70


@isa_independent
def test_an_unknown_kind_of_discriminator():
    with pytest.raises(ValueError, match=r"PatchDiscriminator: kind must be one of softmax, .*, got 'gan'"):
        nn.PatchDiscriminator.gaze(kind="gan")


@pytest.mark.parametrize("kind", KINDS)
def test_loss_modules_call_their_functions(kind):
    real, fake = torch.randn(3, channels(kind), 4, 5), torch.randn(2, channels(kind), 4, 5)
    mask = torch.rand(3, 1, 4, 5) > 0.5
    loss = nn.PatchDiscriminatorLoss(kind, reduction="sum", return_accuracy=True)
    expected = fastda.patch_discriminator_loss(
        real, fake, kind, reduction="sum", real_weight=mask, return_accuracy=True
    )
    assert loss(real, fake, real_weight=mask) == expected
    images = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    for scale in (0.4, torch.tensor(0.4)):
        module = nn.RefinerLoss(scale, kind, reduction="batchmean")
        module = pickle.loads(pickle.dumps(copy.deepcopy(module)))
        expected = fastda.refiner_loss(fake, *images, 0.4, kind, reduction="batchmean")
        torch.testing.assert_close(module(fake, *images), expected)
        assert ("reg_scale" in module.state_dict()) == isinstance(scale, torch.Tensor)
    assert kind in repr(module) and kind in repr(loss)


@isa_independent
def test_loss_modules_check_their_options_when_made():
    for make, message in (
        (lambda: nn.PatchDiscriminatorLoss("gan"), "PatchDiscriminatorLoss: kind must be"),
        (lambda: nn.PatchDiscriminatorLoss(reduction="max"), "PatchDiscriminatorLoss: reduction must be"),
        (lambda: nn.RefinerLoss(1.0, reduction="none"), "RefinerLoss: reduction must be"),
        (lambda: nn.RefinerLoss(torch.ones(2)), "RefinerLoss: reg_scale must be"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def small_discriminator(kind):
    features = torch.nn.Sequential(torch.nn.Conv2d(1, 6, 3, 2, padding=1), torch.nn.Softplus())
    return nn.PatchDiscriminator(features, torch.nn.Conv2d(6, channels(kind), 1)).double()


@pytest.mark.parametrize("penalty", ["wgan-gp", "r1"])
@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused head"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_penalties_reach_every_parameter(kind, penalty, fused):
    """Second derivatives through loss and discriminator: create_graph, then backward into the parameters."""
    d = small_discriminator(kind)
    real, fake = torch.randn(2, 1, 7, 9, dtype=torch.float64), torch.randn(2, 1, 7, 9, dtype=torch.float64)

    def parameter_gradients(module):
        mix = (
            (0.3 * real + 0.7 * fake).requires_grad_()
            if penalty == "wgan-gp"
            else real.clone().requires_grad_()
        )
        if fused:
            loss = module.patch_head_discriminator_loss(
                d.features(mix), d.features(fake), d.head.weight, d.head.bias, kind, reduction="sum"
            )
        else:
            loss = module.patch_generator_loss(d(mix), kind, reduction="sum")
        (slope,) = grad(loss, mix, create_graph=True)
        norm = slope.flatten(1).norm(dim=1)
        value = (norm - 1).square().mean() if penalty == "wgan-gp" else 0.5 * norm.square().mean()
        return grad(value + loss, list(d.parameters()), materialize_grads=True)

    torch.testing.assert_close(parameter_gradients(fastda), parameter_gradients(reference))


@pytest.mark.parametrize("kind", KINDS)
def test_200_steps_follow_the_loss_curve_of_the_reference(kind):
    """Adversarial training of a small refiner, float32, one seed, with the operators and with PyTorch."""

    def curve(module):
        torch.manual_seed(5)
        d = torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 3, 2, padding=1), torch.nn.Softplus(), torch.nn.Conv2d(8, channels(kind), 1)
        )
        r = torch.nn.Conv2d(1, 1, 3, padding=1)
        both = (torch.optim.SGD(d.parameters(), 0.02), torch.optim.SGD(r.parameters(), 0.02))
        losses = []
        for _ in range(200):
            synthetic, real = torch.rand(4, 1, 9, 9), torch.rand(4, 1, 9, 9).square()
            refined = r(synthetic)
            loss_r = module.refiner_loss(d(refined), refined, synthetic, 0.5, kind)
            both[1].zero_grad()
            loss_r.backward()
            both[1].step()
            loss_d = module.patch_discriminator_loss(d(real), d(refined.detach()), kind)
            both[0].zero_grad()
            loss_d.backward()
            both[0].step()
            losses.append([loss_r.item(), loss_d.item()])
        return torch.tensor(losses)

    fast, plain_torch = curve(fastda), curve(reference)
    assert (fast[0] - fast[-1]).abs().max() > 1e-3  # something was learned
    torch.testing.assert_close(fast, plain_torch, rtol=1e-3, atol=1e-4)


# -- the history of refined images ------------------------------------------------------------------------


def numbered(first, n, **options):
    return torch.arange(first, first + n, **options).view(n, 1, 1, 1).expand(n, 1, 2, 3).float()


def numbers(images):
    return images[:, 0, 0, 0].tolist()


@isa_independent
@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("capacity", [1, 3, 16])
def test_history_fills_then_mixes(n, capacity):
    history = nn.ImageHistoryBuffer(capacity, seed=1)
    stored, drawn, total = [], 0, 0
    for step in range(40):
        batch = numbered(step * n, n)
        full = len(history) == capacity
        got = history.query(batch)
        now = numbers(history.images)
        assert got.shape == batch.shape
        if not full:
            assert torch.equal(got, batch)
            stored += numbers(batch)[: capacity - len(stored)]
            assert now == stored
            continue
        old = [i for i in numbers(got) if i < step * n]
        new = [i for i in numbers(got) if i >= step * n]
        assert len(old) in {min(n // 2, capacity), min(n - n // 2, capacity)}
        assert set(old) <= set(stored) and len(set(old)) == len(old)
        assert len(set(new)) == len(new)
        # As many entries gave way, all to images that this query held back.
        arrived = [i for i in now if i not in stored]
        assert len(arrived) == len(old) and set(arrived) == set(numbers(batch)) - set(new)
        stored, drawn, total = now, drawn + len(old), total + n
    if capacity >= n:
        assert abs(drawn / total - 0.5) < 0.2
    assert len(history) == capacity


@isa_independent
def test_history_draws_and_replaces_every_entry_alike():
    history = nn.ImageHistoryBuffer(8, seed=3)
    history.query(numbered(0, 8))
    hits = torch.zeros(8)
    for _ in range(1500):
        before = numbers(history.images)
        history.query(numbered(100, 4))
        hits += torch.tensor([a != b for a, b in zip(before, numbers(history.images), strict=True)])
        history.images.copy_(numbered(0, 8))
    share = hits / hits.sum()
    assert (share - 1 / 8).abs().max() < 0.03


@isa_independent
def test_history_keeps_detached_copies():
    history = nn.ImageHistoryBuffer(4)
    batch = torch.randn(4, 1, 2, 3, requires_grad=True)
    image = batch * 2
    out = history.query(image)
    assert not out.requires_grad and not history.images.requires_grad
    with torch.no_grad():
        kept = history.images.clone()
        image.fill_(0)
        out.fill_(7)
    assert torch.equal(history.images, kept)


@isa_independent
def test_history_is_saved_loaded_and_repeats():
    runs = []
    for _ in range(2):
        history = nn.ImageHistoryBuffer(5, seed=11)
        runs.append([history.query(numbered(3 * i, 3)) for i in range(6)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    history.double()
    other = nn.ImageHistoryBuffer(5, seed=0)
    other.load_state_dict(history.state_dict())
    assert other.images.dtype == torch.float64
    for i in range(4):
        batch = numbered(100 + 3 * i, 3).double()
        assert torch.equal(history.query(batch), other.query(batch))
    twin = copy.deepcopy(history)
    assert torch.equal(twin.query(batch), history.query(batch))
    module = torch.nn.Sequential(nn.ImageHistoryBuffer(5))
    module.load_state_dict({"0.images": history.images}, strict=False)
    assert len(module[0]) == 5


@isa_independent
def test_history_follows_the_device():
    history = nn.ImageHistoryBuffer(2, seed=0)
    history.query(numbered(0, 2))
    assert history.to("meta").query(torch.empty(3, 1, 2, 3, device="meta")).device.type == "meta"


@isa_independent
@pytest.mark.parametrize(
    ("batch", "kind", "message"),
    [
        (torch.zeros(2, 3, 4), ValueError, "batch must be (N, C, H, W), got (2, 3, 4)"),
        (
            torch.zeros(2, 1, 3, 3),
            ValueError,
            "batch must hold images of shape (1, 2, 3), got (2, 1, 3, 3)",
        ),
        (torch.zeros(2, 1, 2, 3).double(), TypeError, "batch must be torch.float32, got torch.float64"),
        (torch.zeros(2, 1, 2, 3, device="meta"), ValueError, "batch must be on cpu, got meta"),
    ],
)
def test_history_refuses_what_does_not_fit(batch, kind, message):
    history = nn.ImageHistoryBuffer(4)
    history.query(numbered(0, 4))
    common.check_error(history.query, {"batch": batch}, kind, f"ImageHistoryBuffer: {message}")


@isa_independent
def test_history_needs_room():
    common.check_error(
        nn.ImageHistoryBuffer,
        {"capacity": 0},
        ValueError,
        "ImageHistoryBuffer: capacity must be at least 1, got 0",
    )
    common.check_error(
        nn.ImageHistoryBuffer,
        {"capacity": 1.5},
        TypeError,
        "ImageHistoryBuffer: capacity must be an int, got float",
    )
