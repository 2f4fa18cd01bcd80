"""Where a kernel can be wrong and most inputs do not show it, for the raw operators of any route.

A check takes the operators (`torch.ops.fastda`, `fastda.triton`, those of the emulated device) and compares
with the reference in float64, or with what PyTorch's own conversions give.
"""

import itertools

import torch

from fastda import reference, testing
from fastda.registry import KINDS

LAST = torch.channels_last
EVERYWHERE, CPU = [], []  # checks for every route, and for the blocks and chunks of the CPU's kernels


def everywhere(check):
    EVERYWHERE.append(check)
    return check


def on_the_cpu(check):
    CPU.append(check)
    return check


def exactly(actual, expected):
    assert torch.equal(actual.double(), torch.as_tensor(expected, dtype=torch.float64).view(actual.shape))


def close(op, what, actual, expected, dtype=None):
    testing.assert_matches(op, what, actual, expected, dtype)


# -- losses


@everywhere
def hinge_at_its_margin(ops):
    """There PyTorch's slope is 0."""
    for dtype in (torch.float32, torch.float64):
        real = torch.tensor([1.0, 1.0, -1.0, 0.5], dtype=dtype).view(1, 1, 2, 2)
        fake = torch.tensor([-1.0, 1.0, 2.0, -1.0], dtype=dtype).view(1, 1, 2, 2)
        slopes = [[0, 0, -1, -1], [0, 1, 1, 0]]
        out = ops.patch_discriminator_loss(real, fake, None, None, "hinge", "sum", 0.0, True, True)
        exactly(out[0], 2.5 + 5)
        exactly(out[3], slopes[0])
        exactly(out[4], slopes[1])
        ones = torch.ones(1, 1, 1, 1, dtype=dtype)
        out = ops.patch_head_discriminator_loss(
            real, fake, ones, ones.view(1) * 0, "hinge", "sum", 0.0, True, True, True
        )
        exactly(out[3], slopes[0])
        exactly(out[4], slopes[1])
        exactly(out[6], 0)


@everywhere
def accuracies_around_the_threshold(ops):
    """A patch at the threshold itself is right for neither side."""
    values = torch.tensor([-1.0, -0.0, 0.0, 0.25, 0.5, 0.75, 1.0]).view(1, 1, 1, 7)
    for kind in KINDS:
        logits = torch.cat([values, values.flip(3) * 0], 1) if kind == "softmax" else values
        expected = reference.patch_discriminator_loss(
            logits.double(), logits.double(), kind, return_accuracy=True
        )
        out = ops.patch_discriminator_loss(logits, logits, None, None, kind, "sum", 0.0, False, False)
        for got, right in zip(out[1:3], expected[1:], strict=True):
            assert round(7 * got.item()) == round(7 * right.item()), kind


@everywhere
def terms_far_below_one(ops):
    """log(1 + exp(-y)) has the relative error of its exponential, however small it is."""
    logits = torch.arange(5.0, 60.0, 0.37).view(1, 1, 1, -1)
    terms, _, grad = ops.patch_loss_map(logits, None, "bce", True, 0.0, True)
    exact = torch.exp(-logits.double())
    torch.testing.assert_close(terms.double(), torch.log1p(exact), rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), -exact / (1 + exact), rtol=1e-5, atol=0)


@everywhere
def a_mean_over_no_weight(ops):
    """0 / 0 as a value, and patches that are taken out have no gradient all the same."""
    for kind in KINDS:
        real, fake = (torch.randn(2, 2 if kind == "softmax" else 1, 3, 5) for _ in range(2))
        out = ops.patch_discriminator_loss(
            real, fake, torch.zeros(2, 1, 3, 5), None, kind, "mean", 0.0, True, True
        )
        assert out[0].isnan() and not out[3].any() and out[4].isfinite().all(), kind


@everywhere
def softmax_of_infinite_logits(ops):
    values = torch.tensor([torch.inf, -torch.inf, 0.5])
    logits = torch.cartesian_prod(values, values).T.reshape(1, 2, 3, 3)
    for real in (True, False):
        exact = logits.double().requires_grad_()
        other = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
        pair = (exact, other) if real else (other, exact)
        expected = reference.patch_discriminator_loss(*pair, reduction="none")[0 if real else 1]
        (by_logits,) = torch.autograd.grad(expected.sum(), exact)
        terms, _, grad = ops.patch_loss_map(logits, None, "softmax", real, 0.0, True)
        for got, right in ((terms, expected.detach()), (grad, by_logits)):
            torch.testing.assert_close(got.double(), right, rtol=1e-6, atol=1e-6, equal_nan=True)


