"""Tests of the device code that need the executor (tests/cuda_host): they run on the lane `emulated`."""

import importlib

import pytest


@pytest.fixture
def cuda_host(lane):
    """The executor's module; nothing where the test runs in another process."""
    return importlib.import_module("cuda_host") if lane.here else None


@pytest.fixture
def ops(lane):
    return lane.ops if lane.here else None
