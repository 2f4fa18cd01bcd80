"""CUDA operators on the emulated device (tests/cuda_host); for the lanes `emulated` and `ptx`.

Importing this lets the backend `cuda` serve CPU tensors.
"""

import os
from pathlib import Path

import cuda_host
import torch

from fastda import backend, registry

library = torch.library.Library("fastda_cuda_host", "DEF")
for name in registry.RAW:
    library.define(str(getattr(torch.ops.fastda, name).default._schema).removeprefix("fastda::"))
ops = torch.ops.fastda_cuda_host

# What runs in the place of the kernels that g++ compiled: nvcc's PTX of the same sources.
if os.environ.get("FASTDA_TEST_PTX"):
    cuda_host.load_ptx(Path(os.environ["FASTDA_TEST_PTX"]).read_text())

_why_not, _kernels = backend.why_not, backend.kernels
backend.why_not = lambda b, d: None if b == "cuda" else _why_not(b, d)
backend.kernels = lambda b: ops if b == "cuda" else _kernels(b)

A100, H100 = 163 << 10, 227 << 10  # shared memory of a block, bytes


def reset():
    """A small H100, threads in their first order, nothing recorded, no TF32."""
    cuda_host.set_seed(0)
    cuda_host.set_device(3, H100)
    cuda_host.skip_barrier("", 0)
    cuda_host.forget()
    cuda_host.ptx_forget()
    torch.backends.cudnn.conv.fp32_precision = "ieee"
