"""Convolutions with a stride: against the reference, and what large values cost 4x4 filters."""

import pytest
import torch
import torch.nn.functional as F

import fastda
from fastda import backend, reference
from tests.common import (
    assert_results,
    assert_same_bits_with_threads,
    check_against_reference,
    check_compiled,
    check_error,
    check_gradients,
    check_opcheck,
    check_transforms,
    draw,
    results,
)
from tests.ops.refiner_conv import CHANNELS_LAST, LAYOUTS, B, W, X, images_as
from tests.ops.test_refiner_conv_outliers import MOST, ROUNDING, USUAL, VALUES, places

# (N, C, K, k, H, W) and the padding, by Winograd: ragged tiles and vectors, rows that nobody reads, several
# blocks of tiles, several sums, sums over many channels.
CASES = [
    *(((2, 17, 33, 4, 19, 22), p) for p in range(4)),
    *(((1, 16, 16, 4, h, w), 0) for h, w in ((10, 11), (37, 53))),
    *(((1, 129, 144, 4, 50, 52), 1), ((4, 16, 17, 4, 60, 67), 1), ((2, 65, 40, 4, 61, 70), 1)),
]
# What PyTorch does: few channels, few pixels, filters that are too many for the tiles, other filters.
OTHERS = [
    *(((2, 3, 5, 4, 7, 9), 1), ((1, 20, 20, 4, 8, 9), 0), ((1, 96, 96, 4, 14, 14), 1)),
    *(((2, 17, 20, 3, 9, 12), 1), ((1, 20, 17, 5, 11, 13), 2), ((1, 2, 3, 1, 4, 5), 0)),
]
native = pytest.mark.skipif(backend.native is None, reason=f"no C++ extension: {backend.native_error}")
# PyTorch's convolution serves there, whose filter gradient depends on the number of threads.
not_base = pytest.mark.skipif(
    backend.native is not None and backend.native.cpu_isa() == "base", reason="base has no such kernels"
)


def case(sizes, padding, dtype=torch.float32, stride=2, **options):
    options = {"bias": True, "residual": None, "relu": False, **options}
    return draw("conv2d", sizes, dtype, **options, padding=padding, stride=stride)


@pytest.mark.parametrize("sizes, padding", CASES + OTHERS, ids=str)
def test_strided_conv2d_matches_reference(sizes, padding):
    check_against_reference("conv2d", case(sizes, padding))
    check_against_reference("conv2d", case(sizes, padding, residual=True, relu=True))
    check_against_reference("conv2d", case(sizes, padding, bias=None))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes, padding", [CASES[1], CASES[5], OTHERS[0]], ids=str)
def test_layouts_and_views(sizes, padding, layout):
    check_against_reference("conv2d", images_as(case(sizes, padding), LAYOUTS[layout]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST], ids=str)
def test_the_result_and_the_gradient_lie_as_x_does(layout):
    for sizes, padding in (CASES[1], OTHERS[0]):
        arguments = {**case(sizes, padding), "bias": None}
        x = arguments["x"].detach().to(memory_format=layout).requires_grad_()
        for weight in (arguments["weight"], arguments["weight"].contiguous(memory_format=CHANNELS_LAST)):
            y = fastda.conv2d(x, weight, stride=2, padding=padding)
            (d_x,) = torch.autograd.grad(y.sum(), x)
            assert y.is_contiguous(memory_format=layout)
            assert d_x.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    "options, sizes",
    [
        ({"padding_mode": "reflect"}, CASES[0][0]),
        ({"dilation": 2}, CASES[0][0]),
        ({"negative_slope": 0.2}, CASES[0][0]),
        ({"stride": 3}, CASES[0][0]),
        ({"stride": 3}, OTHERS[3][0]),
    ],
    ids=str,
)
def test_options(options, sizes):
    check_against_reference("conv2d", {**case(sizes, 1), **options})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype):
    check_against_reference("conv2d", case(*CASES[1], dtype))


