import copy
import math
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fastda
from fastda import reference
from fastda.nn import Refiner, RefinerBlock
from fastda.ops.refiner_conv import checked_refiner_block
from fastda.testing import error
from fastda.verify import lay_out
from tests.common import (
    assert_results,
    check_against_reference,
    check_compiled,
    check_error,
    check_gradients,
    check_opcheck,
    check_transforms,
    draw,
    in_float64,
    results,
    wanted,
)

F32 = torch.float32
CHANNELS_LAST = torch.channels_last

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


def conv(sizes, dtype=F32, **options):
    return draw("conv_same", sizes, dtype, **{"bias": True, "residual": None, "relu": True, **options})


def block(sizes, dtype=F32):
    return draw("refiner_block", sizes, dtype)


def images_as(arguments, layout):
    def lay(v):
        if not isinstance(v, torch.Tensor) or v.dim() != 4 or layout is None:
            return v
        return layout(v.detach()).requires_grad_(v.requires_grad)

    return {n: lay(v) for n, v in arguments.items()}


def inset(x):
    """A view of the middle of a larger image whose rim is NaN."""
    n, c, h, w = x.shape
    wide = x.new_full((n + 1, c + 2, h + 2, w + 3), torch.nan)
    view = wide[1:, 1:-1, 1:-1, 2:-1]
    return view.copy_(x)


def inset_channels_last(x):
    wide = x.new_full((x.shape[0], x.shape[2] + 2, x.shape[3] + 3, x.shape[1] + 2), torch.nan)
    view = wide[:, 1:-1, 2:-1, 1:-1].permute(0, 3, 1, 2)
    return view.copy_(x)


LAYOUTS = {
    "contiguous": lambda x: lay_out(x, "contiguous"),
    "channels_last": lambda x: lay_out(x, "channels_last"),
    "strided": lambda x: lay_out(x, "strided"),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "inset": inset,
    "inset channels_last": inset_channels_last,
}


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
        "options": {name: draw_(st.booleans()) for name in ("bias", "residual", "relu")},
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
    (n, c, k, kernel, h, w), options = case["sizes"], case["options"]
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

    y = fastda.conv_same(**given_, relu=options["relu"])
    before = reference.conv_same(**exact)
    right = before.relu() if options["relu"] else before
    assert (y - right).abs().max() <= 3e-5
    if not leaves:
        return
    got = torch.autograd.grad(y, list(leaves.values()), lay_grad(grad))
    gate = (y.detach() > 0).double() if options["relu"] else 1.0
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