@everywhere
def l1_where_both_agree(ops):
    a, b = torch.tensor([1.0, 2.0, 3.0, 0.0, -1.0]), torch.tensor([1.0, 2.5, 2.0, -0.0, -1.0])
    loss, by_a, by_b = ops.self_regularization(a, b, None, 2.0, "sum", True, True)
    exactly(loss, 3.0)
    exactly(by_a, [0, -2, 2, 0, 0])
    exactly(by_b, [0, 2, -2, 0, 0])


@everywhere
def batchmean_divides_by_images(ops):
    for n, m in ((1, 3), (3, 1)):
        real, fake = torch.randn(n, 1, 3, 4), torch.randn(m, 1, 3, 4)
        exact = [t.double().requires_grad_() for t in (real, fake)]
        expected = reference.patch_discriminator_loss(*exact, "bce", reduction="batchmean")
        out = ops.patch_discriminator_loss(real, fake, None, None, "bce", "batchmean", 0.0, True, True)
        close("patch_discriminator_loss", "value", out[0], expected.detach())
        for got, right in zip(out[3:], torch.autograd.grad(expected, exact), strict=True):
            close("patch_discriminator_loss", "grad", got, right)
    for shape in ((5,), (1, 7), (7, 1), (3, 1, 2, 2)):
        a, b = torch.randn(shape), torch.randn(shape)
        out = ops.self_regularization(a, b, None, 3.0, "batchmean", True, False)
        close("self_regularization", "value", out[0], 3 * (a.double() - b.double()).abs().sum() / shape[0])
        close("self_regularization", "grad", out[1], 3 * (a.double() - b.double()).sign() / shape[0])


@everywhere
def sums_of_many_patches(ops):
    """More patches than a block, a chunk or a program takes at once, in images that none of them divides."""
    logits = [torch.randn(2, 2, 67, 67), torch.randn(1, 2, 3, 4)]
    weight = torch.rand(2, 1, 67, 67)
    exact = [t.double().requires_grad_() for t in logits]
    expected = reference.patch_discriminator_loss(
        *exact, reduction="sum", real_weight=weight, return_accuracy=True
    )
    out = ops.patch_discriminator_loss(*logits, weight, None, "softmax", "sum", 0.0, True, True)
    for got, right in zip(out[:3], expected, strict=True):
        close("patch_discriminator_loss", "value", got, right.detach(), torch.float32)
    for got, right in zip(out[3:], torch.autograd.grad(expected[0], exact), strict=True):
        close("patch_discriminator_loss", "grad", got, right)

    a, b = torch.randn(9001), torch.randn(9001)
    out = ops.self_regularization(a, b, None, 1.0, "sum", True, False)
    close("self_regularization", "value", out[0], (a.double() - b.double()).abs().sum())
    close("self_regularization", "grad", out[1], (a.double() - b.double()).sign())

    features = [torch.randn(1, 3, 67, 67), torch.randn(2, 3, 3, 4)]
    head, bias = torch.randn(2, 3, 1, 1), torch.randn(2)
    exact = [t.double().requires_grad_() for t in (*features, head, bias)]
    expected = reference.patch_head_discriminator_loss(*exact, reduction="sum")
    right = torch.autograd.grad(expected, exact)
    for layout in (torch.contiguous_format, LAST):
        given = [t.contiguous(memory_format=layout) for t in features]
        out = ops.patch_head_discriminator_loss(*given, head, bias, "softmax", "sum", 0.0, True, True, True)
        names = ("real_features", "fake_features", "weight", "bias")
        for name, got, of in zip(names, out[3:], right, strict=True):
            # Sums of slopes of both signs: against what they are sums of.
            if name in ("weight", "bias"):
                assert (got - of).abs().max() < 1e-6 * 67 * 67
            else:
                close("patch_head_discriminator_loss", name, got, of)


# -- layouts


def odd_strides(x):
    """`x` with what PyTorch leaves open: the strides of dimensions of size one."""
    for stride in (0, 1, 10**6):
        yield x.as_strided(
            x.shape, [stride if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)]
        )


