"""Every Triton kernel in Triton's interpreter, on CPU tensors, against the float64 reference.

tests/triton/test_triton.py runs this file in a process of its own: Triton decides to interpret when imported.
By hand: TRITON_INTERPRET=1 python -m pytest tests/triton/triton_interpreted.py
"""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

import fastda
import fastda.triton
from fastda import reference, testing, verify
from fastda.triton import common, patch_loss, refiner_conv
from tests.conformance import edges

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KINDS = ("softmax", "bce", "lsgan", "hinge", "wgan")
REDUCTIONS = ("mean", "sum", "batchmean")
LAST = torch.channels_last

assert common.INTERPRETED, "run with TRITON_INTERPRET=1"


def wide(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def strided(x):
    """The values of x with gaps between rows, columns and images."""
    return F.pad(x, (1, 2, 1, 0))[..., 1:, 1:-2] if x.dim() > 1 else F.pad(x, (0, 1))[:-1]


def layouts(x):
    return {"contiguous": x, "channels_last": x.contiguous(memory_format=LAST), "strided": strided(x)}


def matches(op, what, actual, expected, dtype):
    testing.assert_matches(op, what, actual, expected, dtype)


# -- what most inputs do not show


@pytest.mark.parametrize("check", edges.EVERYWHERE, ids=lambda check: check.__name__)
def test_edge(check):
    check(fastda.triton)


# -- gradient reversal ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (0, 4), (4, 0), (1, 1), (37, 53), (3, 5, 7, 2)])
def test_grad_reverse(shape, dtype):
    grad = torch.randn(shape).to(dtype)
    grads = [grad, grad.t().contiguous().t()] if grad.dim() == 2 else [grad]
    grads += list(layouts(grad).values()) if grad.dim() == 4 else []
    for g in grads:
        scales = [torch.tensor(0.7), torch.tensor(-0.3, dtype=torch.float64)]
        scales += [torch.randn(shape[0], 2)[:, 0]] if shape else []
        for scale in scales:
            out = fastda.triton.grad_reverse_backward(g, scale)
            factor = scale.double().view(-1, *(1 for _ in shape[1:])) if scale.dim() else scale.double()
            assert out.dtype == dtype
            matches("grad_reverse", "grad", out, -factor * g.double(), dtype)


# -- patch losses --------------------------------------------------------------------------------------------


def discriminator_reference(real, fake, kind, **options):
    real, fake = real.double().requires_grad_(), fake.double().requires_grad_()
    loss, *accuracies = reference.patch_discriminator_loss(real, fake, kind, return_accuracy=True, **options)
    return (loss.detach(), *accuracies, *torch.autograd.grad(loss, (real, fake)))


def check_discriminator(
    real, fake, kind, reduction="mean", smoothing=0.0, real_weight=None, fake_weight=None
):
    def expanded(weight, logits):
        return (
            None if weight is None else weight.expand(logits.shape[0], 1, *logits.shape[2:]).to(wide(logits))
        )

    out = fastda.triton.patch_discriminator_loss(
        *(real, fake, expanded(real_weight, real), expanded(fake_weight, fake)),
        *(KINDS.index(kind), REDUCTIONS.index(reduction), smoothing, True, True),
    )
    options = dict(
        reduction=reduction, label_smoothing=smoothing, real_weight=real_weight, fake_weight=fake_weight
    )
    expected = discriminator_reference(real, fake, kind, **options)
    for what, o, e in zip(
        ("value", "value", "value", "real_logits", "fake_logits"), out, expected, strict=False
    ):
        matches("patch_discriminator_loss", what, o, e, o.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_patch_discriminator_loss(kind, dtype):
    c = 2 if kind == "softmax" else 1
    sizes = itertools.cycle([(1, 2, 1, 1), (3, 2, 9, 14), (2, 3, 37, 53), (4, 3, 1, 3)])
    smoothings = (0.0, 0.1) if kind in ("softmax", "bce", "lsgan") else (0.0,)
    formats = layouts(torch.ones(1, 1, 1, 1))
    for reduction, (smoothing, layout) in zip(
        itertools.cycle(REDUCTIONS), itertools.product(smoothings, formats), strict=False
    ):
        n, m, h, w = next(sizes)
        real, fake = torch.randn(n, c, h, w).to(dtype), torch.randn(m, c, h, w).to(dtype)
        weight = torch.rand(n, 1, h, 1) + 0.1
        weight[:, :, ::2] *= torch.rand(n, 1, 1, 1) > 0.5
        weight[0] = 0.5
        weighted = weight if smoothing or layout == "strided" else None
        check_discriminator(
            layouts(real)[layout], layouts(fake)[layout], kind, reduction, smoothing, weighted
        )


@pytest.mark.parametrize("kind", KINDS)
def test_programs_of_several_blocks(kind, monkeypatch):
    monkeypatch.setattr(patch_loss, "pieces", functools.partial(common.pieces, limit=2))
    monkeypatch.setattr(patch_loss, "BLOCK", 32)
    c = 2 if kind == "softmax" else 1
    real, fake = torch.randn(3, c, 9, 14), torch.randn(2, c, 9, 14)
    check_discriminator(real, fake, kind, real_weight=torch.rand(3, 1, 9, 14))
    a, b = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 7)
    loss, *_ = fastda.triton.self_regularization(a, b, None, 1.0, 1, True, True)
    matches("self_regularization", "value", loss, (a.double() - b.double()).abs().sum(), torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patch_generator_loss_and_map(kind, dtype):
    c = 2 if kind == "softmax" else 1
    for reduction, weighted in itertools.product(range(3), (False, True)):
        fake = strided(torch.randn(3, c, 9, 14)).to(dtype)
        weight = torch.rand(3, 1, 9, 14).sub(0.5).relu() if weighted else None
        loss, grad = fastda.triton.patch_generator_loss(fake, weight, KINDS.index(kind), reduction, True)
        exact = fake.double().requires_grad_()
        expected = reference.patch_generator_loss(exact, kind, reduction=REDUCTIONS[reduction], weight=weight)
        matches("patch_generator_loss", "value", loss, expected, torch.float32)
        (expected,) = torch.autograd.grad(expected, exact)
        matches("patch_generator_loss", "grad", grad, expected, torch.float32)
    for real, smoothing in itertools.product((True, False), (0.0, 0.1)):
        terms, accuracy, grad = fastda.triton.patch_loss_map(
            fake, weight, KINDS.index(kind), real, smoothing, True
        )
        exact = fake.double().requires_grad_()
        other = torch.zeros(1, c, 1, 1, dtype=torch.float64)
        sides = {"real_weight": weight} if real else {"fake_weight": weight}
        maps, *accuracies = reference.patch_discriminator_loss(
            *((exact, other) if real else (other, exact)),
            kind,
            reduction="none",
            label_smoothing=smoothing,
            return_accuracy=True,
            **sides,
        )
        (expected,) = torch.autograd.grad(maps[not real].sum(), exact)
        matches("patch_discriminator_loss", "value", terms, maps[not real], torch.float32)
        matches("patch_discriminator_loss", "value", accuracy, accuracies[not real], torch.float32)
        matches("patch_discriminator_loss", "grad", grad, expected, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits(kind):
    c = 2 if kind == "softmax" else 1
    extremes = torch.tensor([1e4, -1e4, 88.0, -88.0, 30.0, 1e-6, 0.0, -0.0])
    logits = torch.randn(1, c, 2, 8)
    logits[:, 0, 0] = extremes
    logits[:, -1, 1] = extremes.flip(0)
    check_discriminator(logits, -logits, kind)
    for bad in (float("nan"), float("inf"), -float("inf")):
        logits = torch.randn(1, c, 3, 5)
        logits[0, 0, 1, 2] = bad
        loss, _, _, grad, _ = fastda.triton.patch_discriminator_loss(
            logits, torch.zeros(1, c, 1, 1), None, None, KINDS.index(kind), 1, 0.0, True, True
        )
        expected, _, _, expected_grad, _ = discriminator_reference(
            logits, torch.zeros(1, c, 1, 1), kind, reduction="sum"
        )
        assert testing.error(loss, expected).nonfinite_equal, (bad, loss, expected)
        assert testing.error(grad, expected_grad).nonfinite_equal, (bad, grad, expected_grad)
        # A weight of zero takes the patch out, whatever it holds.
        weight = torch.ones(1, 1, 3, 5)
        weight[0, 0, 1, 2] = 0
        check_discriminator(logits, torch.zeros(1, c, 1, 1), kind, real_weight=weight)


def test_no_patches():
    for reduction, expected in enumerate((float("nan"), 0.0, float("nan"))):
        empty = torch.randn(0, 2, 9, 14)
        loss, accuracy, _, grad, _ = fastda.triton.patch_discriminator_loss(
            empty, torch.zeros(1, 2, 1, 1), None, None, 0, reduction, 0.0, True, False
        )
        assert grad.shape == empty.shape and accuracy.isnan()
        torch.testing.assert_close(loss, torch.tensor(expected) + torch.tensor(2.0).log(), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_self_regularization_and_refiner_loss(dtype):
    scale = 0.3
    for shape in ((), (5,), (3, 1, 35, 55), (2, 3, 9, 14)):
        a, b = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        pairs = [(a, b)]
        if a.dim() == 4:
            pairs += [
                (a, b.contiguous(memory_format=LAST)),
                (layouts(a)["channels_last"], layouts(b)["channels_last"]),
            ]
            pairs += [(strided(a), b)]
        for (x, y), (r, reduction) in itertools.product(pairs, enumerate(REDUCTIONS)):
            x64, y64 = x.double().requires_grad_(), y.double().requires_grad_()
            tensor = torch.tensor(scale, dtype=torch.float64) if r else None
            expected = reference.self_regularization(
                x64[None] if not shape else x64, y64[None] if not shape else y64, scale, reduction=reduction
            )
            grads = torch.autograd.grad(expected, (x64, y64))
            out = fastda.triton.self_regularization(x, y, tensor, 99.0 if r else scale, r, True, True)
            for what, o, e in zip(("value", "grad", "grad"), out, (expected, *grads), strict=False):
                matches("self_regularization", what, o, e, wide(x))
        if a.dim() == 4:
            fake = torch.randn(3, 2, 4, 5).to(dtype)
            exact = [t.double().requires_grad_() for t in (fake, a, b)]
            expected = reference.refiner_loss(*exact, scale, "softmax")
            out = fastda.triton.refiner_loss(fake, a, b, None, scale, 0, 0, True, True, True)
            expected = (expected, *torch.autograd.grad(expected, exact))
            for what, o, e in zip(
                ("value", "fake_logits", "refined", "synthetic"), out, expected, strict=False
            ):
                matches("refiner_loss", what, o, e, wide(a))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_patch_head_discriminator_loss(kind, dtype):
    classes = 2 if kind == "softmax" else 1
    smoothing = 0.1 if kind in ("softmax", "lsgan") else 0.0
    cases = [(1, 1, 1, 1, 1, "contiguous"), (3, 2, 32, 9, 14, "channels_last"), (1, 2, 37, 7, 11, "strided")]
    for (n, m, c, h, w, layout), (r, reduction) in zip(cases, enumerate(REDUCTIONS), strict=False):
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
        out = fastda.triton.patch_head_discriminator_loss(
            layouts(real)[layout], fake, weight, bias, KINDS.index(kind), r, smoothing, True, True, True
        )
        assert out[3].stride() == layouts(real)[layout].contiguous().stride() or layout == "channels_last"
        names = ("value", "value", "value", "real_features", "fake_features", "weight", "bias")
        for what, o, e in zip(names, out, (expected, *accuracies, *grads), strict=False):
            if what == "bias":  # a sum of slopes of both signs, about 1 each before the reduction's factor
                terms = h * w * (n + m) / (n if r == 2 else 1)
                bound = testing.tolerance("patch_head_discriminator_loss", "grad", wide(real))
                assert (o.double() - e).abs().max() <= bound.relative_l2 * terms
                continue
            matches("patch_head_discriminator_loss", what, o, e, o.dtype)


def test_scale_in_place():
    first, second = torch.randn(3, 700), torch.randn(2, 3, 5, 7).contiguous(memory_format=LAST)
    for factor in (1.0, -0.5):
        a, b = first.clone(), second.clone()
        fastda.triton.patch_loss_scale_(a, b, torch.tensor(factor))
        assert torch.equal(a, first * factor) and torch.equal(b, second * factor)


def test_what_is_not_needed_is_empty():
    logits, features = torch.randn(2, 2, 3, 4), torch.randn(2, 5, 3, 4)
    out = fastda.triton.patch_discriminator_loss(logits, logits, None, None, 0, 0, 0.0, False, True)
    assert out[3].numel() == 0 and out[4].shape == logits.shape
    weight = torch.randn(2, 5, 1, 1)
    out = fastda.triton.patch_head_discriminator_loss(
        features, features, weight, None, 0, 0, 0.0, False, True, False
    )
    assert [t.numel() for t in out[3:]] == [0, features.numel(), 0, 0]
    x, filters = torch.randn(2, 3, 4, 5), torch.randn(3, 3, 3, 3)
    assert [t.numel() for t in fastda.triton.conv_same_backward(x, x, filters, x, False, False, True)] == [
        0,
        0,
        3,
    ]
    out = fastda.triton.refiner_block_backward(
        x, x, x, x, filters, None, filters, False, False, False, True, False
    )
    assert [t.numel() for t in out] == [0, 0, 0, filters.numel(), 0]


# -- refiner convolutions ------------------------------------------------------------------------------------

# What a GPU runs, and what the interpreter prefers: blocks within one tap or across, one piece or several.
ROWS = ("interpreter", "half", "half gather", "ieee", "double")


def use_row(name, monkeypatch):
    def configuration(x, table, memory_format):
        return name, table[name]

    monkeypatch.setattr(refiner_conv, "configuration", configuration)


def conv_case(n, c, k, size, h, w, dtype, memory_format=torch.contiguous_format):
    x, residual, grad = (
        torch.randn(n, d, h, w).to(dtype).contiguous(memory_format=memory_format) for d in (c, k, k)
    )
    weight = (torch.randn(k, c, size, size) / (c * size * size) ** 0.5).to(dtype)
    return x, weight, torch.randn(k).to(dtype), residual, grad


def check_conv(x, weight, bias, residual, grad):
    """Against the reference, with the kernel's own ReLU gates: a gate that rounding flips is no error."""
    dtype = x.dtype
    for relu, b, r in ((False, None, None), (True, bias, residual)):
        y = fastda.triton.conv_same(x, weight, b, r, relu)
        exact = [t.double().requires_grad_() for t in (x, weight, bias)]
        before = reference.conv_same(exact[0], exact[1], None if b is None else exact[2])
        after = before.detach() + (0 if r is None else r.double())
        matches("conv_same", "value", y, after.relu() if relu else after, dtype)
        assert (
            y.stride()
            == torch.empty(y.shape).contiguous(memory_format=fastda._torch.memory_format(x)).stride()
        )
        gated = torch.where(y <= 0, 0, grad) if relu else grad
        expected = torch.autograd.grad(
            before, exact, gated.double(), allow_unused=True, materialize_grads=True
        )
        out = fastda.triton.conv_same_backward(
            grad, x, weight, y if relu else None, True, True, b is not None
        )
        for what, o, e in zip(
            ("x", "weight", "bias") if b is not None else ("x", "weight"), out, expected, strict=False
        ):
            matches("conv_same", what, o, e, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 1, 1), (2, 3, 5, 1, 7, 9), (1, 7, 4, 5, 3, 2), (2, 17, 33, 3, 6, 11)]
)
def test_conv_same(sizes, dtype):
    x, weight, bias, residual, grad = conv_case(*sizes, dtype)
    if dtype in (torch.float32, torch.bfloat16):
        check_conv(x, weight, bias, residual, grad)
    last = [t.contiguous(memory_format=LAST) for t in (x, weight, residual)]
    if dtype != torch.bfloat16:
        check_conv(last[0], last[1], bias, last[2], grad)
    check_conv(strided(x), weight.transpose(2, 3).contiguous().transpose(2, 3), bias, last[2], strided(grad))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("sizes", [(1, 32, 16, 3, 9, 13), (2, 5, 66, 3, 7, 5)])
def test_conv_same_with_the_blocks_of_a_gpu(sizes, name, monkeypatch):
    use_row(name, monkeypatch)
    for memory_format in (torch.contiguous_format if "gather" in name else LAST,):
        x, weight, bias, residual, grad = conv_case(*sizes, torch.float32, memory_format)
        y = fastda.triton.conv_same(x, weight, bias, residual, True)
        expected = reference.conv_same(
            *(t.double() for t in (x, weight, bias)), residual=residual.double(), relu=True
        )
        matches("conv_same", "value", y, expected, torch.float32)
        out = fastda.triton.conv_same_backward(grad, x, weight, y, True, True, True)
        exact = [t.double().requires_grad_() for t in (x, weight, bias)]
        gated = torch.where(y <= 0, 0, grad).double()
        for what, o, e in zip(
            ("x", "weight", "bias"),
            out,
            torch.autograd.grad(reference.conv_same(*exact), exact, gated),
            strict=False,
        ):
            matches("conv_same", what, o, e, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_refiner_block(dtype):
    for n, c, m, size, h, w, fmt in (
        (1, 1, 2, 3, 1, 1, LAST),
        (2, 5, 3, 3, 7, 9, LAST),
        (1, 16, 16, 3, 9, 13, torch.contiguous_format),
    ):
        x, weight1, bias1, _, _ = conv_case(n, c, m, size, h, w, dtype, fmt)
        _, weight2, bias2, _, grad = conv_case(n, m, c, size, h, w, dtype, fmt)
        y, inner = fastda.triton.refiner_block(x, weight1, bias1, weight2, bias2, True)
        none = fastda.triton.refiner_block(x, weight1, bias1, weight2, bias2, False)
        assert torch.equal(none[0], y) and none[1].numel() == 0
        exact = [t.double().requires_grad_() for t in (x, weight1, bias1, weight2, bias2)]
        # Both ReLUs take the kernel's gates, and the second convolution its rounded input.
        first = reference.conv_same(*exact[:3]) * (inner > 0)
        matches("conv_same", "value", inner, first, dtype)
        first = first + (inner.double() - first).detach()
        before = reference.conv_same(first, *exact[3:], residual=exact[0])
        matches("refiner_block", "value", y, before.relu(), dtype)
        expected = torch.autograd.grad(before * (y > 0), exact, grad.double())
        for kept in (inner, None):
            out = fastda.triton.refiner_block_backward(
                grad, x, kept, y, weight1, bias1, weight2, True, True, True, True, True
            )
            for what, o, e in zip(("x", "weight1", "bias1", "weight2", "bias2"), out, expected, strict=False):
                matches("refiner_block", what, o, e, dtype)


def test_nan_passes_the_gates():
    x, weight, bias, _, grad = conv_case(1, 3, 3, 3, 5, 6, torch.float32)
    x[0, 1, 2, 3] = float("nan")
    y = fastda.triton.conv_same(x, weight, bias, None, True)
    assert torch.equal(y.isnan(), reference.conv_same(x, weight, bias, relu=True).isnan())
    out = fastda.triton.conv_same_backward(grad, x, weight, y, True, True, True)
    gated = torch.where(y <= 0, 0, grad)
    matches("conv_same", "bias", out[2], gated.double().sum((0, 2, 3)), torch.float32)
    assert out[1].isnan().any()


# -- through the public functions ----------------------------------------------------------------------------

PUBLIC = (
    "grad_reverse",
    "patch_discriminator_loss",
    "self_regularization",
    "patch_head_discriminator_loss",
    "conv_same",
)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_function_against_the_reference(name):
    op = next(o for o in verify.OPERATORS if o.name == name)
    for i in range(len(op.options)):
        case = verify.Case(op, i, op.sizes[1], DTYPES[i % 4], verify.LAYOUTS[i % 2], "triton", "cpu")
        failed = [row for row in verify.check(case) if not row.passed]
        assert not failed, failed


def test_compiled_without_a_graph_break():
    x, weight, bias, _, _ = conv_case(2, 3, 3, 3, 5, 7, torch.float32)
    scale = torch.rand(2)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]

    def function(x, weight, bias):
        y = fastda.conv_same(
            fastda.refiner_block(x, weight, bias, weight, bias), weight, bias, residual=x, relu=True
        )
        return fastda.grad_reverse(y, scale).square().mean()

    with fastda.use_backend("triton"):
        expected = function(*inputs)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, expected)
    for g, e in zip(
        torch.autograd.grad(compiled, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(g, e)


def test_operators_are_what_they_declare():
    x, weight, _, _, grad = conv_case(2, 3, 3, 3, 5, 7, torch.float32)
    logits = torch.randn(2, 2, 3, 4)
    for name, arguments in (
        ("grad_reverse_backward", (x, torch.rand(2))),
        ("patch_discriminator_loss", (logits, logits, None, None, 0, 0, 0.1, True, False)),
        ("self_regularization", (x, x.contiguous(memory_format=LAST), None, 0.5, 0, True, False)),
        ("patch_loss_scale_", (x.clone(), logits.clone(), torch.tensor(2.0))),
        ("conv_same_backward", (grad, x, weight, None, True, True, False)),
    ):
        torch.library.opcheck(
            getattr(fastda.triton, name).op, arguments, test_utils=("test_schema", "test_faketensor")
        )


def test_empty_images():
    weight = torch.randn(4, 3, 3, 3)
    for shape in ((0, 3, 5, 6), (2, 3, 0, 6)):
        x, grad = torch.randn(shape), torch.randn(shape[0], 4, *shape[2:])
        y = fastda.triton.conv_same(x, weight, None, None, True)
        assert y.shape == grad.shape
        d_x, d_weight, d_bias = fastda.triton.conv_same_backward(grad, x, weight, y, True, True, True)
        assert d_x.shape == x.shape and not d_weight.any() and not d_bias.any()
        assert d_weight.shape == weight.shape and d_bias.shape == (4,)
