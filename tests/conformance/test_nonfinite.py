"""NaN, infinities and their differences, subnormal numbers: where the reference has them, nowhere else."""

import itertools

import pytest
import torch

import fastda
from fastda import reference
from fastda.testing import tolerance
from fastda.tools import verify
from tests import lanes
from tests.conformance.cases import arguments_for, compare, every_dtype, every_operator, few, small

# PyTorch's own convolutions in bfloat16, of which the reference is made, spread what is not finite: hence
# neither its lane nor options that a lane leaves to it.
pytestmark = pytest.mark.lanes(*lanes.KERNELS)
NAN, INF = float("nan"), float("inf")


def data(op, options, sizes):
    """Names of the tensors that come from outside: what is learned is finite or all is lost."""
    return [n for n in op.tensors(options, *sizes) if not n.startswith(("weight", "bias"))]


def plant(x, value, where=0):
    """In the midst of images: implementations differ in whether the zero around one, times NaN, counts."""
    x[(where, ..., x.shape[-2] // 2, x.shape[-1] // 2) if x.dim() == 4 else (where, ..., -1)] = value


@every_dtype
@every_operator
def test_one_input_that_is_not_finite(lane, op, dtype):
    wrong, sizes = [], small(op)
    for options, value in itertools.product(few(op, lane, dtype), (NAN, INF, -INF)):
        for name in data(op, options, sizes):
            exact, names = verify.draw_arguments(op, options, sizes, dtype, 0)
            plant(exact[name][:, :1] if exact[name].dim() == 4 else exact[name], value)
            wrong += [(value, name, *w) for w in compare(lane, op, options, sizes, dtype, exact, names)]
    assert not wrong


@every_dtype
@every_operator
def test_infinity_minus_infinity(lane, op, dtype):
    """Every input infinite at the same places: both classes of a patch, both images of a pair."""
    wrong, sizes = [], small(op)
    for options, value in itertools.product(few(op, lane, dtype), (INF, -INF)):
        exact, names = verify.draw_arguments(op, options, sizes, dtype, 0)
        for name in data(op, options, sizes):
            plant(exact[name], value)
        wrong += compare(lane, op, options, sizes, dtype, exact, names)
    assert not wrong


@every_dtype
@every_operator
def test_subnormal_numbers_are_not_flushed(lane, op, dtype):
    wrong, sizes = [], small(op)
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for options in few(op, lane, dtype):
        exact, _ = verify.draw_arguments(op, options, sizes, dtype, 0)
        for name in data(op, options, sizes):
            exact[name] = (exact[name] * torch.finfo(dtype).smallest_normal / 16).to(dtype).double()
        for name in [n for n in exact if n.startswith("bias") and exact[n] is not None]:
            exact[name] = torch.zeros_like(exact[name])
        if options.get("residual") is not None:
            exact["residual"] = exact["residual"] / 8
        with torch.no_grad():
            expected = getattr(reference, op.name)(**exact)
            actual = getattr(fastda, op.name)(**arguments_for(lane, exact, dtype))
        for a, e in zip(*(o if isinstance(o, tuple) else (o,) for o in (actual, expected)), strict=True):
            # Each of a few products is rounded to a multiple of the least number; a mean, too, unless it is
            # kept in a wider type, and what is left of it a normalisation divides by the root of 1e-5.
            mean_is_rounded = op.name.endswith("norm_act") and dtype.itemsize >= 4
            roundings = 64 * (316 if mean_is_rounded else 1)
            off = (a.double().cpu() - e).abs() - tolerance(op.name, "value", dtype).max_over_rms * e.abs()
            if not (off <= roundings * least).all():
                wrong.append((verify.describe(options), off.max().item() / least))
    assert not wrong