# Of millions of activations a few fall on the other side of a ReLU's edge, and the gradient there is
# right and far from the float64 reference's. These compare with a reference that takes fastda's own gates.
@pytest.mark.parametrize(
    "shape, k",
    [
        ((1, 64, 35, 55), 3),
        ((3, 64, 37, 53), 3),
        ((3, 64, 64, 55), 3),
        pytest.param((32, 64, 35, 55), 3, marks=pytest.mark.slow),
        pytest.param((2, 64, 224, 224), 3, marks=pytest.mark.slow),
        ((1, 64, 29, 33), 7),
        pytest.param((2, 64, 112, 112), 7, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
def test_block_accuracy_with_the_same_gates(shape, k, memory_format):
    c = shape[1]
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    weights = [torch.randn(c, c, k, k) * (2 / (k * k * c)) ** 0.5 for _ in range(2)]
    biases = [0.1 * torch.randn(c) for _ in range(2)]
    grad = torch.randn(shape).contiguous(memory_format=memory_format)
    y, inner = torch.ops.fastda.refiner_block(x, weights[0], biases[0], weights[1], biases[1], True)
    got = torch.ops.fastda.refiner_block_backward(
        grad, x, inner, y, weights[0], biases[0], weights[1], *[True] * 5
    )

    leaves = [t.double().requires_grad_() for t in (x, weights[0], biases[0], weights[1], biases[1])]
    exact_x, w1, b1, w2, b2 = leaves
    exact = reference.refiner_block(*leaves)
    gated = F.conv2d(exact_x, w1, b1, padding=k // 2) * (inner > 0)
    gated = (exact_x + F.conv2d(gated, w2, b2, padding=k // 2)) * (y > 0)
    right = torch.autograd.grad(gated, leaves, grad.double())

    def relative_l2(a, b):
        return ((a.double() - b).norm() / b.norm()).item()

    assert relative_l2(y, exact.detach()) <= 1.5e-6
    assert (y.double() - exact.detach()).abs().max() <= 3e-5
    assert relative_l2(got[0], right[0]) <= 2e-6
    for i in (1, 3):
        assert relative_l2(got[i], right[i]) <= 1e-5
    for i in (2, 4):
        assert relative_l2(got[i], right[i]) <= 2e-6


@pytest.mark.parametrize(
    "sizes",
    [(1, 20, 33, 3, 29, 27), (2, 20, 33, 3, 13, 11), (1, 17, 20, 7, 9, 8), (2, 5, 7, 3, 6, 9)],
    ids=str,
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
def test_nan_and_inf_go_where_the_definition_takes_them(sizes, value, memory_format):
    """One odd value, in turn, in every operand: the same NaN and Inf, and right values everywhere else."""
    # Off centre, a weight meets the padding: implementations differ in whether zero times NaN counts there.
    k = sizes[3]
    clean = {**conv(sizes, residual=True)}
    del clean["relu"]
    positions = {"x": (0, 1, 2, 3), "weight": (2, 1, k // 2, k // 2), "bias": (1,), "residual": (0, 2, 5, 5)}
    grad = torch.randn(fastda.conv_same(**clean).shape)
    for name in [*positions, "grad"]:
        arguments = {n: v.detach().clone() if isinstance(v, torch.Tensor) else v for n, v in clean.items()}
        odd_grad = grad.clone()
        if name == "grad":
            odd_grad[1 % sizes[0], 3, 4, 5] = value
        else:
            arguments[name][positions[name]] = value
        leaves = {n: arguments[n].requires_grad_() for n in positions}
        exact = {n: v.detach().double().requires_grad_() for n, v in leaves.items()}
        given = {
            n: v.contiguous(memory_format=memory_format) if v.dim() == 4 else v for n, v in leaves.items()
        }
        for relu in (False, True):
            y = fastda.conv_same(**given, relu=relu)
            right = reference.conv_same(**exact, relu=relu)
            # What is past float32 there is infinite here.
            assert_same_numbers(y, right.float())
            got = torch.autograd.grad(y, list(leaves.values()), odd_grad)
            gate = (y.detach() > 0) | y.detach().isnan() if relu else torch.ones_like(y)
            wanted_gradients = torch.autograd.grad(
                reference.conv_same(**exact),
                list(exact.values()),
                torch.where(gate.bool(), odd_grad, 0).double(),
            )
            for a, b in zip(got, wanted_gradients, strict=True):
                assert_same_numbers(a, b.float())


def assert_same_numbers(actual, expected):
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
    finite = expected.isfinite()
    # Where the odd value is finite and large, all that it touches has its scale.
    torch.testing.assert_close(actual[finite], expected[finite], rtol=1e-3, atol=1e-4 * scale_of(expected))


def scale_of(x):
    finite = x[x.isfinite()]
    return max(1.0, finite.abs().max().item()) if finite.numel() else 1.0


def test_block_carries_nan_like_the_reference():
    arguments = {n: v.detach() for n, v in block((2, 20, 3, 13, 11)).items()}
    arguments["x"][1, 3, 4, 5] = torch.nan
    got, right = fastda.refiner_block(**arguments), reference.refiner_block(**arguments)
    assert torch.equal(got.isnan(), right.isnan())
    assert 0 < got.isnan().sum() < got.numel() // 2


@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize("shape", [(3, 64, 37, 53), (1, 80, 19, 21), (2, 12, 19, 21)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
def test_bits_do_not_depend_on_threads_or_run(shape, kernel, memory_format):
    n, c, h, w = shape
    arguments = images_as(block((n, c, kernel, h, w)), lambda t: t.contiguous(memory_format=memory_format))
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 2, 1, 3):
            torch.set_num_threads(count)
            runs.append(results(fastda.refiner_block, arguments))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for what, value in runs[0].items():
            assert torch.equal(run[what], value), what


def test_weights_changed_in_place_take_effect():
    """Whatever is kept of a weight between calls must not outlive a change, however it was made."""
    x = torch.randn(1, 32, 12, 12)
    weight = nn.Parameter(torch.randn(32, 32, 3, 3) * 0.1)

    def check():
        torch.testing.assert_close(
            fastda.conv_same(x, weight).detach(),
            F.conv2d(x, weight, padding=1).detach(),
            rtol=1e-4,
            atol=1e-4,
        )

    check()
    optimizer = torch.optim.SGD([weight], lr=0.5)
    fastda.conv_same(x, weight).square().mean().backward()
    optimizer.step()
    check()
    weight.data.mul_(-2)
    check()
    weight.detach().numpy()[...] = 0.25
    check()
    with torch.no_grad():
        weight[3, 4] = 1.0
    check()


def test_only_needed_gradients_are_computed():
    arguments = conv((1, 20, 20, 3, 9, 9), residual=True)
    for name in wanted(arguments):
        only = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
        only[name] = only[name].requires_grad_()
        check_against_reference("conv_same", only)
    x, weight = (arguments[n].detach() for n in ("x", "weight"))
    grads = torch.ops.fastda.conv_same_backward(torch.randn_like(x), x, weight, None, False, True, False)
    assert [g.numel() for g in grads] == [0, weight.numel(), 0]
    arguments = block((1, 20, 3, 9, 9))
    for name in wanted(arguments):
        only = {n: v.detach() for n, v in arguments.items()}
        only[name] = only[name].requires_grad_()
        check_against_reference("refiner_block", only)


def test_recomputing_the_inner_activation_changes_no_bit():
    arguments = block((2, 20, 3, 13, 11))
    kept, again = (
        results(lambda recompute=recompute, **a: checked_refiner_block(**a, recompute=recompute), arguments)
        for recompute in (False, True)
    )
    for what, value in kept.items():
        assert torch.equal(again[what], value), what


@pytest.mark.parametrize("shape", [(3, 64, 64, 55), (2, 33, 129, 130), (1, 48, 200, 101)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
def test_backward_a_few_rows_at_a_time_changes_no_bit(shape, dtype, recompute, memory_format):
    """So many rows go through a window of them; for more threads than chunks the gradient is made whole."""
    n, c, h, w = shape
    arguments = images_as(block((n, c, 3, h, w), dtype), lambda t: t.contiguous(memory_format=memory_format))
    grad = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 64):
            torch.set_num_threads(count)
            y = checked_refiner_block(**arguments, recompute=recompute)
            found.append(torch.autograd.grad(y, list(arguments.values()), grad))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name, one, same in zip(arguments, found[0], other, strict=True):
            assert torch.equal(one, same), name


@pytest.mark.isa_independent
@pytest.mark.parametrize(
    "options", [{"relu": True, "residual": True}, {"bias": None, "relu": False}], ids=str
)
def test_conv_same_derivatives(options):
    check_gradients("conv_same", conv((2, 3, 2, 3, 4, 5), torch.float64, **options))


@pytest.mark.isa_independent
@pytest.mark.parametrize("recompute", [False, True])
def test_refiner_block_derivatives(recompute):
    def function(**arguments):
        return checked_refiner_block(**arguments, recompute=recompute)

    check_gradients("refiner_block", block((2, 2, 3, 4, 3), torch.float64), function)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("c", [5, 20])
def test_opcheck(c, dtype, memory_format):
    def image(channels=c):
        return torch.randn(2, channels, 7, 9).to(dtype, memory_format=memory_format)

    w1, w2 = (torch.randn(c, c, 3, 3).to(dtype) for _ in range(2))
    b1, b2 = (torch.randn(c).to(dtype) for _ in range(2))
    check_opcheck("conv_same", image(), w1, b1, image(), True)
    check_opcheck("conv_same", image(), w1, None, None, False)
    check_opcheck("conv_same_backward", image(), image(), w1, image(), True, True, True)
    check_opcheck("conv_same_backward", image(), image(), w1, None, False, True, False)
    check_opcheck("refiner_block", image(), w1, b1, w2, b2, True)
    check_opcheck("refiner_block", image(), w1, None, w2, None, False)
    check_opcheck("refiner_block_backward", image(), image(), image(), image(), w1, b1, w2, *[True] * 5)
    check_opcheck(
        "refiner_block_backward", image(), image(), None, image(), w1, b1, w2, True, False, True, False, False
    )


@pytest.mark.isa_independent
def test_compile():
    # The graph is the same whatever generates the code around the operators; the whole refiner has inductor.
    check_compiled("conv_same", conv((2, 20, 24, 3, 9, 11), residual=True), backend="aot_eager")
    check_compiled("refiner_block", block((2, 20, 3, 9, 11)), backend="aot_eager")
    channels_last = images_as(block((2, 20, 3, 9, 11)), LAYOUTS["channels_last"])
    check_compiled("refiner_block", channels_last, backend="aot_eager")


@pytest.mark.isa_independent
def test_compile_of_a_whole_refiner():
    refiner, x = Refiner(blocks=1, channels=16), torch.randn(2, 1, 13, 11)
    parameters = dict(refiner.named_parameters())

    def function(x, **parameters):
        return torch.func.functional_call(refiner, parameters, (x,))

    check_compiled("refiner_block", {"x": x, **parameters}, function)


@pytest.mark.isa_independent
def test_dynamic_shapes_compile():
    function = torch.compile(fastda.refiner_block, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, h, w in ((1, 9, 7), (3, 8, 15)):
        arguments = {k: v.detach() for k, v in block((n, 20, 3, h, w)).items()}
        torch.testing.assert_close(function(**arguments), fastda.refiner_block(**arguments))


@pytest.mark.isa_independent
def test_transforms():
    check_transforms("conv_same", conv((1, 2, 3, 3, 3, 4), torch.float64, residual=True))
    check_transforms("refiner_block", block((1, 2, 3, 3, 3), torch.float64))


@pytest.mark.isa_independent
def test_export():
    module, x = RefinerBlock(8), torch.randn(2, 8, 9, 7)
    exported = torch.export.export(module, (x,))
    torch.testing.assert_close(exported.module()(x), module(x))


@pytest.mark.isa_independent
def test_autocast_casts_as_conv2d_does():
    x, weight = torch.randn(2, 20, 9, 7), torch.randn(20, 20, 3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fastda.conv_same(x, weight, relu=True)
        assert y.dtype == F.conv2d(x, weight, padding=1).dtype == torch.bfloat16
        assert fastda.refiner_block(x, weight, None, weight, None).dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


X, W, B = torch.randn(2, 3, 7, 9), torch.randn(4, 3, 3, 3), torch.randn(4)
W1, W2 = torch.randn(5, 3, 3, 3), torch.randn(3, 5, 3, 3)
CONV_ERRORS = [
    ({"x": X[0]}, ValueError, "x must be (N, C, H, W), got (3, 7, 9)"),
    ({"weight": W[0]}, ValueError, "weight must be (K, C, k, k) with odd k, got (3, 3, 3)"),
    ({"weight": W[..., :2]}, ValueError, "weight must be (K, C, k, k) with odd k, got (4, 3, 3, 2)"),
    ({"weight": W[..., :2, :2]}, ValueError, "weight must be (K, C, k, k) with odd k, got (4, 3, 2, 2)"),
    ({"weight": W[:, :2]}, ValueError, "weight must take the 3 channels of x, got 2 ((4, 2, 3, 3))"),
    ({"bias": B[:3]}, ValueError, "bias must be (4,), got (3,)"),
    ({"bias": B[None]}, ValueError, "bias must be (4,), got (1, 4)"),
    ({"residual": X}, ValueError, "residual must be (2, 4, 7, 9), got (2, 3, 7, 9)"),
    (
        {"x": X.to(torch.int32)},
        TypeError,
        "x must be float32, float64, bfloat16 or float16, got torch.int32",
    ),
    (
        {"x": X.to(torch.complex64)},
        TypeError,
        "x must be float32, float64, bfloat16 or float16, got torch.complex64",
    ),
    (
        {"weight": W.double()},
        TypeError,
        "weight must have the dtype of x, torch.float32, got torch.float64",
    ),
    ({"bias": B.double()}, TypeError, "bias must have the dtype of x, torch.float32, got torch.float64"),
    (
        {"weight": W.to("meta")},
        ValueError,
        "weight must be on the device of x, cpu, got meta",
    ),
]
BLOCK_ERRORS = [
    ({"x": X[0]}, ValueError, "x must be (N, C, H, W), got (3, 7, 9)"),
    ({"weight1": W1[:, :2]}, ValueError, "weight1 must take the 3 channels of x, got 2 ((5, 2, 3, 3))"),
    ({"weight2": W2[:2]}, ValueError, "weight2 must be (3, 5, k, k) with odd k, got (2, 5, 3, 3)"),
    ({"weight2": W2[..., :2]}, ValueError, "weight2 must be (3, 5, k, k) with odd k, got (3, 5, 3, 2)"),
    ({"bias1": B}, ValueError, "bias1 must be (5,), got (4,)"),
    ({"bias2": B}, ValueError, "bias2 must be (3,), got (4,)"),
    (
        {"weight2": W2.double()},
        TypeError,
        "weight2 must have the dtype of x, torch.float32, got torch.float64",
    ),
]


@pytest.mark.isa_independent
@pytest.mark.parametrize("change, kind, message", CONV_ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_conv_same_errors(change, kind, message):
    arguments = {"x": X, "weight": W, "bias": B, "residual": torch.randn(2, 4, 7, 9), **change}
    check_error(fastda.conv_same, arguments, kind, f"conv_same: {message}")


@pytest.mark.isa_independent
@pytest.mark.parametrize("change, kind, message", BLOCK_ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_refiner_block_errors(change, kind, message):
    arguments = {"x": X, "weight1": W1, "bias1": B.new_zeros(5), "weight2": W2, "bias2": B[:3], **change}
    check_error(fastda.refiner_block, arguments, kind, f"refiner_block: {message}")


@pytest.mark.isa_independent
def test_raw_operators_refuse_what_does_not_fit():
    """They are reachable past the Python checks, and must not touch memory that is not theirs."""
    ops = torch.ops.fastda
    calls = [
        lambda: ops.conv_same(X, W[:, :2], None, None, False),
        lambda: ops.conv_same(X, W, B[:3], None, False),
        lambda: ops.conv_same(X, W, None, X, False),
        lambda: ops.conv_same_backward(X, X, W, None, True, True, True),
        lambda: ops.refiner_block(X, W1, None, W2[:2], None, False),
        lambda: ops.refiner_block_backward(X, X, X, X, W1, None, W2, *[True] * 5),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"must|does not fit"):
            call()


class PlainRefiner(nn.Module):
    """`fastda.nn.Refiner` written with torch.nn alone."""

    def __init__(self, fused):
        super().__init__()
        self.first, self.blocks, self.last = (
            copy.deepcopy(m) for m in (fused.first, fused.blocks, fused.last)
        )

    def forward(self, x):
        h = F.relu(self.first(x))
        for b in self.blocks:
            h = F.relu(h + b.conv2(F.relu(b.conv1(h))))
        return self.last(h)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("in_channels, kernel", [(1, 3), (3, 3), (1, 7)])
def test_refiner_module(in_channels, kernel, memory_format):
    fused = Refiner(in_channels, 16, blocks=2, kernel_size=kernel)
    plain = PlainRefiner(fused).double()
    x = torch.randn(2, in_channels, 13, 11).contiguous(memory_format=memory_format)
    y, right = fused(x), plain(x.double())
    assert y.is_contiguous(memory_format=memory_format)
    assert error(y, right).relative_l2 < 2e-6
    y.square().mean().backward()
    right.square().mean().backward()
    expected = dict(plain.named_parameters())
    for name, p in fused.named_parameters():
        # Loose: gates near zero may differ between float32 and float64; kernels are judged above.
        assert error(p.grad, expected[name].grad).relative_l2 < 1e-3, name


@pytest.mark.isa_independent
def test_module_sizes_and_state():
    assert sum(p.numel() for p in Refiner.gaze().parameters()) == 296_129
    assert sum(p.numel() for p in Refiner.hand().parameters()) == 4_018_625
    fused = RefinerBlock(4, recompute_inner=True)
    assert set(fused.state_dict()) == {"conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"}
    assert "recompute_inner=True" in repr(fused)
    for module in (RefinerBlock, Refiner):
        with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
            module(kernel_size=4)
    with pytest.raises(ValueError, match=r"x must be \(N, C, H, W\), got \(3, 7, 9\)"):
        Refiner()(X[0])
