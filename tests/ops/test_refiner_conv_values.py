"""The convolutions against the reference: sizes, layouts, views, dtypes."""

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastda
from fastda import reference
from fastda.testing import error
from tests.common import (
    assert_results,
    check_against_reference,
    in_float64,
)
from tests.ops.refiner_conv import CHANNELS_LAST, LAYOUTS, block, conv, images_as

# (N, C, K, k, H, W): Winograd's own channels, ragged vectors and tiles, few channels, few pixels, 7x7.
CONVS = [
    (2, 64, 64, 3, 35, 55),
    (3, 16, 48, 3, 37, 53),
    (1, 33, 17, 3, 4, 129),
    (2, 65, 70, 3, 9, 7),
    (1, 16, 16, 3, 3, 3),
    (2, 3, 5, 3, 13, 11),
    (1, 1, 64, 3, 35, 55),
    (2, 64, 1, 1, 19, 21),
    (1, 20, 24, 7, 17, 23),
    (2, 4, 3, 5, 6, 2),
]

BLOCKS = [(2, 64, 3, 35, 55), (3, 20, 3, 37, 53), (2, 3, 3, 5, 4), (1, 16, 7, 13, 17)]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [None, True])
@pytest.mark.parametrize("sizes", CONVS, ids=str)
def test_conv_same_matches_reference(sizes, residual, relu):
    check_against_reference("conv_same", conv(sizes, residual=residual, relu=relu))


@pytest.mark.parametrize("sizes", BLOCKS, ids=str)
def test_refiner_block_matches_reference(sizes):
    check_against_reference("refiner_block", block(sizes))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "sizes",
    [(2, 20, 33, 3, 29, 27), (2, 20, 33, 3, 13, 11), (2, 20, 17, 7, 13, 9), (2, 5, 7, 3, 5, 9)],
    ids=str,
)
def test_layouts_and_views(sizes, layout):
    arguments = images_as(conv(sizes, residual=True), LAYOUTS[layout])
    check_against_reference("conv_same", arguments)
    out = fastda.conv_same(**arguments)
    expected = reference.conv_same(**arguments)
    for memory_format in (torch.contiguous_format, CHANNELS_LAST):
        assert out.is_contiguous(memory_format=memory_format) == expected.is_contiguous(
            memory_format=memory_format
        )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sizes", [(1, 330, 310, 3, 28, 31), (1, 260, 150, 3, 28, 31)], ids=str)
def test_many_channels(sizes, layout):
    check_against_reference("conv_same", images_as(conv(sizes), LAYOUTS[layout]))


def test_operands_of_different_layouts():
    arguments = conv((2, 20, 20, 3, 13, 11), residual=True)
    mixed = {**arguments, "residual": images_as(arguments, LAYOUTS["channels_last"])["residual"]}
    check_against_reference("conv_same", mixed)
    arguments = block((2, 20, 3, 13, 11))
    for layout in (CHANNELS_LAST, torch.contiguous_format):
        for grad_layout in (CHANNELS_LAST, torch.contiguous_format):
            leaves = {n: v.detach().requires_grad_() for n, v in arguments.items()}
            y = fastda.refiner_block(**{**leaves, "x": leaves["x"].contiguous(memory_format=layout)})
            assert y.is_contiguous(memory_format=layout)
            torch.manual_seed(0)
            grad = torch.randn(y.shape).contiguous(memory_format=grad_layout)
            got = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True))
            exact = in_float64(arguments)
            right = torch.autograd.grad(reference.refiner_block(**exact), list(exact.values()), grad.double())
            assert_results("refiner_block", got, dict(zip(leaves, right, strict=True)))


@st.composite
def views(draw_, shape):
    """How a tensor of this shape lies in memory: order of dimensions, offset and gaps, which hold NaN."""
    order = draw_(st.sampled_from([(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3), (0, 1, 3, 2), (3, 0, 2, 1)]))
    steps = [draw_(st.sampled_from([1, 1, 1, 2])) for _ in shape]
    starts = [draw_(st.integers(0, 2)) for _ in shape]

    def lay(x):
        size = [starts[d] + steps[d] * shape[d] + 1 for d in order]
        wide = x.new_full(size, torch.nan).permute([order.index(d) for d in range(4)])
        index = tuple(slice(starts[d], starts[d] + steps[d] * shape[d], steps[d]) for d in range(4))
        return wide[index].copy_(x)

    return lay


