"""ReLU with max-pooling against PyTorch's own, exactly: values, ties, NaN, infinities, gradients, strides."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastda
from fastda import reference
from tests.common import check_compiled, check_error, check_gradients, check_opcheck, check_transforms, draw

LAST = torch.channels_last
NAN, INF = float("nan"), float("inf")
# kernel_size, stride, padding, ceil_mode
WINDOWS = (
    *((2, 2, 0, False), (3, 2, 1, False), (2, 2, 1, True), (3, 2, 0, True), (3, 1, 1, False)),
    *(((5, 3), (2, 4), (2, 1), True), ((1, 7), (3, 1), (0, 3), False), (15, 5, 7, True)),
)
SIZES = ((1, 1, 1), (3, 2, 7), (5, 24, 24), (17, 9, 37), (33, 12, 40))


def ties(*shape):
    return torch.randint(-2, 3, shape).float()


def spoilt(*shape):
    x = torch.where(torch.rand(shape) < 0.1, INF, ties(*shape))
    x = torch.where(torch.rand(shape) < 0.3, -INF, x)
    return torch.where(torch.rand(shape) < 0.1, NAN, x)


def nothing_finite(*shape):
    return torch.full(shape, -INF)


def zeros(*shape):
    return torch.where(torch.rand(shape) < 0.5, -0.0, 0.0)


def relu_then_pool(x, *window):
    return F.max_pool2d(F.relu(x), *window[:3], 1, window[3])


def pool_then_relu(x, *window):
    return F.relu(F.max_pool2d(x, *window[:3], 1, window[3]))


def pool(x, *window):
    return F.max_pool2d(x, *window[:3], 1, window[3])


def fused(x, *window, relu=True):
    return fastda.relu_max_pool(x, *window[:3], 1, window[3], relu=relu)


def value_and_gradient(function, x, window, **options):
    x = x.detach().requires_grad_()
    y = function(x, *window, **options)
    weight = torch.linspace(0.5, 1.5, y.numel()).view(y.shape).to(y)
    weight[0, 0, 0, 0] = NAN
    return y.detach(), torch.autograd.grad(y, x, weight)[0]


def exactly(actual, expected, dtype):
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        # PyTorch has rounded the gradients of overlapping windows as we do, or after every addition.
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if i and dtype.itemsize == 2 else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(a, e, equal_nan=True, **tolerance)


@pytest.mark.parametrize("make", [torch.randn, ties, zeros, spoilt, nothing_finite], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_is_that_of_pytorch(make, dtype):
    checked = 0
    for window, (c, h, w), layout in itertools.product(WINDOWS, SIZES, (torch.contiguous_format, LAST)):
        x = make(2, c, h, w).to(dtype).contiguous(memory_format=layout)
        try:
            pool(x, *window)
        except RuntimeError:  # smaller than a window
            with pytest.raises(ValueError, match="x must be large enough for a window"):
                fused(x, *window)
            continue
        checked += 1
        result = value_and_gradient(fused, x, window)
        exactly(result, value_and_gradient(relu_then_pool, x, window), dtype)
        exactly(result, value_and_gradient(pool_then_relu, x, window), dtype)
        plain = value_and_gradient(pool, x, window)
        bare = value_and_gradient(fused, x, window, relu=False)
        exactly(bare, plain, dtype)
        assert [t.stride() for t in bare] == [t.stride() for t in plain]
    assert checked > 40


def test_the_first_of_equal_entries_has_the_gradient_and_the_last_nan():
    for layout in (torch.contiguous_format, LAST):
        x = torch.tensor([[1.0, 2, 2, 1], [2, 2, NAN, NAN], [-1, -1, -0.0, 0], [-1, -2, 0, 0]])
        x = x.expand(1, 20, 4, 4).contiguous(memory_format=layout).requires_grad_()
        (grad,) = torch.autograd.grad(fastda.relu_max_pool(x, 2).sum(), x)
        wanted = [[0.0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
        assert torch.equal(grad, torch.tensor(wanted).expand_as(grad))
        (grad,) = torch.autograd.grad(fastda.relu_max_pool(x, 2, relu=False).sum(), x)
        wanted = [[0.0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 1, 0], [0, 0, 0, 0]]
        assert torch.equal(grad, torch.tensor(wanted).expand_as(grad))


@pytest.mark.parametrize("relu", [True, False])
def test_layouts(relu):
    base = torch.randn(3, 6, 8, 11)
    views = {
        "strided": torch.full((3, 6, 8, 23), NAN)[..., 1::2].copy_(base),
        "transposed": base.transpose(2, 3).contiguous().transpose(2, 3),
        "batch innermost": base.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "expanded": base[:1].expand(3, 6, 8, 11),
        "one channel": base[:, :1],
        "offset": torch.randn(3 * 6 * 8 * 11 + 1)[1:].view(3, 6, 8, 11),
    }
    window = (3, 2, 1, False)
    for x in views.values():
        expected = value_and_gradient(relu_then_pool if relu else pool, x, window)
        exactly(value_and_gradient(fused, x, window, relu=relu), expected, x.dtype)


@pytest.mark.isa_independent
@pytest.mark.parametrize("relu", [True, False])
def test_without_gradients(relu):
    x = ties(2, 3, 10, 8) - 1
    for window in (((3, 2), (2, 3), (1, 0), True), (3, (), 0, False)):  # () is torch's own default
        assert torch.equal(fused(x, *window, relu=relu), (relu_then_pool if relu else pool)(x, *window))


@pytest.mark.isa_independent
@pytest.mark.parametrize("channels", [1, 5])
def test_without_a_batch(channels):
    x = torch.randn(channels, 8, 11, requires_grad=True)
    y = fastda.relu_max_pool(x, 3, 2, 1)
    assert torch.equal(y, F.max_pool2d(F.relu(x), 3, 2, 1))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.autograd.grad(F.max_pool2d(F.relu(x), 3, 2, 1).sum(), x)[0])


@pytest.mark.isa_independent
@pytest.mark.parametrize(
    "sizes", [{"kernel_size": 16, "padding": 8}, {"kernel_size": 2, "dilation": 2}], ids=str
)
def test_what_the_reference_serves(sizes):
    x = torch.randn(2, 3, 40, 40, requires_grad=True)
    y, expected = fastda.relu_max_pool(x, **sizes), F.max_pool2d(F.relu(x), **sizes)
    assert torch.equal(y, expected)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.autograd.grad(expected.sum(), x)[0])


@pytest.mark.isa_independent
def test_a_byte_for_every_output_is_all_that_is_kept():
    x, saved = torch.randn(2, 3, 8, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fastda.relu_max_pool(x, 2)
    assert [(t.dtype, t.shape) for t in saved] == [(torch.uint8, y.shape)]
    kept = (x.data_ptr(), y.data_ptr())
    assert all(t.data_ptr() not in kept for t in saved)


@pytest.mark.isa_independent
@pytest.mark.parametrize(
    "options", [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1, "relu": False}], ids=str
)
def test_derivatives(options):
    check_gradients("relu_max_pool", draw("relu_max_pool", (2, 2, 5, 6), **options))


@pytest.mark.isa_independent
@pytest.mark.parametrize("window", [(3, 2, 1), ((4, 3), (2, 3), (2, 1))], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
def test_second_gradients_go_to_what_won(window, layout):
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()

    def gradients(function):
        y = function(x, *window)
        scale = torch.linspace(1, 2, y.numel(), dtype=y.dtype).view(y.shape).requires_grad_()
        (g,) = torch.autograd.grad((y * scale).sum(), x, create_graph=True)
        return g, torch.autograd.grad(g.square().sum(), scale)[0]

    actual, expected = gradients(fastda.relu_max_pool), gradients(reference.relu_max_pool)
    torch.testing.assert_close(actual, expected)
    assert actual[0].stride() == x.stride()


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
def test_opcheck(layout):
    x = torch.randn(2, 5, 7, 9).contiguous(memory_format=layout)
    for kept, ceil_mode in itertools.product((True, False), (True, False)):
        check_opcheck("relu_max_pool", x, [3, 2], [2, 2], [1, 0], ceil_mode, True, kept)
    y, indices = torch.ops.fastda.relu_max_pool(x, [2, 2], [2, 2], [0, 0], False, True, True)
    check_opcheck("relu_max_pool_backward", y, indices, [7, 9], layout == LAST, [2, 2], [2, 2], [0, 0])


@pytest.mark.isa_independent
def test_compile_and_transforms():
    options = {"kernel_size": 3, "stride": 2, "padding": 1}
    check_compiled("relu_max_pool", draw("relu_max_pool", (2, 3, 9, 11), torch.float32, **options))
    check_transforms("relu_max_pool", draw("relu_max_pool", (1, 2, 4, 5), **options))
    function = torch.compile(fastda.relu_max_pool, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, h, w in ((1, 9, 7), (3, 8, 15)):
        x = torch.randn(n, 3, h, w)
        assert torch.equal(function(x, 2), fastda.relu_max_pool(x, 2))


X = torch.randn(2, 3, 7, 9)
ERRORS = [
    ({"x": "text"}, TypeError, "x must be a tensor, got str"),
    (
        {"x": X[0, 0]},
        ValueError,
        "x must be (N, C, H, W) or (C, H, W), only N may be 0, got (7, 9)",
    ),
    (
        {"x": X[:, :0]},
        ValueError,
        "x must be (N, C, H, W) or (C, H, W), only N may be 0, got (2, 0, 7, 9)",
    ),
    ({"x": X.int()}, TypeError, "x must be float32, float64, bfloat16 or float16, got torch.int32"),
    ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
    ({"kernel_size": 2.0}, TypeError, "kernel_size must be an int or a pair of ints, got 2.0"),
    ({"kernel_size": (2, 2, 2)}, TypeError, "kernel_size must be an int or a pair of ints, got (2, 2, 2)"),
    ({"kernel_size": True}, TypeError, "kernel_size must be an int or a pair of ints, got True"),
    ({"stride": (1, 0)}, ValueError, "stride must be at least 1, got (1, 0)"),
    ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
    ({"padding": (1, 2)}, ValueError, "padding must be at most half of kernel_size, got (1, 2) for (2, 2)"),
    ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
    (
        {"kernel_size": 8},
        ValueError,
        "x must be large enough for a window, got (2, 3, 7, 9) for kernel_size (8, 8), padding (0, 0), "
        "dilation (1, 1)",
    ),
]


@pytest.mark.isa_independent
@pytest.mark.parametrize("change, kind, message", ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(change, kind, message):
    arguments = {"x": X, "kernel_size": 2, **change}
    check_error(fastda.relu_max_pool, arguments, kind, f"relu_max_pool: {message}")


@pytest.mark.isa_independent
def test_raw_operators_refuse_what_does_not_fit():
    """They are reachable past the Python checks, and must not touch memory that is not theirs."""
    ops, two, none = torch.ops.fastda, [2, 2], [0, 0]
    y, indices = ops.relu_max_pool(X, two, two, none, False, True, True)
    calls = [
        lambda: ops.relu_max_pool(X[0], two, two, none, False, True, True),
        lambda: ops.relu_max_pool(X, [8, 8], two, none, False, True, True),
        lambda: ops.relu_max_pool(X, [16, 16], two, [8, 8], False, True, True),
        lambda: ops.relu_max_pool(X, two, none, none, False, True, True),
        lambda: ops.relu_max_pool(X, two, two, [2, 2], False, True, True),
        lambda: ops.relu_max_pool_backward(y, indices, [9, 9], False, two, two, none),
        lambda: ops.relu_max_pool_backward(y, indices[:1], [7, 9], False, two, two, none),
        lambda: ops.relu_max_pool_backward(y, indices.int(), [7, 9], False, two, two, none),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="must"):
            call()
