import os
import zlib

import pytest
import torch

import fastda.ops.grad_reverse
import fastda.ops.patch_loss
from fastda.testing import poisoned_allocations
from tests.common import needs_node


def pytest_collection_modifyitems(items):
    if os.environ.get("FASTDA_SLOW_TESTS") == "1":
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: set FASTDA_SLOW_TESTS=1 to run it"))


@pytest.fixture(autouse=True)
def poisoned_and_seeded(request):
    """Unwritten outputs show as NaN; random inputs are fresh for each test and reproducible by its name."""
    seed = os.environ.get("FASTDA_TEST_SEED")
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()) if seed is None else int(seed))
    with poisoned_allocations():
        yield


@pytest.fixture(params=[pytest.param("node", marks=needs_node), "function"])
def route(request, monkeypatch):
    """The C++ autograd node, then what stands behind it: as where FASTDA_AUTOGRAD_EXTENSION=0."""
    if request.param == "function":
        monkeypatch.setattr(fastda.ops.grad_reverse, "_node", None)
        monkeypatch.setattr(fastda.ops.patch_loss, "_node", None)
    return request.param
