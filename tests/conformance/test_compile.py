"""torch.compile around every operator: one graph, eager's numbers."""

import pytest
import torch

import fastda
from fastda.testing import assert_matches
from fastda.tools import verify
from tests import lanes
from tests.common import compiled
from tests.conformance.cases import arguments_for, every_operator, small


# The emulated device's operators have no shape functions.
@pytest.mark.lanes(*(lane.name for lane in lanes.LANES if not lane.emulated))
@every_operator
def test_compiled_without_a_break(lane, op):
    function = getattr(fastda, op.name)
    options = op.large_options if op.large_options is not None else op.options[-1]
    exact, names = verify.draw_arguments(op, options, small(op), torch.float32, 0)
    given = arguments_for(lane, exact, torch.float32)
    fast, counter = compiled(function, "aot_eager")
    expected = verify.evaluate(function, given, names, 0)
    for what, actual in verify.evaluate(fast, given, names, 0).items():
        assert_matches(op.name, what.split()[0], actual, expected[what])
    assert counter.frame_count == 1
