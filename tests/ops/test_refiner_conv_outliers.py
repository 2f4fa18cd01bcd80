"""Large finite values: what they cost the results beside them, and what they do not."""

import pytest
import torch
import torch.nn.functional as F

import fastda
from fastda import reference
from tests.ops.refiner_conv import CHANNELS_LAST

# (N, C, K, k, H, W, padding): tiles, panels, 5 x 5, 7 x 7, 11 x 11 and 2 x 2; from few channels.
SIZES = [
    (2, 20, 33, 3, 29, 27, 1),
    (1, 33, 18, 3, 8, 7, 1),
    (2, 18, 17, 3, 30, 27, 0),
    (2, 18, 17, 5, 14, 13, 2),
    (2, 18, 17, 5, 15, 13, 0),
    (1, 17, 20, 7, 13, 18, 3),
    (1, 16, 18, 11, 14, 13, 5),
    (2, 18, 33, 2, 12, 13, 1),
    (2, 3, 33, 3, 29, 27, 1),
    (2, 2, 17, 5, 14, 13, 2),
    (1, 3, 20, 7, 13, 18, 3),
]
VALUES = [1e2, 1e4, 1e6, 1e9, 1e20]
# The promise: rounding as of numbers this many times the largest of a window, or the usual one, the upper
# quartile of normal magnitudes.
MOST, USUAL = 256, 1.1503
ROUNDING = 2.0**-24


def draw(sizes, memory_format=torch.contiguous_format):
    n, c, k, kernel, h, w, padding = sizes
    x = torch.randn(n, c, h, w).contiguous(memory_format=memory_format)
    weight = torch.randn(k, c, kernel, kernel) * (c * kernel * kernel) ** -0.5
    size = [n, k, h + 2 * padding - kernel + 1, w + 2 * padding - kernel + 1]
    return x, weight, torch.randn(size).contiguous(memory_format=memory_format)


def results(convolution, x, weight, grad, padding):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = convolution(x, weight, padding=padding)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]


def exact(x, weight, grad, padding):
    return results(F.conv2d, x.double(), weight.double(), grad.double(), padding)


def windows_largest(x, kernel, padding):
    """The largest magnitude of each window, over all channels."""
    largest = F.pad(x.abs().amax(1, keepdim=True).double(), [padding] * 4)
    return F.max_pool2d(largest, kernel, 1)


def taps_products(x, grad, kernel, padding):
    """Of each tap: the sum of the largest magnitudes that meet there, the usual one at least."""
    largest = [t.abs().amax(1, keepdim=True).double().clamp_min(USUAL) for t in (x, grad)]
    x = F.pad(largest[0], [padding] * 4).clamp_min(USUAL)
    return F.conv2d(x.transpose(0, 1), largest[1].transpose(0, 1))[0, 0]


