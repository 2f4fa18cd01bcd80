// Launching kernels: csrc/cuda/*.cu alone include it.
#pragma once

#include <cstdint>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "common/dtype.h"

#if !defined(__CUDACC__)
#include "cuda_host/device.h"
#endif

namespace fastda::cuda {

template <typename T>
struct Tag {
  using type = T;
};

// Calls f(Tag<T>{}) with the element type of `dtype`.
template <typename F>
void dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64: return f(Tag<double>{});
    case DType::bf16: return f(Tag<bf16>{});
    case DType::f16: return f(Tag<f16>{});
    default: return f(Tag<float>{});
  }
}

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if defined(__CUDACC__)

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int64_t shared_bytes_per_block() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// Lets a kernel have all the shared memory that a block may have, once on each device: with the size
// of a launch, two threads with different sizes would undo each other's.
inline void allow_shared_memory(const void* kernel, const char* name) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  if (!allowed.emplace(kernel, device).second) return;
  const cudaError_t status = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes_per_block()));
  if (status != cudaSuccess) allowed.erase({kernel, device});
  check(status, name);
}

// No synchronisation and no allocation: what it does can be captured into a CUDA graph.
template <typename... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
            size_t shared_bytes, void* stream, std::type_identity_t<Parameters>... arguments) {
  if (shared_bytes > (48 << 10)) allow_shared_memory(reinterpret_cast<const void*>(kernel), name);
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), name);
}

#else

inline int multiprocessors() { return cuda_host::device.multiprocessors; }
inline int64_t shared_bytes_per_block() {
  return int64_t(cuda_host::device.shared_bytes_per_block);
}

template <typename... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
            size_t shared_bytes, void*, std::type_identity_t<Parameters>... arguments) {
  cuda_host::launch(
      name, grid, threads, shared_bytes, [&] { kernel(arguments...); },
      reinterpret_cast<const void*>(kernel), cuda_host::packed(arguments...));
}

#endif

}  // namespace fastda::cuda
