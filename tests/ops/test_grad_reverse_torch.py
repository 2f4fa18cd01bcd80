"""Gradient reversal in torch's machinery: transforms, compilers, hooks, processes."""

import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

from fastda import backend, grad_reverse, grad_reverse_linear
from fastda.testing import assert_matches
from tests.common import (
    both_routes,
    check_compiled,
    check_opcheck,
    check_transforms,
    compiled,
    draw,
    needs_node,
)
from tests.ops.grad_reverse import DTYPES, LAYOUTS, ROOT, calls, grads_of, independent, leaf, scales

native = pytest.mark.skipif(backend.native is None, reason="the native extension is not built")


@native
def test_opcheck_of_the_raw_operator():
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for grad in (torch.randn(3, 8)[:, ::2], torch.randn(4, 3).t().bfloat16(), image):
        for scale in (torch.tensor(0.7), torch.rand(grad.shape[0])):
            check_opcheck("grad_reverse_backward", grad, scale)


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_raw_operator(dtype):
    for shape in ((0, 3), (1,), (129, 33), (5, 3, 37, 53), (2, 70001)):
        for layout in LAYOUTS.values():
            grad = layout(torch.randn(shape).to(dtype))
            for scale, exact in scales(shape[0]).values():
                if isinstance(scale, torch.Tensor):
                    out = torch.ops.fastda.grad_reverse_backward(grad, scale)
                    factor = exact.view(-1, *(1 for _ in shape[1:])) if exact.dim() else exact
                    assert_matches("grad_reverse", "grad", out, -factor * grad.double(), dtype)
    for shape, wrong in (((3,), (2,)), ((3,), (3, 1)), ((), (1,)), ((0,), (0, 0))):
        grad, scale = torch.ones(shape), torch.ones(wrong)
        with pytest.raises(RuntimeError, match="grad_reverse_backward: scale must be 0-dim"):
            torch.ops.fastda.grad_reverse_backward(grad, scale)
    with pytest.raises(RuntimeError, match="grad_reverse_backward: dtype must be"):
        torch.ops.fastda.grad_reverse_backward(torch.ones(3, dtype=torch.int32), torch.tensor(1.0))


def tensor_scale(scale, n):
    return {"float": scale, "0-dim": torch.tensor(scale), "per sample": torch.full((n,), scale)}


@independent
@pytest.mark.parametrize("kind", ["float", "0-dim", "per sample"])
def test_transforms(kind):
    scale = tensor_scale(0.7, 3)[kind]
    check_transforms("grad_reverse", draw("grad_reverse", (3, 2)) | {"scale": scale}, compile=kind == "0-dim")
    arguments = draw("grad_reverse_linear", (3, 2, 2), bias=True) | {"scale": scale}
    check_transforms("grad_reverse_linear", arguments, compile=kind == "float")


class Bare(torch.autograd.Function):
    """A reversal in the form that transforms ask for, without the way around them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return -grad


@independent
@pytest.mark.xfail(
    strict=True,
    reason="once torch gets this right, _torch.transforms_active and its reference can go",
)
def test_torch_still_needs_the_guard_around_transforms():
    x = torch.randn(3)
    compiled_grad, _ = compiled(torch.func.grad(lambda x: Bare.apply(x).sum()), "aot_eager")
    assert torch.equal(compiled_grad(x), -torch.ones(3))
    assert torch.equal(torch.func.jvp(Bare.apply, (x,), (torch.ones(3),))[1], -torch.ones(3))


@independent
def test_compiled_by_inductor():
    for op, arguments in calls(torch.tensor(0.7)):
        check_compiled(op, arguments)


@independent
@pytest.mark.parametrize("kind", ["float", "per sample"])
def test_compiled_with_other_scales(kind):
    for op, arguments in calls(tensor_scale(0.7, 5)[kind]):
        check_compiled(op, arguments, backend="aot_eager")


@independent
def test_no_compilation_follows_a_changing_scale():
    kinds = {"0-dim": 1, "per sample": 1}
    if torch.__version__ >= (2, 13):  # torch 2.11 makes a constant of every float
        kinds["float"] = 2
    for kind, most in kinds.items():
        for op, rest in ((grad_reverse, {}), (grad_reverse_linear, {"weight": torch.randn(2, 3)})):
            fast, counter = compiled(partial(op, **rest), "aot_eager")
            for step in range(10):
                x, scale = leaf(4, 3), tensor_scale(0.1 * step, 4)[kind]
                (dx,) = grads_of(fast(x, scale=scale), x)
                (expected,) = grads_of(op(x, scale=scale, **rest), x)
                torch.testing.assert_close(dx, expected)
            assert counter.frame_count <= most, (kind, op)


@independent
@needs_node
def test_compiled_autograd():
    weight = leaf(2, 3)

    def loss(x, scale):
        return (
            grad_reverse(x * 2, scale).sin().sum()
            + grad_reverse_linear(x * 2, weight, None, scale).cos().sum()
        )

    for scale in (0.5, torch.rand(4)):
        x = leaf(4, 3)
        expected = torch.autograd.grad(loss(x, scale), [x, weight])
        weight.grad = None
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
            loss(x, scale).backward()
        torch.testing.assert_close((x.grad, weight.grad), expected)


@independent
@both_routes
def test_checkpoints_and_saved_tensor_hooks():
    from torch.utils.checkpoint import checkpoint

    x, weight = leaf(4, 3), leaf(2, 3)

    def f(x):
        return grad_reverse_linear(grad_reverse(x, 0.5).sin(), weight, None, 0.3).cos()

    expected = grads_of(f(x), [x, weight])
    torch.testing.assert_close(grads_of(checkpoint(f, x, use_reentrant=False), [x, weight]), expected)
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(grads_of(f(x), [x, weight]), expected)


@independent
@both_routes
def test_inference_tensors_and_parameters():
    with torch.inference_mode():
        x = torch.ones(3, requires_grad=True)
    y = grad_reverse(x, 0.5)
    assert torch.equal(y, x)
    p = nn.Parameter(torch.ones(3))
    y = grad_reverse(p, 0.5)
    assert type(y) is torch.Tensor
    assert torch.equal(grads_of(y, p)[0], torch.full((3,), -0.5))


@independent
@both_routes
def test_anomaly_mode_names_the_reversal(route):
    x = leaf(3)
    name = "GradReverseBackward" if route == "node" else "_GradReverseBackward"
    assert grad_reverse(x).grad_fn.name() == name
    with (
        pytest.warns(UserWarning, match="grad_reverse"),
        pytest.raises(RuntimeError, match=f"Function '{name}' returned nan"),
        torch.autograd.detect_anomaly(check_nan=True),
    ):
        grad_reverse(x, math.nan).sum().backward()


@independent
def test_a_process_without_the_accelerator_gives_the_same():
    code = """
import torch, fastda
x, w = torch.arange(6.0).view(2, 3).requires_grad_(), torch.ones(4, 3)
fastda.grad_reverse(x, 0.5).sum().backward()
fastda.grad_reverse_linear(x, w, None, torch.tensor(0.5)).sum().backward()
print(x.grad.unique().tolist(), fastda.info()["autograd_extension"])
"""
    env = {**os.environ, "FASTDA_AUTOGRAD_EXTENSION": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "[-2.5] switched off by FASTDA_AUTOGRAD_EXTENSION=0", done.stderr