@st.composite
def random_convolutions(draw_):
    # Few channels leave room for large images, and the other way round: under 10 million products a case.
    kernel = draw_(st.sampled_from([1, 3, 3, 3, 3, 5, 7]))
    c, k = draw_(st.integers(1, 80)), draw_(st.integers(1, 80))
    pixels = max(1, 10_000_000 // (c * k * kernel**2))
    h = draw_(st.integers(1, min(70, pixels)))
    w = draw_(st.integers(1, min(70, max(1, pixels // h))))
    n = draw_(st.integers(1, max(1, min(3, pixels // (h * w)))))
    return {
        "sizes": (n, c, k, kernel, h, w),
        "layouts": [draw_(views((n, channels, h, w))) for channels in (c, k, k)],
        "options": {name: draw_(st.booleans()) for name in ("bias", "residual")},
        "slope": draw_(st.sampled_from([None, 0.0, 0.3])),
        "needs": draw_(st.sampled_from(["all", "x", "weight", "none"])),
        "seed": draw_(st.integers(0, 2**31)),
    }


@settings(
    max_examples=2000 if os.environ.get("FASTDA_SLOW_TESTS") == "1" else 200,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(random_convolutions())
def test_random_convolutions(case):
    """Against float64, each error relative to the size of what is summed: cancellation is no failure."""
    (n, c, k, kernel, h, w), options, slope = case["sizes"], case["options"], case["slope"]
    torch.manual_seed(case["seed"])
    lay_x, lay_residual, lay_grad = case["layouts"]
    x, residual, grad = torch.randn(n, c, h, w), torch.randn(n, k, h, w), torch.randn(n, k, h, w)
    weight, bias = torch.randn(k, c, kernel, kernel) / (c * kernel**2) ** 0.5, torch.randn(k)
    given_ = {"x": lay_x(x), "weight": weight, "bias": bias if options["bias"] else None}
    given_["residual"] = lay_residual(residual) if options["residual"] else None
    needed = {"all": ["x", "weight", "bias", "residual"], "none": []}.get(case["needs"], [case["needs"]])
    leaves = {name: given_[name].requires_grad_() for name in needed if given_[name] is not None}
    exact = {n_: None if v is None else v.detach().double() for n_, v in given_.items()}
    exact_leaves = {name: exact[name].requires_grad_() for name in leaves}

    y = fastda.conv_same(**given_, negative_slope=slope)
    before = reference.conv_same(**exact)
    right = before if slope is None else torch.where(before > 0, before, slope * before)
    assert (y - right).abs().max() <= 3e-5
    if not leaves:
        return
    got = torch.autograd.grad(y, list(leaves.values()), lay_grad(grad))
    gate = 1.0 if slope is None else torch.where(y.detach() > 0, 1.0, slope).double()
    expected = torch.autograd.grad(before, list(exact_leaves.values()), grad.double() * gate)
    # The rms of each gradient, were no two of its terms to cancel more than random ones do.
    terms = {"x": (k / c) ** 0.5, "weight": (n * h * w) ** 0.5, "bias": (n * h * w) ** 0.5, "residual": 1.0}
    for name, a, b in zip(leaves, got, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * terms[name] * math.sqrt(b.numel()), name


@pytest.mark.isa_independent
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("kernel, c", [(3, 16), (7, 16), (3, 2)])
def test_offsets_past_2_to_the_31(kernel, c, memory_format):
    """The last of three images lies 2^32 elements from the first; the memory between is never touched."""
    n, h, w, far = 3, 9, 8, 2**31
    size = 2 * far + c * h * w
    try:
        # Pages that nobody touches cost no memory; without the poison of conftest they stay untouched.
        torch.utils.deterministic.fill_uninitialized_memory = False
        storage = torch.empty(size)
    except RuntimeError:
        pytest.skip("the system does not let a process reserve 17 GB of address space")
    inner = (h * w, w, 1) if memory_format == torch.contiguous_format else (1, w * c, c)
    x = storage.as_strided((n, c, h, w), (far, *inner))
    x.copy_(torch.randn(n, c, h, w))
    weight = torch.randn(c, c, kernel, kernel) / (c * kernel**2) ** 0.5
    for t in (x, x.clone()):
        assert error(fastda.conv_same(t, weight), reference.conv_same(x.double(), weight.double()))[0] < 2e-6
    y = torch.ops.fastda.conv_same(x, weight, None, x, True)
    got = torch.ops.fastda.conv_same_backward(x, x, weight, y, True, True, True)
    near = torch.ops.fastda.conv_same_backward(x.clone(), x.clone(), weight, y, True, True, True)
    assert all(torch.equal(a, b) for a, b in zip(got, near, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 33, 20, 3, 29, 27), (2, 33, 20, 3, 13, 11), (1, 5, 7, 7, 9, 8)], ids=str
)
def test_dtypes(sizes, dtype):
    for layout in ("contiguous", "channels_last"):
        arguments = images_as(conv(sizes, dtype, residual=True), LAYOUTS[layout])
        assert fastda.conv_same(**arguments).dtype == dtype
        check_against_reference("conv_same", arguments)


@pytest.mark.parametrize("shape", [(0, 20, 9, 9), (2, 20, 0, 9), (2, 20, 9, 0)], ids=str)
def test_empty_images(shape):
    x = torch.randn(shape, requires_grad=True)
    weight, bias = torch.randn(20, 20, 3, 3, requires_grad=True), torch.randn(20, requires_grad=True)
    y = fastda.conv_same(x, weight, bias, relu=True)
    grads = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert y.shape == shape
    assert [g.shape for g in grads] == [x.shape, weight.shape, bias.shape]
    assert not grads[1].any() and not grads[2].any()


def test_no_input_channels():
    bias = torch.randn(20)
    y = fastda.conv_same(torch.randn(2, 0, 9, 8), torch.randn(20, 0, 3, 3), bias)
    assert torch.equal(y, bias.view(1, 20, 1, 1).expand(2, 20, 9, 8))