def called(call):
    """Names of PyTorch's operators that ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.name for event in profile.events()}


@native
@not_base
@pytest.mark.parametrize("spoiled", [None, "x", "grad"])
@pytest.mark.parametrize("sizes, padding", CASES + OTHERS[:3], ids=str)
def test_who_serves(sizes, padding, spoiled):
    """PyTorch, where the kernels do not, and where a value is not finite."""
    arguments = case(sizes, padding)
    x, weight = arguments["x"].detach(), arguments["weight"].detach()
    grad = torch.randn_like(F.conv2d(x, weight, stride=2, padding=padding))
    if spoiled:
        {"x": x, "grad": grad}[spoiled][0, 1, 2, 2] = torch.inf
    ops, by_kernels = torch.ops.fastda, (sizes, padding) in CASES
    forward = called(lambda: ops.conv2d_stride2(x, weight, None, padding))
    assert ("aten::convolution" in forward) == (not by_kernels or spoiled == "x")
    for needs in ((True, False), (False, True)):
        backward = called(lambda: ops.conv2d_stride2_backward(grad, x, weight, padding, *needs, False))  # noqa: B023
        reads_it = spoiled == "grad" or (spoiled == "x" and needs[1])
        assert ("aten::convolution_backward" in backward) == (not by_kernels or reads_it)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38])
def test_what_is_not_finite_reaches_no_further_than_its_window(value, memory_format):
    arguments = {**case(*CASES[1]), "bias": None}
    with torch.no_grad():
        arguments["x"][0, 3, 9, 8] = value
    arguments = images_as(arguments, lambda t: t.contiguous(memory_format=memory_format))
    got, expected = results(fastda.conv2d, arguments), results(reference.conv2d, arguments)
    for what, right in expected.items():
        assert torch.equal(got[what].isfinite(), right.isfinite()), what


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("sizes, padding", [CASES[1], CASES[4]], ids=str)
def test_with_a_stride_an_outlier_costs_no_more_than_promised(sizes, padding, value, memory_format):
    n, c, k, kernel, h, w = sizes
    x = torch.randn(n, c, h, w).contiguous(memory_format=memory_format)
    weight = torch.randn(k, c, kernel, kernel) * (c * kernel * kernel) ** -0.5
    grad = torch.randn_like(F.conv2d(x, weight, stride=2, padding=padding))

    def gradients(convolution, x, weight, grad):
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = convolution(x, weight, stride=2, padding=padding)
        return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]

    def largest(image):
        return image.abs().amax(1, keepdim=True).double()

    def of_readers(grad):
        """Of every pixel of x: the largest magnitude among the outputs that read it."""
        spread = torch.zeros(n, 1, 2 * grad.shape[2] - 1, 2 * grad.shape[3] - 1, dtype=torch.float64)
        spread[..., ::2, ::2] = largest(grad)
        before = kernel - 1 - padding
        after = [size + padding - end for size, end in zip((h, w), spread.shape[2:], strict=True)]
        return F.max_pool2d(F.pad(spread, (before, after[1], before, after[0])), kernel, 1)

    per_output, per_input = weight.abs().sum((1, 2, 3)).double(), weight.abs().sum((0, 2, 3)).double()
    for name, image in {"x": x, "grad": grad}.items():
        for place in places(sizes, image):
            operands = {"x": x.clone(), "grad": grad.clone()}
            operands[name][-1, 1, place[0], place[1]] = value
            got = gradients(fastda.conv2d, operands["x"], weight, operands["grad"])
            right = gradients(F.conv2d, operands["x"].double(), weight.double(), operands["grad"].double())
            y, d_x, d_weight = ((a.double() - b).abs() for a, b in zip(got, right, strict=True))
            own = F.max_pool2d(F.pad(largest(operands["x"]), [padding] * 4), kernel, 2)
            scale = per_output.view(1, -1, 1, 1) * (MOST * own.clamp_min(1.5 * USUAL) * ROUNDING)
            assert (y <= scale).all(), (name, place)
            own = of_readers(operands["grad"])
            scale = per_input.view(1, -1, 1, 1) * (MOST * own.clamp_min(1.5 * USUAL) * ROUNDING)
            assert (d_x <= scale).all(), (name, place)
            seen = F.pad(largest(operands["x"]).clamp_min(USUAL), [padding] * 4).clamp_min(USUAL)
            weights = largest(operands["grad"]).clamp_min(USUAL)
            products = F.conv2d(seen.transpose(0, 1), weights.transpose(0, 1), dilation=2)[0, 0, :4, :4]
            assert (d_weight <= 16 * MOST * ROUNDING * products).all(), (name, place)


@not_base
@pytest.mark.parametrize("sizes, padding", [CASES[1], CASES[7]], ids=str)
def test_any_number_of_threads_gives_the_same_bits(sizes, padding):
    assert_same_bits_with_threads(fastda.conv2d, case(sizes, padding))


def test_each_gradient_alone_has_the_same_bits():
    arguments = case(*CASES[1])
    everything = results(fastda.conv2d, arguments)
    for name in ("x", "weight"):
        alone = {
            n: v.detach().requires_grad_(n == name) if isinstance(v, torch.Tensor) else v
            for n, v in arguments.items()
        }
        only = results(fastda.conv2d, alone)
        for what, value in only.items():
            assert torch.equal(value, everything[what]), what


def test_an_empty_batch():
    arguments = case((0, 20, 20, 4, 12, 12), 1)
    assert_results("conv2d", results(fastda.conv2d, arguments), results(reference.conv2d, arguments))


@pytest.mark.isa_independent
def test_derivatives_compilers_and_transforms():
    check_gradients("conv2d", case((2, 2, 3, 4, 6, 7), 1, torch.float64))
    check_transforms("conv2d", case((1, 2, 2, 4, 6, 7), 1, torch.float64))
    check_compiled("conv2d", case(*CASES[1]))


def test_second_derivatives():
    arguments = {**case(*CASES[1]), "bias": None}

    def second(convolve, x, weight):
        y = convolve(x, weight, stride=2, padding=1)
        first = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))

    operands = arguments["x"], arguments["weight"]
    right = second(F.conv2d, *(t.detach().double().requires_grad_() for t in operands))
    for a, b in zip(second(fastda.conv2d, *operands), right, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@native
@pytest.mark.isa_independent
def test_opcheck_of_the_strided_operators():
    weight, bias = torch.randn(18, 17, 4, 4), torch.randn(18)
    for layout in (torch.contiguous_format, CHANNELS_LAST):
        x = torch.randn(2, 17, 13, 12).to(memory_format=layout)
        grad = torch.randn(2, 18, 6, 6).to(memory_format=layout)
        check_opcheck("conv2d_stride2", x, weight, bias, 1)
        check_opcheck("conv2d_stride2_backward", grad, x, weight, 1, True, True, True)


@pytest.mark.isa_independent
@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"stride": (2, 2)}, TypeError, "stride must be an int, got (2, 2)"),
        ({"stride": True}, TypeError, "stride must be an int, got True"),
        ({"residual": X}, ValueError, "residual must be (2, 4, 3, 4), got (2, 3, 7, 9)"),
        ({"padding": 3}, ValueError, "padding must be from 0 to 2 for this weight, got 3"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_errors(change, kind, message):
    arguments = {"x": X, "weight": W, "bias": B, "stride": 2, **change}
    check_error(fastda.conv2d, arguments, kind, f"conv2d: {message}")


@native
@pytest.mark.isa_independent
def test_raw_operators_refuse_what_does_not_fit():
    ops, weight, y = torch.ops.fastda, torch.randn(4, 3, 4, 4), torch.randn(2, 4, 3, 4)
    calls = [
        lambda: ops.conv2d_stride2(X, W, None, 1),
        lambda: ops.conv2d_stride2(X.double(), weight.double(), None, 1),
        lambda: ops.conv2d_stride2(X, weight, None, 4),
        lambda: ops.conv2d_stride2(X, weight, B[:3], 1),
        lambda: ops.conv2d_stride2_backward(X, X, weight, 1, True, True, True),
        lambda: ops.conv2d_stride2_backward(y, X, weight, 0, True, True, True),
        lambda: ops.conv2d_stride2_backward(y.double(), X, weight, 1, True, True, True),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="must"):
            call()
