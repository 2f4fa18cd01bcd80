"""Bad input gives the same clear error on every lane: it names the operator and the argument."""

import torch
from torch import Tensor

import fastda
from fastda import backend
from fastda.tools import verify
from tests.conformance.cases import arguments_for, every_operator, small

CHANGES = {
    "not a tensor": lambda t: "text",
    "integers": lambda t: t.detach().to(torch.int64),
    "one dimension more": lambda t: t.unsqueeze(0),
    "fewer": lambda t: t.narrow(min(1, t.dim() - 1), 0, t.shape[min(1, t.dim() - 1)] // 2) if t.dim() else t,
    "another device": lambda t: t.to("meta"),
}


def raised(function, arguments):
    try:
        function(**arguments)
    except Exception as error:
        return type(error), str(error)
    return None


@every_operator
def test_errors_are_the_same(lane, op):
    function, checked = getattr(fastda, op.name), 0
    for options in op.options[:: max(1, len(op.options) // 3)]:
        exact, _ = verify.draw_arguments(op, options, small(op), torch.float32, 0)
        given = arguments_for(lane, exact, torch.float32)
        for name, value in given.items():
            if not isinstance(value, Tensor):
                continue
            for change, apply in CHANGES.items():
                changed = {**given, name: apply(value)}
                with backend.use_backend("reference"):
                    expected = raised(function, changed)
                if expected is None or expected[0] not in (TypeError, ValueError):
                    continue  # it is a valid call, or one of torch's own errors
                assert raised(function, changed) == expected, (name, change)
                assert expected[1].startswith(f"{op.name}: "), (name, change, expected)
                checked += 1
    assert checked
