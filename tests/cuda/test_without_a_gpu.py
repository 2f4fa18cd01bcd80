"""CUDA code without a GPU: the check of what nvcc makes of it, and the errors of a call."""

import shutil

import pytest
import torch

import fastda
from fastda import backend

pytestmark = pytest.mark.isa_independent


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
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
