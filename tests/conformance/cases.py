"""Cases of the conformance tests, from the rows of `fastda.tools.verify`."""

import itertools

import pytest
import torch
from torch import Tensor

import fastda
from fastda import backend, reference, registry
from fastda.testing import error, tolerance
from fastda.tools import verify

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

every_operator = pytest.mark.parametrize("op", registry.OPERATORS, ids=lambda op: op.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def cases(lane, op, dtype):
    """All of `fastda verify`; on an interpreter every option once, sizes and layouts in turn."""
    if not lane.interpreted:
        yield from (c for c in verify.cases([op.name], [lane.backend], [lane.device]) if c.dtype == dtype)
        return
    # The dtypes start at different places; lengths with a common factor would always meet alike.
    turns = itertools.cycle(itertools.product(op.sizes, verify.LAYOUTS))
    turns = (turn for i, turn in enumerate(turns) if i % 7 != 3)
    turns = itertools.islice(turns, 3 * DTYPES.index(dtype), None)
    for option in range(len(op.options)):
        sizes, layout = next(turns)
        yield verify.Case(op, option, sizes, dtype, layout, lane.backend, lane.device)


def few(op, lane=None, dtype=torch.float32):
    """One of the options for each set of arguments and kind of loss, of those that `lane` has kernels of."""
    chosen = {}
    for options in op.options:
        named = [f"{op.name} with {n}={v!r}" for n, v in options.items()]
        if lane is not None and any(backend.lacking(lane.backend, name) for name in named):
            continue
        if op.name == "conv2d" and "stride" in options and dtype != torch.float32:
            continue
        given = tuple(n for n, v in options.items() if v and n not in ("reduction", "return_accuracy"))
        chosen.setdefault((options.get("kind"), given), options)
    return chosen.values()


def small(op):
    """Sizes with several of everything, and images that are larger than the filter on both sides."""
    convolutions = {"conv_same": (2, 3, 5, 3, 7, 9), "refiner_block": (2, 5, 3, 7, 9)}
    return convolutions.get(op.name, op.sizes[1])


def arguments_for(lane, exact, dtype, layout="contiguous"):
    """These arguments in the dtype, on the device and in the layout."""
    return {
        name: verify.lay_out(value.to(lane.device, dtype), layout) if isinstance(value, Tensor) else value
        for name, value in exact.items()
    }


def judge(op, options, sizes, dtype, actual, expected):
    """What of `actual` is not within its tolerance."""
    magnitudes, wrong = op.magnitudes(options, *sizes), []
    assert actual.keys() == expected.keys()
    for what, wanted in expected.items():
        got = error(actual[what], wanted, magnitudes.get(what, 0.0))
        if not got.within(tolerance(op.name, what.split()[0], dtype)):
            wrong.append((verify.describe(options), what, got))
    return wrong


def compare(lane, op, options, sizes, dtype, exact, names, layout="contiguous"):
    """Values and gradients of the lane against the reference in float64: what is wrong."""
    expected = verify.evaluate(getattr(reference, op.name), exact, names, 0)
    if op.name.startswith("grad_reverse"):
        # The reference is a formula and has no gradient where x is not finite; the reversal has.
        finite = {**exact, "x": exact["x"].nan_to_num(0, 0, 0)}
        expected["x"] = verify.evaluate(getattr(reference, op.name), finite, names, 0)["x"]
    given = arguments_for(lane, exact, dtype, layout)
    actual = verify.evaluate(getattr(fastda, op.name), given, names, 0)
    return judge(op, options, sizes, dtype, actual, expected)
