"""The convolutions: what is not finite, the same bits, only what is needed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastda
from fastda import reference
from fastda.ops.refiner_conv import checked_refiner_block
from tests.common import (
    assert_same_bits_with_threads,
    check_against_reference,
    results,
    wanted,
)
from tests.ops.refiner_conv import CHANNELS_LAST, block, conv, images_as


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
    # A bias' gradient is one sum a channel of a small image: its error scatters by a fifth from draw to draw.
    draws = [_block_with_the_same_gates(shape, k, memory_format) for _ in range(3 if k == 7 else 1)]

    def relative_l2(i):
        errors = sum((got[i].double() - right[i]).square().sum() for got, right in draws)
        return (errors / sum(right[i].square().sum() for _, right in draws)).sqrt().item()

    bounds = {"value": 1.5e-6, "x": 2e-6, "weight1": 1e-5, "bias1": 2e-6, "weight2": 1e-5, "bias2": 2e-6}
    for i, (name, bound) in enumerate(bounds.items()):
        assert relative_l2(i) <= bound, name
    assert max((got[0].double() - right[0]).abs().max() for got, right in draws) <= 3e-5


def _block_with_the_same_gates(shape, k, memory_format):
    """Value and gradients of a random block, and the exact ones for the ReLU masks that it has."""
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
    return [y, *got], [exact.detach(), *right]


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
    assert_same_bits_with_threads(fastda.refiner_block, arguments, (1, 2, 2, 1, 3))


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