@everywhere
def views_with_dimensions_of_size_one(ops):
    for shape in ((2, 1, 1, 1), (2, 1, 5, 1), (2, 1, 1, 5), (1, 1, 3, 4)):
        base = torch.randn(shape)
        for real in odd_strides(base):
            out = ops.patch_discriminator_loss(real, base, None, None, "bce", "sum", 0.0, True, False)
            close("patch_discriminator_loss", "grad", out[3], -torch.sigmoid(-base.double()))
        for grad in odd_strides(base):
            exactly(ops.grad_reverse_backward(grad, torch.tensor(2.0)), -2 * base)
            scale = torch.arange(1.0, 1 + shape[0])
            exactly(ops.grad_reverse_backward(grad, scale), -base * scale.view(-1, 1, 1, 1))
    for n, c, k, h, w in ((1, 1, 3, 5, 6), (2, 16, 1, 1, 8), (1, 16, 16, 8, 1)):
        weight, grad = torch.randn(k, c, 3, 3) / c**0.5, torch.randn(n, k, h, w)
        x = torch.randn(n, c, h, w)
        exact = [t.double().requires_grad_() for t in (x, weight)]
        expected = reference.conv_same(*exact)
        by_x, by_weight = torch.autograd.grad(expected, exact, grad.double())
        for layout in (torch.contiguous_format, LAST):
            dense = [t.contiguous(memory_format=layout) for t in (x, grad)]
            for x_, grad_, weight_ in zip(*(odd_strides(t) for t in (*dense, weight)), strict=True):
                close("conv_same", "value", ops.conv_same(x_, weight_, None, None, False), expected.detach())
                out = ops.conv_same_backward(grad_, x_, weight_, None, True, True, False)
                close("conv_same", "grad", out[0], by_x)
                close("conv_same", "weight", out[1], by_weight)


@everywhere
def one_scale_a_sample_in_any_order_of_dimensions(ops):
    grad, scale = torch.randn(3, 4, 5, 2), torch.tensor([0.5, -2.0, 3.0])
    right = -grad * scale.view(3, 1, 1, 1)
    for order in itertools.permutations(range(4)):
        back = [order.index(d) for d in range(4)]
        exactly(ops.grad_reverse_backward(grad.permute(order).contiguous().permute(back), scale), right)
    exactly(ops.grad_reverse_backward(torch.nn.functional.pad(grad, (1, 2))[..., 1:-2], scale), right)


# -- rounding to 16 bits


