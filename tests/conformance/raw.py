"""What the tests of the raw operators share: inputs, and results against the float64 reference."""

import torch
import torch.nn.functional as F

from fastda import _torch, reference, testing

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAST = torch.channels_last
# TF32 keeps 10 bits of the factors' mantissas: each product is off by 2^-11 of itself, on average less.
TF32 = testing.Tolerance(5e-4, 5e-3)


def strided(x):
    """The values of x with gaps between rows, columns and images."""
    return F.pad(x, (1, 2, 1, 0))[..., 1:, 1:-2] if x.dim() > 1 else F.pad(x, (0, 1))[:-1]


def layouts(x):
    return {"contiguous": x, "channels_last": x.contiguous(memory_format=LAST), "strided": strided(x)}


def matches(op, what, actual, expected, dtype, tf32=False, terms=0.0):
    """`terms`: the size of what is summed, where terms may cancel."""
    error, bound = (
        testing.error(actual, expected, terms),
        TF32 if tf32 else testing.tolerance(op, what, dtype),
    )
    assert error.within(bound), (op, what, error, bound)


def wide(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def discriminator_reference(real, fake, kind, **options):
    real, fake = real.double().requires_grad_(), fake.double().requires_grad_()
    loss, *accuracies = reference.patch_discriminator_loss(real, fake, kind, return_accuracy=True, **options)
    return (loss.detach(), *accuracies, *torch.autograd.grad(loss, (real, fake)))


def check_discriminator(
    ops, real, fake, kind, reduction="mean", smoothing=0.0, real_weight=None, fake_weight=None
):
    def expanded(weight, logits):
        return (
            None if weight is None else weight.expand(logits.shape[0], 1, *logits.shape[2:]).to(wide(logits))
        )

    out = ops.patch_discriminator_loss(
        *(real, fake, expanded(real_weight, real), expanded(fake_weight, fake)),
        *(kind, reduction, smoothing, True, True),
    )
    options = dict(
        reduction=reduction, label_smoothing=smoothing, real_weight=real_weight, fake_weight=fake_weight
    )
    expected = discriminator_reference(real, fake, kind, **options)
    names = ("value", "value", "value", "real_logits", "fake_logits")
    # A mean has terms of about one, which may cancel; a sum has as many as there are patches.
    patches = sum(x.numel() // x.shape[1] for x in (real, fake))
    terms = {"mean": 1, "sum": patches, "batchmean": patches / real.shape[0]}[reduction]
    # lsgan's slope is a difference of logit and target, which may cancel.
    targets = {"real_logits": (real, 1 - smoothing / 2), "fake_logits": (fake, smoothing / 2)}
    for what, o, e in zip(names, out, expected, strict=True):
        size = terms if what == "value" else 0.0
        if kind == "lsgan" and what != "value":
            logits, target = targets[what]
            size = (e / (logits.double() - target)).nan_to_num(0.0).abs().max().item()
        matches("patch_discriminator_loss", what, o, e, wide(real), terms=size)
    return out


def conv_case(n, c, k, size, h, w, dtype, memory_format=torch.contiguous_format):
    x, residual, grad = (
        torch.randn(n, d, h, w).to(dtype).contiguous(memory_format=memory_format) for d in (c, k, k)
    )
    weight = (torch.randn(k, c, size, size) / (c * size * size) ** 0.5).to(dtype)
    return x, weight, torch.randn(k).to(dtype), residual, grad


def check_conv(ops, x, weight, bias, residual, grad, tf32=False):
    """Against the reference, with the kernel's own ReLU gates: a gate that rounding flips is no error."""
    dtype = x.dtype
    for relu, b, r in ((False, None, None), (True, bias, residual)):
        y = ops.conv_same(x, weight, b, r, relu, tf32)
        exact = [t.double().requires_grad_() for t in (x, weight, bias)]
        before = reference.conv_same(exact[0], exact[1], None if b is None else exact[2])
        after = before.detach() + (0 if r is None else r.double())
        matches("conv_same", "value", y, after.relu() if relu else after, dtype, tf32)
        assert y.stride() == torch.empty(y.shape, memory_format=_torch.memory_format(x)).stride()
        gated = torch.where(y <= 0, 0, grad) if relu else grad
        expected = torch.autograd.grad(
            before, exact, gated.double(), allow_unused=True, materialize_grads=True
        )
        out = ops.conv_same_backward(grad, x, weight, y if relu else None, True, True, b is not None, tf32)
        names = ("x", "weight", "bias") if b is not None else ("x", "weight")
        for what, o, e in zip(names, out, expected, strict=False):
            matches("conv_same", what, o, e, dtype, tf32)


def block_case(n, c, m, size, size2, h, w, dtype, memory_format):
    x, weight1, bias1, _, _ = conv_case(n, c, m, size, h, w, dtype, memory_format)
    _, weight2, bias2, _, grad = conv_case(n, m, c, size2, h, w, dtype, memory_format)
    return x, weight1, bias1, weight2, bias2, grad


def check_block(ops, x, weight1, bias1, weight2, bias2, grad, tf32=False):
    dtype = x.dtype
    y, inner = ops.refiner_block(x, weight1, bias1, weight2, bias2, True, tf32)
    none = ops.refiner_block(x, weight1, bias1, weight2, bias2, False, tf32)
    assert torch.equal(none[0], y) and none[1].numel() == 0
    exact = [t.double().requires_grad_() for t in (x, weight1, bias1, weight2, bias2)]
    # Both ReLUs take the kernel's gates, and the second convolution its rounded input.
    first = reference.conv_same(*exact[:3]) * (inner > 0)
    matches("conv_same", "value", inner, first, dtype, tf32)
    first = first + (inner.double() - first).detach()
    before = reference.conv_same(first, *exact[3:], residual=exact[0])
    matches("refiner_block", "value", y, before.relu(), dtype, tf32)
    expected = torch.autograd.grad(before * (y > 0), exact, grad.double())
    for kept in (inner, None):
        out = ops.refiner_block_backward(
            grad, x, kept, y, weight1, bias1, weight2, True, True, True, True, True, tf32
        )
        for what, o, e in zip(("x", "weight1", "bias1", "weight2", "bias2"), out, expected, strict=True):
            terms = grad[:, 0].numel() ** 0.5 if what.startswith("bias") else 1.0
            matches("refiner_block", what, o, e, dtype, tf32, terms=terms)
    return y, inner


def norm_case(n, c, h, w, dtype, memory_format=torch.contiguous_format, mean=0.0):
    """x, weight, bias, residual, and the gradient of the result."""
    images = (torch.randn(n, c, h, w, dtype=torch.float64) for _ in range(3))
    x, residual, grad = (t.to(dtype).contiguous(memory_format=memory_format) for t in images)
    weight, bias = (torch.randn(c).to(wide(x)) for _ in range(2))
    return x + mean, weight, bias, residual, grad


def check_norm(ops, x, weight, bias, residual, grad, per_image=False, stored=None, slope=0.1):
    """Values and all gradients; where an activation's slope changes is told by the result itself."""
    op = reference.instance_norm_act if per_image else reference.batch_norm_act
    y, mean, variance = ops.norm_act(
        x, weight, bias, *(stored or (None, None)), residual, per_image, 1e-5, slope
    )
    out = ops.norm_act_backward(
        *(grad, x, weight, bias, *(stored or (mean, variance)), None if residual is None else y),
        *(per_image, stored is None, 1e-5, slope, True, True, True, True),
    )
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    options = {} if stored is None else {"training": False}
    values = [None if t is None else t.double() for t in (stored or (None, None))]
    normalized = op(*exact, *values, **options)
    with torch.no_grad():
        added = normalized + (0 if residual is None else residual.double())
        expected = added if slope is None else torch.where(added > 0, added, added * slope)
        passed = grad.double() if slope is None else torch.where(y > 0, grad, grad * slope).double()
    gradients = torch.autograd.grad(normalized, exact, passed)
    terms = x.numel() / x.shape[1]
    matches("batch_norm_act", "value", y, expected, x.dtype)
    for what, got, right, size in zip(
        ("x", "weight", "bias", "residual"),
        out,
        (*gradients, passed),
        (1.0, terms**0.5, terms**0.5, 0.0),
        strict=True,
    ):
        matches("batch_norm_act", what, got, right, x.dtype, terms=size)
    return y, mean, variance, *out
