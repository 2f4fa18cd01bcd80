"""The executor itself: instructions, threads, what it stops at."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.lanes("emulated"), pytest.mark.isa_independent]
SEEDS = range(5)

# Where an entry of a fragment lies in its matrix, stored column by column, as CUTLASS has it
# (mma_traits_sm80.hpp): ((sizes of the lane), (sizes of the register)) : ((strides), (strides)).
LAYOUTS = {
    16: {
        "a": (((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128))),
        "b": (((4, 8), (2, 2)), ((16, 1), (8, 64))),
    },
    8: {"a": (((4, 8), (2, 2)), ((16, 1), (8, 64))), "b": (((4, 8), (2,)), ((8, 1), (32,)))},
}
SUMS = (((4, 8), (2, 2)), ((32, 1), (16, 8)))


def fragments(matrix, layout):
    """[lane, register] of a matrix given as [row, column]."""
    (lane_sizes, sizes), (lane_strides, strides) = layout
    flat = matrix.T.reshape(-1)  # column by column
    places = np.zeros((32, int(np.prod(sizes))), dtype=int)
    for shape, steps, axis in ((lane_sizes, lane_strides, 0), (sizes, strides, 1)):
        index = np.arange(places.shape[axis])
        offset = np.zeros_like(index)
        for size, stride in zip(shape, steps, strict=True):
            offset += index % size * stride
            index = index // size
        places += offset[:, None] if axis == 0 else offset[None, :]
    return flat[places]


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_executor_multiplies_as_the_instruction_does(cuda_host, kind):
    depth = 8 if kind == "tf32" else 16
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}[kind]
    a, b = torch.randn(16, depth).to(dtype), torch.randn(8, depth).to(dtype)
    words = []
    for x, name in ((a, "a"), (b, "b")):
        bits = x.view(torch.int32 if kind == "tf32" else torch.int16).numpy()
        bits = fragments(bits, LAYOUTS[depth][name])
        words.append(np.ascontiguousarray(bits).view(np.uint32))
    d = torch.randn(16, 8).numpy()
    out = cuda_host.mma(("bf16", "f16", "tf32").index(kind), *words, fragments(d, SUMS))
    expected = d + (a.double() @ b.double().T).numpy()
    assert np.allclose(out, fragments(expected, SUMS), atol=2e-2 if kind == "tf32" else 1e-5)
    assert (out == fragments(expected, SUMS)).mean() < 0.9 or kind != "tf32"  # the low bits are not looked at


@pytest.mark.parametrize("transposed", [False, True])
def test_executor_loads_matrices_as_the_instruction_does(cuda_host, transposed):
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    out = cuda_host.load_matrices(matrices.reshape(-1).view(np.uint32), transposed)
    for m, lane in itertools.product(range(4), range(32)):
        matrix = matrices[m].T if transposed else matrices[m]
        assert tuple(out[lane, m : m + 1].view(np.uint16)) == tuple(matrix[lane // 4, lane % 4 * 2 :][:2])


def test_executor_runs_threads_in_many_orders_and_sums_the_same(cuda_host):
    values = np.random.default_rng(0).standard_normal(640).astype(np.float32)
    sums = [cuda_host.sum(values, 0) for seed in range(12) if cuda_host.set_seed(seed) is None]
    assert all((s == sums[0]).all() for s in sums)
    assert np.allclose(sums[0], values.reshape(5, 128).sum(1), atol=1e-4)


def test_executor_shuffles(cuda_host):
    values = np.arange(-32, 32, dtype=np.int32)
    warps = values.reshape(2, 32)
    expected = 100 * warps[:, 3:4] + warps[:, np.arange(32) ^ 5]
    assert (cuda_host.shuffle(values).reshape(2, 32) == expected).all()


FAULTS = {
    1: "no thread can go on: .*ended.*__syncthreads",
    2: "__syncthreads at .* while others wait in one at",
    3: "the warp parts ways",
    7: "misaligned access of 16 bytes",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_executor_stops_at(cuda_host, fault, seed):
    cuda_host.set_seed(seed)
    with pytest.raises(RuntimeError, match=FAULTS[fault]):
        cuda_host.sum(np.zeros(640, np.float32), fault)
    assert not cuda_host.sum(np.zeros(640, np.float32), 0).any()


def test_executor_fills_shared_memory_with_nan(cuda_host):
    assert np.isnan(cuda_host.sum(np.zeros(640, np.float32), 4)).all()


@pytest.mark.parametrize("fault", [5, 6])
def test_executor_sees_accesses_out_of_bounds(cuda_host, fault):
    code = f"import torch, cuda_host, numpy; cuda_host.sum(numpy.zeros(640, numpy.float32), {fault})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


def test_executor_refuses_what_a_device_would(cuda_host):
    for threads, shared, message in (
        (33, 0, "32, 64"),
        (2048, 0, "32, 64"),
        (32, (227 << 10) + 1, "shared memory"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cuda_host.launch_bad(threads, shared)