def places(sizes, image):
    """A corner of a tile that others share, the image's own corners, and its middle."""
    h, w = image.shape[2:]
    yield from {(0, 0), (h - 1, w - 1), (0, w - 1), (min(4, h - 1), min(4, w - 1)), (h // 2, w // 2)}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
def test_an_outlier_costs_the_results_beside_it_no_more_than_promised(sizes, value, memory_format):
    kernel, padding = sizes[3], sizes[6]
    x, weight, grad = draw(sizes, memory_format)
    per_output, per_input = weight.abs().sum((1, 2, 3)).double(), weight.abs().sum((0, 2, 3)).double()
    for name, image in {"x": x, "grad": grad}.items():
        for h, w in places(sizes, image):
            operands = {"x": x.clone(), "grad": grad.clone()}
            operands[name][-1, 1, h, w] = value
            arguments = operands["x"], weight, operands["grad"], padding
            got, right = results(fastda.conv2d, *arguments), exact(*arguments)
            y, d_x, d_weight = ((a.double() - b).abs() for a, b in zip(got, right, strict=True))
            own = windows_largest(operands["x"], kernel, padding)
            scale = per_output.view(1, -1, 1, 1) * (MOST * own.clamp_min(1.5 * USUAL) * ROUNDING)
            assert (y <= scale).all(), (name, h, w)
            own = windows_largest(operands["grad"], kernel, kernel - 1 - padding)
            scale = per_input.view(1, -1, 1, 1) * (MOST * own.clamp_min(1.5 * USUAL) * ROUNDING)
            assert (d_x <= scale).all(), (name, h, w)
            products = taps_products(operands["x"], operands["grad"], kernel, padding)
            assert (d_weight <= 16 * MOST * ROUNDING * products).all(), (name, h, w)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("value", VALUES[1:])
@pytest.mark.parametrize("channels", [1, None])
def test_what_does_not_see_an_outlier_is_as_if_it_were_not_there(sizes, value, channels):
    """To the rounding that it has without; of the filter, the other channels."""
    kernel, padding = sizes[3], sizes[6]
    x, weight, grad = draw(sizes)
    plain = [
        (a.double() - b).abs().max()
        for a, b in zip(
            results(fastda.conv2d, x, weight, grad, padding), exact(x, weight, grad, padding), strict=True
        )
    ]
    for name in ("x", "grad"):
        operands = {"x": x.clone(), "grad": grad.clone()}
        operands[name][0, :channels, 5, 4] = value
        arguments = operands["x"], weight, operands["grad"], padding
        errors = [
            (a.double() - b).abs()
            for a, b in zip(results(fastda.conv2d, *arguments), exact(*arguments), strict=True)
        ]
        seen = windows_largest(operands["x"], kernel, padding) >= value
        assert errors[0].masked_fill(seen, 0).max() <= 4 * plain[0]
        seen = windows_largest(operands["grad"], kernel, kernel - 1 - padding) >= value
        assert errors[1].masked_fill(seen, 0).max() <= 4 * plain[1]
        if channels == 1:
            others = errors[2][:, 1:] if name == "x" else errors[2][1:]
            assert others.max() <= 4 * plain[2]


@pytest.mark.parametrize("name", ["x", "grad"])
def test_a_block_keeps_the_promise_through_its_window_of_rows(name):
    """Its backward makes the gradient between its convolutions a few rows at a time."""
    shape = (2, 64, 64, 55)
    x, grad = torch.randn(shape), torch.randn(shape)
    weights = [torch.randn(64, 64, 3, 3) / 24 for _ in range(2)]

    def gradients(block, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, *weights)]
        y = block(leaves[0], leaves[1], None, leaves[2], None)
        return [y.detach().double(), *(t.double() for t in torch.autograd.grad(y, leaves, grad.to(dtype)))]

    def errors():
        got = gradients(fastda.refiner_block, torch.float32)
        own = gradients(reference.refiner_block, torch.float32)
        right = gradients(reference.refiner_block, torch.float64)
        return [((a - b).abs(), (c - b).abs()) for a, b, c in zip(got, right, own, strict=True)]

    (x if name == "x" else grad)[0, 5, 28, 20] = 1e6  # a tile's first pixel
    (y, y_torch), (d_x, d_x_torch), *_ = errors()
    # Two pixels each way see it, through both convolutions. Gates of ReLU may fall to either side.
    far = torch.ones(shape, dtype=torch.bool)
    far[0, :, 26:31, 18:23] = False
    assert y[far].max() <= 10 * y_torch[far].max()
    assert d_x[far].quantile(0.999) <= 10 * d_x_torch[far].quantile(0.999) + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_keep_it_too(dtype):
    x, weight, grad = (t.to(dtype) for t in draw(SIZES[0]))
    x *= 0.01
    x[0, 3, 8, 8] = 6e4
    got, right = results(fastda.conv2d, x, weight, grad, 1), exact(x, weight, grad, 1)
    near = windows_largest(x, 3, 1) > 1e4
    error = (got[0].double() - right[0]).abs().masked_fill(near, 0)
    assert error.max() <= 2 * torch.finfo(dtype).eps * right[0].abs().masked_fill(near, 0).max()
