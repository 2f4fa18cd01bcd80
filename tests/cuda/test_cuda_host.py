"""CUDA device code without a GPU: executed on the CPU (tests/cuda_host), as g++ compiles it and as PTX."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastda
from fastda import backend
from tests.cuda_host import build

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.isa_independent,
    pytest.mark.skipif(
        backend.native is None, reason="its schemas are the native extension's, which is not built"
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="the executor switches stacks as Linux has them"),
]


# Groups run side by side: what g++ compiled, then nvcc's PTX of the same kernels.
GROUPS = {
    "planted": "planted",
    "block": "refiner_block and not planted",
    "conv": "conv and not planted",
    "rest": "not (planted or refiner_block or conv)",
}
PTX_GROUPS = {
    "ptx-conv": "(conv or refiner_block) and not (planted or executor)",
    "ptx-rest": "from_the_ptx or not (conv or refiner_block or planted or executor)",
}
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@pytest.mark.parametrize("group", [*GROUPS, *(pytest.param(g, marks=needs_nvcc) for g in PTX_GROUPS)])
def test_executed_on_the_cpu(group):
    build.build()
    environment = {**os.environ, **build.environment()}
    if group in PTX_GROUPS:
        environment["FASTDA_TEST_PTX"] = str(build.PTX)
    selected = (GROUPS | PTX_GROUPS)[group]
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-k", selected]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(HERE / "cuda_host_executed.py")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=HERE.parents[1],
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_nvcc
def test_the_ahead_of_time_check_can_fail(tmp_path):
    from tests.cuda import compile_all as c

    source = c.CUDA / "refiner_block.cu"
    good = {row["kernel"]: row | {"threads": 256} for row in c.resources(source, "sm_90")}[
        "refiner_block bf16"
    ]
    assert good["registers"] > 64 and not c.faults(good | {"shared": c.TARGETS["sm_90"].block_shared})
    assert c.faults(good | {"shared": c.TARGETS["sm_90"].block_shared + 1})
    # 96 live values a thread, where 32 registers is all that a thread may have.
    starved = tmp_path / "starved.cu"
    starved.write_text(
        "__global__ void __launch_bounds__(1024, 2) starved_kernel(float* x) {"
        "  float v[96];"
        '  _Pragma("unroll") for (int i = 0; i < 96; ++i) v[i] = x[i * 1024 + threadIdx.x];'
        "  __syncthreads();"
        '  _Pragma("unroll") for (int i = 0; i < 96; ++i) x[i * 1024 + threadIdx.x] = v[i] * v[95 - i];'
        "}"
    )
    (row,) = c.resources(starved, "sm_90")
    assert row["kernel"] == "starved" and "spills" in c.faults(row | {"threads": 1024})


def test_a_call_without_a_gpu_gives_the_error_of_torch():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
        fastda.conv_same(torch.ones(1, 3, 4, 4, device="cuda"), torch.ones(3, 3, 3, 3, device="cuda"))
    if backend.native is not None and backend.native.cuda_architectures():
        key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        with pytest.raises(RuntimeError, match="tensors must be on a CUDA device"):
            torch.ops.fastda.grad_reverse_backward.default.redispatch(key, torch.ones(3), torch.ones(()))
