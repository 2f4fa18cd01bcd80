import inspect

import pytest
import torch

import fastda
from fastda import reference, registry, testing
from fastda.tools import verify

pytestmark = pytest.mark.isa_independent


def cases(**wanted):
    return [
        c for c in verify.cases(backends=["reference"]) if all(getattr(c, k) == v for k, v in wanted.items())
    ]


def operator(name):
    return next(op for op in registry.OPERATORS if op.name == name)


def public_functions():
    return {n for n in reference.__all__ if inspect.isfunction(getattr(reference, n))}


def test_every_public_operator_is_in_the_table_once():
    assert sorted(op.name for op in registry.OPERATORS) == sorted(public_functions())


@pytest.mark.parametrize("op", registry.OPERATORS, ids=lambda op: op.name)
def test_signatures_agree_and_every_argument_is_covered(op):
    fast, plain = (inspect.signature(getattr(m, op.name)) for m in (fastda, reference))
    assert [(p.name, p.kind, p.default) for p in fast.parameters.values()] == [
        (p.name, p.kind, p.default) for p in plain.parameters.values()
    ]
    covered = {name for options in op.options for name in (*options, *op.tensors(options, *op.sizes[0]))}
    assert covered == set(fast.parameters)


@pytest.mark.parametrize("op", registry.OPERATORS, ids=lambda op: op.name)
def test_every_operator_has_tolerances_for_every_dtype(op):
    for dtype in verify.DTYPES:
        for what in ("value", "x"):
            assert testing.tolerance(op.name, what, dtype).relative_l2 >= 0


def test_inputs_are_rounded_to_the_dtype_and_depend_on_the_seed():
    op = operator("grad_reverse")
    draws = [verify.draw_arguments(op, {}, (7, 3), torch.bfloat16, seed)[0]["x"] for seed in (0, 0, 1)]
    assert draws[0].dtype == torch.float64
    assert torch.equal(draws[0], draws[0].to(torch.bfloat16).double())
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("layout", verify.LAYOUTS)
def test_layouts_hold_the_values_and_are_what_they_are_called(layout):
    x = torch.randn(2, 3, 5, 7)
    y = verify.lay_out(x, layout)
    assert torch.equal(x, y)
    assert y.is_contiguous() == (layout == "contiguous")
    assert y.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda x, scale=1.0: WrongGradient.apply(x), "x"),
        (lambda x, scale=1.0: reference.grad_reverse(x, scale) * 1.01, "value"),
        (lambda x, scale=1.0: reference.grad_reverse(x, scale)[..., :1], "call"),
        (lambda x, scale=1.0: reference.grad_reverse(x.where(x != x.max(), torch.nan), scale), "value"),
    ],
    ids=["sign of the gradient", "value", "shape", "NaN"],
)
def test_a_wrong_kernel_is_found(monkeypatch, wrong, what):
    monkeypatch.setattr(fastda, "grad_reverse", wrong)
    found = cases(operator=operator("grad_reverse"), sizes=(7, 3), dtype=torch.float32, layout="contiguous")
    rows = [row for case in found for row in verify.check(case)]
    failed = {row.what for row in rows if not row.passed}
    assert what in failed
    assert all(row.used > 1 for row in rows if not row.passed)


def test_a_call_that_raises_is_a_failure_with_its_message(monkeypatch):
    def broken(x, scale=1.0):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(fastda, "grad_reverse", broken)
    (row,) = verify.check(cases(operator=operator("grad_reverse"))[0])
    assert not row.passed
    assert row.message == "RuntimeError: no kernel"
    assert row.as_dict()["error"] is None


@pytest.mark.parametrize("name", ["conv_same", "refiner_block", "patch_head_discriminator_loss"])
def test_inputs_keep_clear_of_the_edges_where_gradients_jump(name):
    op = operator(name)
    options = next((o for o in op.options if o.get("relu") or o.get("kind") == "hinge"), op.options[0])
    sizes = op.sizes[1]
    arguments, names = verify.draw_arguments(op, options, sizes, torch.float16, seed=3)
    exact = verify.evaluate(getattr(reference, name), arguments, names, seed=3)
    nudged = {
        n: v * (1 + 1e-4) if n in names and not n.startswith("bias") else v for n, v in arguments.items()
    }
    moved = verify.evaluate(getattr(reference, name), nudged, names, seed=3)
    for what in names:
        assert testing.error(moved[what], exact[what], 1.0).relative_l2 < 5e-3
