"""Patch losses in a graph: backward twice, in sums, in part, with checkpoints."""

import math

import pytest
import torch
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode

import fastda
from fastda import nn, reference
from fastda.ops import patch_loss as ops
from tests import common
from tests.ops.patch_loss import arguments_of, calls, few, isa_independent, native


@calls
def test_a_graph_can_be_walked_twice(op, sizes, options):
    """The first backward hands its gradients over; what happens to them must not reach the second."""
    arguments = arguments_of(op, sizes, options)
    inputs = [arguments[n] for n in common.wanted(arguments)]

    def outputs(module):
        out = getattr(module, op)(**arguments)
        return [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]

    expected = outputs(reference)
    out = outputs(fastda)
    for factor in (1.0, -0.5, 3.0):
        weights = [torch.full_like(o, factor) for o in out]
        got = grad(out, inputs, weights, retain_graph=True)
        right = grad(expected, inputs, weights, retain_graph=True)
        torch.testing.assert_close(got, right)
        for g in got:
            g.fill_(math.nan)
    grad(out, inputs, [torch.ones_like(o) for o in out])
    with pytest.raises(RuntimeError, match="second time"):
        grad(out, inputs, [torch.ones_like(o) for o in out])


def test_a_loss_in_a_sum_of_losses():
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def total(module):
        d = module.patch_discriminator_loss(x, x.detach(), "softmax")
        return 0.5 * d + 2 * module.patch_generator_loss(x * 2) + x.square().mean()

    torch.testing.assert_close(grad(total(fastda), x), grad(total(reference), x))


@native
def test_gradients_are_computed_only_where_they_are_wanted():
    real, fake = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4, requires_grad=True)
    with torch.profiler.profile(record_shapes=True) as profile:
        assert fastda.patch_discriminator_loss(real, fake).requires_grad
        with torch.no_grad():
            assert not fastda.patch_discriminator_loss(real, fake).requires_grad
        assert not fastda.patch_discriminator_loss(real, fake.detach()).requires_grad
        with torch.inference_mode():
            assert not fastda.patch_generator_loss(fake).requires_grad
    asked = [e.concrete_inputs for e in profile.events() if e.name.startswith("fastda::")]
    assert [inputs[-2:] for inputs in asked[:3]] == [[False, True], [False, False], [False, False]]
    assert [inputs[-1] for inputs in asked[3:]] == [False]


@few
def test_several_gradients_at_once(op, sizes, options):
    arguments = arguments_of(op, sizes, options)
    inputs = [arguments[n] for n in common.wanted(arguments)]

    def batched(module):
        out = getattr(module, op)(**arguments)
        out = out[0] if isinstance(out, tuple) else out
        weights = torch.stack([torch.full_like(out, factor) for factor in (1.0, -0.5, 3.0)])
        return [
            grad(out, inputs, weights, is_grads_batched=True, retain_graph=True, allow_unused=True)
            for _ in range(2)
        ]

    torch.testing.assert_close(batched(fastda), batched(reference))


@isa_independent
@few
def test_compiled_autograd(op, sizes, options):
    arguments = arguments_of(op, sizes, options)
    inputs = [arguments[n] for n in common.wanted(arguments)]

    def loss(module):
        out = getattr(module, op)(**arguments)
        outs = out if isinstance(out, tuple) else (out,)
        return sum(3 * o.sum() for o in outs if o.requires_grad)

    expected = grad(loss(reference), inputs)
    ours = loss(fastda)
    for _ in range(2):
        for x in inputs:
            x.grad = None
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
            ours.backward(retain_graph=True)
        torch.testing.assert_close([x.grad for x in inputs], list(expected))


@isa_independent
def test_anomaly_mode_names_the_loss():
    x = torch.full((1, 1, 2, 2), math.nan, requires_grad=True)
    name = "_LossBackward"
    with (
        pytest.warns(UserWarning, match="patch_generator_loss"),
        pytest.raises(RuntimeError, match=f"Function '{name}' returned nan"),
        torch.autograd.detect_anomaly(check_nan=True),
    ):
        loss = fastda.patch_generator_loss(x, "bce")
        assert loss.grad_fn.name() == name
        loss.backward()


@isa_independent
def test_an_argument_changed_in_place_is_noticed_where_it_is_needed_again():
    """The first backward needs none of them: its gradients are of the values that the forward saw."""
    x = torch.randn(2, 2, 3, 4)
    y = (x.requires_grad_() * 1.0).detach().requires_grad_()
    expected = grad(fastda.patch_generator_loss(y), y)
    loss = fastda.patch_generator_loss(y)
    with torch.no_grad():
        y.mul_(2.0)
    torch.testing.assert_close(grad(loss, y, retain_graph=True), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad(loss, y)


@isa_independent
def test_an_error_in_the_reference_reaches_the_caller(monkeypatch):
    def broken(*arguments):
        raise ArithmeticError("broken on purpose")

    x = torch.randn(2, 2, 3, 4, requires_grad=True)
    loss = fastda.patch_generator_loss(x)
    monkeypatch.setitem(ops._OPERATORS, "patch_generator_loss", (1, broken))
    with pytest.raises(ArithmeticError, match="broken on purpose"):
        grad(loss, x, create_graph=True)


@native
def test_head_runs_as_one_operator():
    """So that logits, and their gradients, are nowhere to be materialised."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    features = torch.randn(2, 5, 3, 4, requires_grad=True)
    weight = torch.randn(2, 5, 1, 1, requires_grad=True)
    with Names():
        fastda.patch_head_discriminator_loss(features, features.detach(), weight, None)
    assert [name for name in seen if "detach" not in name] == ["fastda.patch_head_discriminator_loss.default"]


def test_a_scale_changed_after_forward_does_not_reach_the_gradient():
    scale = torch.tensor(0.3)
    a, b = torch.randn(2, 1, 3, 4, requires_grad=True), torch.randn(2, 1, 3, 4)
    loss = fastda.self_regularization(a, b, scale, reduction="sum")
    scale.fill_(7.0)
    assert torch.equal(grad(loss, a)[0], 0.3 * (a - b).sign())


def test_checkpointing_recomputes_the_loss():
    x = torch.randn(2, 2, 3, 4, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        saved = fastda.patch_generator_loss(x * 2)
    expected = grad(reference.patch_generator_loss(x * 2), x)
    for _ in range(2):
        torch.testing.assert_close(grad(saved, x, retain_graph=True), expected)
    loss = torch.utils.checkpoint.checkpoint(fastda.patch_generator_loss, x * 2, use_reentrant=False)
    torch.testing.assert_close(grad(loss, x), grad(reference.patch_generator_loss(x * 2), x))


@isa_independent
def test_autocast():
    d = nn.PatchDiscriminator.gaze()
    images = torch.randn(4, 1, 35, 55)
    with torch.autocast("cpu", torch.bfloat16):
        logits = d(images)
        assert logits.dtype == torch.bfloat16
        loss = fastda.refiner_loss(logits, logits[:, :1], images[:, :, :9, :14], 0.5)
        head = fastda.patch_head_discriminator_loss(
            d.features(images).float(), d.features(images), d.head.weight, d.head.bias
        )
        plain_head = fastda.patch_discriminator_loss(logits, logits)
    assert loss.dtype == head.dtype == torch.float32
    torch.testing.assert_close(head, plain_head, rtol=1e-2, atol=1e-2)
    assert all(p.grad is None for p in d.parameters())
    head.backward()
    assert d.head.weight.grad.dtype == torch.float32
