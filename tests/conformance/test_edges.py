"""edges.py on the CPU's kernels."""

import pytest
import torch

from fastda import backend
from tests.conformance import edges

pytestmark = pytest.mark.skipif(backend.native is None, reason="the native extension is not built")


@pytest.mark.parametrize("check", edges.EVERYWHERE, ids=lambda check: check.__name__)
def test_edge(check):
    check(torch.ops.fastda)


@pytest.mark.parametrize("check", edges.CPU, ids=lambda check: check.__name__)
def test_edge_of_the_cpu(check):
    check(torch.ops.fastda)
