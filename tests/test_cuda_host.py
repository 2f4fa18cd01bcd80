"""CUDA device code without a GPU: executed on the CPU under AddressSanitizer (tests/cuda_host)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_host import build

from fastda import backend

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.isa_independent,
    pytest.mark.skipif(
        backend.native is None, reason="its schemas are the native extension's, which is not built"
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="the executor switches stacks as Linux has them"),
]


# Groups run side by side.
GROUPS = {
    "planted": "planted",
    "block": "refiner_block and not planted",
    "conv": "conv and not planted",
    "rest": "not (planted or refiner_block or conv)",
}


@pytest.mark.parametrize("group", GROUPS)
def test_executed_on_the_cpu(group):
    build.build()
    file = str(HERE / "cuda_host_executed.py")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-k",
            GROUPS[group],
            file,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, **build.environment()},
        cwd=HERE.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