def every_value(dtype):
    """All bit patterns: subnormal numbers, infinities and NaN among them."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@everywhere
def rounding_to_16_bits(ops):
    """To nearest, ties to even, and to infinity past the largest, as PyTorch itself converts."""
    for dtype in (torch.bfloat16, torch.float16):
        values = every_value(dtype)
        for scale in (1.0, 1.5, 0.375):  # products that fit float32, many of them half between two values
            got = ops.grad_reverse_backward(values, torch.tensor(scale))
            torch.testing.assert_close(
                got, (values.float() * -scale).to(dtype), rtol=0, atol=0, equal_nan=True
            )
        # A NaN whose rounding would carry into its sign.
        nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
        assert ops.grad_reverse_backward(torch.ones(40, dtype=dtype), nan).isnan().all()
    # float32 sums of two 16-bit values, by the convolutions' last stage: one that turns contiguous images.
    for dtype, layout in itertools.product((torch.bfloat16, torch.float16), (torch.contiguous_format, LAST)):
        for channels in (16, 3):
            residual = every_value(dtype)[:: 7 if channels == 16 else 61]
            residual = residual[: len(residual) // (64 * channels) * 64 * channels].view(-1, channels, 8, 8)
            residual = residual.contiguous(memory_format=layout)
            zeros = torch.zeros_like(residual)
            bias = torch.tensor([2.0**-8, 16.0, 3.0, 2.0**-11] * 4).to(dtype)[:channels]
            weight = torch.zeros(channels, channels, 3, 3, dtype=dtype)
            got = ops.conv_same(zeros, weight, bias, residual, False)
            right = (residual.float() + bias.float().view(1, -1, 1, 1)).to(dtype)
            torch.testing.assert_close(got, right, rtol=0, atol=0, equal_nan=True)


# -- convolutions


def backward_matches(ops, n, c, k, kernel, h, w):
    x, grad = torch.randn(n, c, h, w), torch.randn(n, k, h, w)
    weight = torch.randn(k, c, kernel, kernel) / (c * kernel**2) ** 0.5
    exact = [t.double().requires_grad_() for t in (x, weight)]
    right = torch.autograd.grad(reference.conv_same(*exact), exact, grad.double())
    right += (grad.double().sum((0, 2, 3)),)
    for layout in (torch.contiguous_format, LAST):
        given = [t.contiguous(memory_format=layout) for t in (grad, x)]
        out = ops.conv_same_backward(*given, weight, None, True, True, True)
        for name, got, of in zip(("grad", "weight", "bias"), out, right, strict=True):
            # A bias sums numbers of both signs.
            terms = (n * h * w) ** 0.5 if name == "bias" else 0.0
            assert testing.error(got, of, terms).within(testing.tolerance("conv_same", name, torch.float32))


def gate_of(output, slope):
    """ReLU keeps a gradient where its output is positive or NaN; a leaky one multiplies at NaN."""
    return torch.where(output > 0, 1.0, slope) if slope else (~(output <= 0)).double()


@everywhere
def gradients_pass_where_the_output_is_nan(ops):
    for slope in (0.0, 0.25):
        check_gates(ops, slope)


def check_gates(ops, slope):
    for c, k, kernel, h, w in ((3, 5, 3, 6, 7), (17, 16, 3, 9, 8), (16, 16, 7, 8, 9)):
        x, grad, output = torch.randn(1, c, h, w), torch.randn(1, k, h, w), torch.randn(1, k, h, w)
        output[0, 1, 2], output[0, 2, :, 3] = torch.nan, -0.0
        weight = torch.randn(k, c, kernel, kernel) / (c * kernel**2) ** 0.5
        exact = [t.double().requires_grad_() for t in (x, weight)]
        masked = grad.double() * gate_of(output, slope)
        right = torch.autograd.grad(reference.conv_same(*exact), exact, masked)
        for layout in (torch.contiguous_format, LAST):
            given = [t.contiguous(memory_format=layout) for t in (grad, x)]
            gate = output.contiguous(memory_format=layout)
            out = ops.conv_same_backward(*given, weight, gate, True, True, True, False, slope)
            close("conv_same", "grad", out[0], right[0])
            close("conv_same", "weight", out[1], right[1])
            assert (out[2] - masked.sum((0, 2, 3))).abs().max() < 1e-5
    for c, m in ((3, 3), (16, 16)):
        x, grad, inner, output = (torch.randn(1, n, 8, 9) for n in (c, c, m, c))
        inner[0, 1, 2], output[0, 2, 5] = torch.nan, torch.nan
        weights = [torch.randn(*shape, 3, 3) / (9 * c) ** 0.5 for shape in ((m, c), (c, m))]
        exact = [w.double() for w in weights]
        masked = grad.double() * gate_of(output, slope)
        by_inner = torch.nn.functional.conv_transpose2d(masked, exact[1], padding=1) * gate_of(inner, slope)
        by_x = masked + torch.nn.functional.conv_transpose2d(by_inner, exact[0], padding=1)
        out = ops.refiner_block_backward(
            *(grad, x, inner, output, weights[0], None, weights[1], True, True, True, False, True),
            *(False, slope),
        )
        close("refiner_block", "grad", out[0], by_x)
        # A sum of gradients that are rounded themselves: by the size of what is summed, not of what is left.
        size = by_inner.square().sum((0, 2, 3)).mean().sqrt()
        bound = testing.tolerance("refiner_block", "bias1", torch.float32).max_over_rms
        assert (out[2] - by_inner.sum((0, 2, 3))).abs().max() <= bound * size
        assert (out[4] - masked.sum((0, 2, 3))).abs().max() < 1e-5


@everywhere
def a_leaky_relu_is_that_of_pytorch(ops):
    """By the convolutions' last stage, and by what reads its mask: zeros of both signs, infinities, NaN."""
    values = torch.tensor([1.0, -3.0, 0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-40, 3e38])
    for dtype, slope, channels in itertools.product((torch.float32, torch.bfloat16), (0.3, 2.0), (3, 16)):
        image = values.repeat(7 * channels)[: 64 * channels].view(1, channels, 8, 8).to(dtype)
        exact = image.clone().requires_grad_()
        right = torch.nn.functional.leaky_relu(exact, slope)
        (by_image,) = torch.autograd.grad(right, exact, torch.ones_like(right))
        weight = torch.eye(channels, dtype=dtype).view(channels, channels, 1, 1)
        for layout in (torch.contiguous_format, LAST):
            residual = image.contiguous(memory_format=layout)
            for size in (1, 3):
                zeros = torch.zeros(channels, channels, size, size, dtype=dtype)
                y = ops.conv_same(torch.zeros_like(residual), zeros, None, residual, True, False, slope)
                torch.testing.assert_close(y, right, rtol=0, atol=0, equal_nan=True)
            ones = torch.ones_like(residual)
            got = ops.conv_same_backward(ones, ones, weight, y, True, False, False, False, slope)[0]
            torch.testing.assert_close(got, by_image, rtol=0, atol=0)


