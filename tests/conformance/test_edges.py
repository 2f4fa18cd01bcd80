"""What most inputs do not show, one function for each: edges.py."""

import pytest

from tests import lanes
from tests.conformance import edges

pytestmark = pytest.mark.lanes(*lanes.KERNELS)


@pytest.mark.parametrize("check", edges.EVERYWHERE, ids=lambda check: check.__name__)
def test_edge(lane, check):
    check(lane.ops)


@pytest.mark.lanes(*lanes.CPU)
@pytest.mark.parametrize("check", edges.CPU, ids=lambda check: check.__name__)
def test_edge_of_the_cpu(lane, check):
    check(lane.ops)
