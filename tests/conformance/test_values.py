"""Values and all gradients against the reference in float64, as `fastda verify` compares them."""

import pytest

from fastda.tools import verify
from tests import lanes
from tests.conformance.cases import cases, every_dtype, every_operator


@pytest.mark.lanes(*lanes.EVERY)
@every_dtype
@every_operator
def test_values_and_gradients(lane, op, dtype):
    failed = []
    for seed, case in enumerate(cases(lane, op, dtype)):
        lane.shuffle(seed)
        failed += [row for row in verify.check(case) if not row.passed]
    assert not failed
    if lane.emulated and not op.name.startswith("grad_reverse"):
        assert lanes.launched(), "nothing of this ran through the device code"
