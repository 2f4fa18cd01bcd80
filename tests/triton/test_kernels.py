"""Triton's kernels with the blocks that a GPU would run, and what their operators promise."""

import functools
import importlib

import pytest
import torch

import fastda
from fastda import reference
from fastda.registry import KINDS
from tests.conformance.raw import LAST, check_discriminator, conv_case, matches

pytestmark = [pytest.mark.lanes("triton"), pytest.mark.isa_independent]


def module(name):
    """Of fastda.triton, which imports Triton: not where the test does not run."""
    return importlib.import_module(f"fastda.triton.{name}")


@pytest.fixture
def ops(lane):
    return lane.ops if lane.here else None


@pytest.mark.parametrize("kind", KINDS)
def test_programs_of_several_blocks(ops, kind, monkeypatch):
    patch_loss = module("patch_loss")
    pieces = functools.partial(module("common").pieces, limit=2)
    monkeypatch.setattr(patch_loss, "pieces", pieces)
    monkeypatch.setattr(patch_loss, "BLOCK", 32)
    c = 2 if kind == "softmax" else 1
    real, fake = torch.randn(3, c, 9, 14), torch.randn(2, c, 9, 14)
    check_discriminator(ops, real, fake, kind, real_weight=torch.rand(3, 1, 9, 14))
    a, b = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 7)
    loss, *_ = ops.self_regularization(a, b, None, 1.0, "sum", True, True)
    matches("self_regularization", "value", loss, (a.double() - b.double()).abs().sum(), torch.float32)


# What a GPU runs, and what the interpreter prefers: blocks within one tap or across, one piece or several.
ROWS = ("interpreter", "half", "half gather", "ieee", "double")


def use_row(name, monkeypatch):
    def configuration(x, tf32, table, memory_format):
        return name, table[name]

    monkeypatch.setattr(module("refiner_conv"), "configuration", configuration)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("sizes", [(1, 32, 16, 3, 9, 13), (2, 5, 66, 3, 7, 5)])
def test_conv_same_with_the_blocks_of_a_gpu(ops, sizes, name, monkeypatch):
    use_row(name, monkeypatch)
    for memory_format in (torch.contiguous_format if "gather" in name else LAST,):
        x, weight, bias, residual, grad = conv_case(*sizes, torch.float32, memory_format)
        y = ops.conv_same(x, weight, bias, residual, True)
        expected = reference.conv_same(
            *(t.double() for t in (x, weight, bias)), residual=residual.double(), relu=True
        )
        matches("conv_same", "value", y, expected, torch.float32)
        out = ops.conv_same_backward(grad, x, weight, y, True, True, True)
        exact = [t.double().requires_grad_() for t in (x, weight, bias)]
        gated = torch.where(y <= 0, 0, grad).double()
        for what, o, e in zip(
            ("x", "weight", "bias"),
            out,
            torch.autograd.grad(reference.conv_same(*exact), exact, gated),
            strict=False,
        ):
            matches("conv_same", what, o, e, torch.float32)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["batch_norm_act", "instance_norm_act"])
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e6])
def test_norm_with_the_blocks_of_a_gpu(ops, name, layout, mean, monkeypatch):
    """Several pieces of several blocks, and a mean far above the deviation."""
    norm = module("norm")
    monkeypatch.setattr(norm, "BLOCK", 512)
    monkeypatch.setattr(norm, "CHANNELS", 8)
    monkeypatch.setattr(norm, "BLOCK_P", 2)
    monkeypatch.setattr(norm, "pieces", lambda total, block, limit: module("common").pieces(total, block, 3))
    x = (torch.randn(3, 11, 17, 19) + mean).contiguous(memory_format=layout)
    grad = torch.randn_like(x)
    weight, bias = (torch.randn(11, requires_grad=True) for _ in range(2))
    leaves = x.requires_grad_(), weight, bias
    exact = [t.detach().double().requires_grad_() for t in leaves]
    actual, expected = getattr(fastda, name)(*leaves), getattr(reference, name)(*exact)
    got = torch.autograd.grad(actual, leaves, grad)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    for a, e in zip((actual, *got), (expected, *wanted), strict=True):
        assert (a.double() - e).norm() < 4e-7 * e.norm()


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "values", [(1e30, 3e30), (torch.inf,), (torch.inf, torch.inf), (torch.nan,)], ids=str
)
def test_moments_that_float32_cannot_hold(ops, values, layout, monkeypatch):
    """As PyTorch stores them, in the pieces before and after, and none of other channels."""
    norm = module("norm")
    monkeypatch.setattr(norm, "BLOCK", 128)
    x = torch.randn(2, 3, 8, 9)
    for i, value in enumerate(values):
        x[i, 1, 4, 5 + i] = value
    _, mean, variance = ops.norm_act(
        x.contiguous(memory_format=layout), None, None, None, None, None, False, 1e-5, None
    )
    wide = x.double()
    torch.testing.assert_close(mean, wide.mean((0, 2, 3)), rtol=1e-6, atol=1e-6, equal_nan=True)
    if x.isfinite().all():
        torch.testing.assert_close(variance, wide.var((0, 2, 3), correction=0), rtol=1e-6, atol=1e-6)
    else:
        assert variance.isnan().tolist() == [False, True, False]


def test_operators_are_torch_operators(ops):
    x, weight, _, _, grad = conv_case(2, 3, 3, 3, 5, 7, torch.float32)
    logits = torch.randn(2, 2, 3, 4)
    for name, arguments in (
        ("grad_reverse_backward", (x, torch.rand(2))),
        ("patch_discriminator_loss", (logits, logits, None, None, "softmax", "mean", 0.1, True, False)),
        ("self_regularization", (x, x.contiguous(memory_format=LAST), None, 0.5, "mean", True, False)),
        ("patch_loss_scale_", (x.clone(), logits.clone(), torch.tensor(2.0))),
        ("relu_max_pool", (x, (3, 3), (2, 2), (1, 1), False, True, True)),
        ("relu_max_pool_backward", (x, torch.zeros_like(x).byte(), (10, 14), False, (2, 2), (2, 2), (0, 0))),
        ("norm_act", (x, x[0, :, 0, 0], None, None, None, x, True, 1e-5, 0.1)),
        (
            "norm_act_backward",
            (x, x, None, None, *torch.rand(2, 3).double(), x, False, True, 1e-5, 0.1, *[True] * 4),
        ),
        ("conv_same_backward", (grad, x, weight, None, True, True, False)),
    ):
        torch.library.opcheck(getattr(ops, name).op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiled_without_a_graph_break(ops):
    x, weight, bias, _, _ = conv_case(2, 3, 3, 3, 5, 7, torch.float32)
    scale = torch.rand(2)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]

    def function(x, weight, bias):
        y = fastda.conv_same(
            fastda.refiner_block(x, weight, bias, weight, bias), weight, bias, residual=x, relu=True
        )
        return fastda.grad_reverse(y, scale).square().mean()

    expected = function(*inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, expected)
    for g, e in zip(
        torch.autograd.grad(compiled, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(g, e)
