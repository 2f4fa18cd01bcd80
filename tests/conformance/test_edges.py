"""edges.py on the CPU's kernels."""

import pytest
import torch

from fastda import backend
from tests.conformance import edges

pytestmark = pytest.mark.skipif(backend.native is None, reason="the native extension is not built")


@pytest.mark.parametrize("check", [*edges.EVERYWHERE, *edges.CPU], ids=lambda check: check.__name__)
def test_edge(check):
    check(torch.ops.fastda)
