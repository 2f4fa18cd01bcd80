"""torch.compile around every operator: one graph, eager's numbers."""

import functools

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

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


@pytest.mark.lanes("triton")
@pytest.mark.parametrize("op, tensors", [("conv_same", 1), ("refiner_block", 2)])
def test_a_program_follows_torchs_setting_of_tf32(lane, op, tensors, request):
    """Compiled again where it has changed, in forward and backward; what was compiled before is kept."""
    torchs = torch.backends.cudnn.conv
    request.addfinalizer(functools.partial(setattr, torchs, "fp32_precision", torchs.fp32_precision))
    programs = []

    def compiler(graph, _):
        calls = [node for node in graph.graph.nodes if str(node.target).startswith(f"fastda_triton.{op}")]
        for node in calls:
            values = {a.name: v for a, v in zip(node.target._schema.arguments, node.args, strict=False)}
            programs.append((node.target._schema.name, values.get("tf32", False)))
        return graph.forward

    fast, counter = compiled(getattr(fastda, op), aot_autograd(fw_compiler=compiler, bw_compiler=compiler))
    x, weight = torch.randn(1, 3, 5, 6, requires_grad=True), torch.randn(3, 3, 3, 3)
    names = [f"fastda_triton::{op}", f"fastda_triton::{op}_backward"]
    for setting, compilations in (("ieee", 1), ("tf32", 2), ("ieee", 2), ("tf32", 2)):
        torchs.fp32_precision = setting
        programs.clear()
        fast(x, *(weight, None) * tensors).sum().backward()
        assert counter.frame_count == compilations
        assert not programs or programs == [(name, setting == "tf32") for name in names]
