import contextlib
import os
import zlib

import pytest
import torch

import fastda.ops.grad_reverse
import fastda.ops.patch_loss
from fastda import backend
from fastda.testing import poisoned_allocations
from tests import lanes
from tests.common import needs_node

# PyTorch 2.11 may wait 300 s at its end for the processes that would compile beside this one.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_generate_tests(metafunc):
    if "lane" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("lanes")
        metafunc.parametrize("lane", lanes.parameters(marker.args if marker else ()))


def pytest_collection_modifyitems(items):
    if os.environ.get("FASTDA_SLOW_TESTS") == "1":
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: set FASTDA_SLOW_TESTS=1 to run it"))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    lane = pyfuncitem.callspec.params.get("lane") if hasattr(pyfuncitem, "callspec") else None
    if lane is None or lane.here:
        return None
    lanes.run_elsewhere(lane, pyfuncitem.nodeid)
    return True


def pytest_runtestloop(session):
    if lanes.PIPE is None or session.testsfailed:
        return None
    lanes.serve(session)
    return True


@pytest.fixture(autouse=True)
def poisoned_and_seeded(request):
    """Unwritten outputs show as NaN; random inputs are fresh for each test and reproducible by its name."""
    seed = os.environ.get("FASTDA_TEST_SEED")
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()) if seed is None else int(seed))
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    lane = given.get("lane")
    if lane is not None and lane.here and hasattr(given.get("op"), "name"):
        lacking = backend.lacking(lane.backend, given["op"].name)
        if lacking:
            pytest.skip(lacking)
    with (
        poisoned_allocations(),
        lane.serving() if lane is not None and lane.here else contextlib.nullcontext(),
    ):
        yield


@pytest.fixture(params=[pytest.param("node", marks=needs_node), "function"])
def route(request, monkeypatch):
    """The C++ autograd node, then what stands behind it: as where FASTDA_AUTOGRAD_EXTENSION=0."""
    if request.param == "function":
        monkeypatch.setattr(fastda.ops.grad_reverse, "_node", None)
    return request.param