@everywhere
def filter_gradients_of_many_pieces(ops):
    backward_matches(ops, 64, 3, 5, 3, 6, 7)


@on_the_cpu
def filter_gradients_of_many_chunks(ops):
    backward_matches(ops, 20, 16, 17, 7, 8, 9)
    backward_matches(ops, 24, 16, 17, 3, 33, 32)


@on_the_cpu
def images_wider_than_a_block(ops):
    backward_matches(ops, 1, 2, 3, 3, 4, 530)
    backward_matches(ops, 1, 16, 16, 7, 8, 1100)


@on_the_cpu
def nothing_of_an_earlier_call(ops):
    """Scratch memory is kept from call to call: NaN that a larger one left must not come back."""
    sizes = ((3, 5, 3, 13, 11), (33, 7, 3, 6, 9), (16, 17, 3, 13, 30), (17, 16, 3, 5, 7), (16, 17, 7, 10, 9))
    for c, k, kernel, h, w in sizes:
        weight = torch.randn(k, c, kernel, kernel)

        def leave_nan(c=c, k=k, h=h, w=w, weight=weight):
            x, grad = (torch.full((2, n, h + 9, w + 9), torch.nan) for n in (c, k))
            ops.conv_same_backward(grad, x, weight, None, True, True, True)

        x, grad = torch.randn(2, c, h, w), torch.randn(2, k, h, w)
        exact = weight.double().requires_grad_()
        (right,) = torch.autograd.grad(reference.conv_same(x.double(), exact), exact, grad.double())
        leave_nan()
        close(
            "conv_same",
            "weight",
            ops.conv_same_backward(grad, x, weight, None, False, True, False)[1],
            right,
        )
        leave_nan()
        backward_matches(ops, 2, c, k, kernel, h, w)


@on_the_cpu
def what_overflows_on_the_way(ops):
    """An odd value reaches the outputs whose filters touch it, whatever the kernel computes in between."""
    for kernel, value in itertools.product((3, 7), (torch.inf, torch.nan, -2e38, 3e37)):
        size = kernel + 9
        clean = torch.randn(1, 16, size, size)
        weight = torch.randn(16, 16, kernel, kernel) * 1e-3
        undisturbed = reference.conv_same(clean.double(), weight.double())
        for layout, row, column in itertools.product(
            (torch.contiguous_format, LAST), range(3, 10), range(3, 10)
        ):
            x = clean.clone()
            x[0, 5, row, column] = value
            y = ops.conv_same(x.contiguous(memory_format=layout), weight, None, None, False)
            touched = torch.zeros(size, size, dtype=torch.bool)
            half = kernel // 2
            touched[max(0, row - half) : row + half + 1, max(0, column - half) : column + half + 1] = True
            # A large number may be felt in the rounding of its tile.
            bound = 1e-6 * abs(value) if abs(value) < torch.inf else 1e-5
            assert (y - undisturbed)[0][:, ~touched].abs().max() < bound, (kernel, value, row, column)
            right = reference.conv_same(x.double(), weight.double())[0][:, touched]
            got = y[0][:, touched].double()
            torch.testing.assert_close(got, right, rtol=1e-3, atol=bound, equal_nan=True)


@on_the_cpu
def a_backward_in_bands_that_overflows(ops):
    """Only the last of its convolutions does: the input's gradient is right all the same."""
    n, c, h, w = 16, 16, 64, 16
    x, grad = torch.randn(n, c, h, w), torch.randn(n, c, h, w) * 1e-20
    weight1, weight2 = torch.rand(c, c, 3, 3) * 3e38, torch.randn(c, c, 3, 3)
    inner, y = torch.rand(n, c, h, w) + 1, torch.ones(n, c, h, w)
    out = ops.refiner_block_backward(grad, x, inner, y, weight1, None, weight2, *[True] * 5)
    exact_grad, pad = grad.double(), {"padding": 1}
    by_inner = torch.nn.functional.conv_transpose2d(exact_grad, weight2.double(), **pad)
    right = exact_grad + torch.nn.functional.conv_transpose2d(by_inner, weight1.double(), **pad)
    assert right.abs().max() < 1e38
    close("refiner_block", "grad", out[0], right)
