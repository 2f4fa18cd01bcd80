// The Python module `cuda_host`: the executor's settings and record, and small kernels that test
// the executor itself. The operators are in torch.ops.fastda_cuda_host once the module is loaded.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/kernels/device.cuh"
#include "cuda_host/control.h"
#include "cuda_host/ptx.h"

namespace py = pybind11;

namespace {

using namespace fastda::cuda;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Words = py::array_t<uint32_t, py::array::c_style | py::array::forcecast>;

FASTDA_KERNEL(32) mma_kernel(int kind, const uint32_t* a, const uint32_t* b, float* d) {
  uint32_t fragment[4];
  for (int i = 0; i < 4; ++i) fragment[i] = a[threadIdx.x * 4 + i];
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = d[threadIdx.x * 4 + i];
  const uint32_t b0 = b[threadIdx.x * 2], b1 = b[threadIdx.x * 2 + 1];
  if (kind == 0) {
    mma(fastda::bf16{}, sum, fragment, b0, b1);
  } else if (kind == 1) {
    mma(fastda::f16{}, sum, fragment, b0, b1);
  } else {
    mma(float{}, sum, fragment, b0, b1);
  }
  for (int i = 0; i < 4; ++i) d[threadIdx.x * 4 + i] = sum[i];
}

FASTDA_KERNEL(32) load_matrices_kernel(const uint32_t* words, uint32_t* out, bool transposed) {
  FASTDA_DYNAMIC_SHARED(shared);
  for (unsigned i = threadIdx.x; i < 128; i += 32)
    reinterpret_cast<uint32_t*>(shared)[i] = words[i];
  __syncthreads();
  uint32_t r[4];
  if (transposed) {
    load_matrices_transposed(r, shared + threadIdx.x * 16);
  } else {
    load_matrices(r, shared + threadIdx.x * 16);
  }
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = r[i];
}

// Sums of 128 values a block, the way the kernels do it, and what goes wrong on demand.
enum Fault {
  none,
  missed_barrier,
  two_barriers,
  divergent_shuffle,
  unwritten,
  outside_shared,
  outside_global,
  misaligned
};
FASTDA_KERNEL(128) sum_kernel(int fault, const float* values, float* sums) {
  FASTDA_SHARED(float, scratch, 4);
  FASTDA_DYNAMIC_SHARED(shared);
  auto* copies = reinterpret_cast<float*>(shared);  // [128]
  const unsigned t = threadIdx.x;
  if (t % 4 == 0)
    copy_async(copies + t + (fault == outside_shared) * 4, values + blockIdx.x * 128 + t, true);
  commit_copies();
  wait_copies<0>();
  if (fault == missed_barrier && t == 77) return;
  if (fault == two_barriers && t < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  float v = copies[127 - t];
  if (fault == divergent_shuffle && t >= 16) v += __shfl_xor_sync(0xffffffffu, v, 1);
  if (fault == misaligned) v += load_pack<4>(copies + 1).at[0];
  if (fault == outside_global && t == 127) v += values[gridDim.x * 128 + 1];
  const float total = block_sum<128>(v, scratch);
  if (t == 0)
    sums[blockIdx.x] =
        total + (fault == unwritten ? scratch[4 - 1] + reinterpret_cast<float*>(shared)[128] : 0);
}

FASTDA_KERNEL(64) shuffle_kernel(const int* values, int* out) {
  const unsigned t = threadIdx.x;
  out[t] =
      100 * __shfl_sync(0xffffffffu, values[t], 3) + __shfl_xor_sync(0xffffffffu, values[t], 5);
}

}  // namespace

PYBIND11_MODULE(cuda_host, m) {
  using namespace cuda_host;
  m.def("set_seed", [](uint64_t seed) { control.seed = seed; });
  m.def("set_device",
        [](int multiprocessors, size_t shared_bytes) { device = {multiprocessors, shared_bytes}; });
  m.def("skip_barrier", [](const std::string& file, unsigned line) {
    control.skipped_file = file;
    control.skipped_line = line;
  });
  m.def("barriers", [] { return record.barriers; });
  m.def("forget", [] { record = {}; });
  m.def("products", [] { return record.products; });
  m.def(
      "passes",
      [] {
        std::map<std::pair<std::string, unsigned>, double> passes;
        for (const auto& [at, count] : record.passes)
          passes[{std::string(at.first), at.second}] = double(count.first) / double(count.second);
        return passes;
      },
      "By file and line of every ldmatrix: passes over shared memory's banks per 8x8 matrix; 1 is "
      "the "
      "least.");
  m.def("launches", [] {
    py::list rows;
    for (const auto& l : record.launches)
      rows.append(py::make_tuple(l.name, py::make_tuple(l.grid.x, l.grid.y, l.grid.z), l.threads,
                                 l.shared_bytes));
    return rows;
  });

  m.def("load_ptx", &ptx::load, "Every launch from now on runs this PTX; \"\" goes back.");
  m.def("ptx_forget", &ptx::forget);
  m.def("ptx_skip", &ptx::skip);
  m.def(
      "ptx_executed",
      [] {
        py::dict kernels;
        for (const auto& [name, lines] : ptx::executed()) {
          py::list rows;
          for (const auto& [number, line] : lines)
            rows.append(py::make_tuple(number, line.text, line.count.runs, line.count.passes,
                                       line.count.least));
          kernels[py::str(name)] = rows;
        }
        return kernels;
      },
      "By kernel: (number, text, executions by a warp, passes over the banks, least passes) of "
      "every "
      "instruction that ran.");

  m.def("mma", [](int kind, Words a, Words b, Floats d) {
    py::array_t<float> out({32, 4});
    std::copy(d.data(), d.data() + 128, out.mutable_data());
    launch("mma", 1, 32, 0, [&] { mma_kernel(kind, a.data(), b.data(), out.mutable_data()); });
    return out;
  });
  m.def("load_matrices", [](Words words, bool transposed) {
    py::array_t<uint32_t> out({32, 4});
    launch("load_matrices", 1, 32, 512,
           [&] { load_matrices_kernel(words.data(), out.mutable_data(), transposed); });
    return out;
  });
  m.def("sum", [](Floats values, int fault) {
    const auto blocks = unsigned(values.size() / 128);
    py::array_t<float> out(blocks);
    const size_t bytes = 512 + (fault == unwritten ? 4 : 0);
    launch("sum", blocks, 128, bytes,
           [&] { sum_kernel(fault, values.data(), out.mutable_data()); });
    return out;
  });
  m.def("shuffle", [](py::array_t<int> values) {
    py::array_t<int> out(64);
    launch("shuffle", 1, 64, 0, [&] { shuffle_kernel(values.data(), out.mutable_data()); });
    return out;
  });
  m.def("launch_bad",
        [](unsigned threads, size_t bytes) { launch("bad", 1, threads, bytes, [] {}); });
}
