// Where a call of an operator on NVIDIA devices runs, and the name that it is registered under.
#pragma once

#include "host/tensor.h"

#if defined(FASTDA_CUDA_HOST)
// tests/cuda_host serves CPU tensors with the device code, under a name of its own.
#define FASTDA_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fastda_cuda_host, CPU, m)
#else
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#define FASTDA_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fastda, CUDA, m)
#endif

namespace fastda::cuda {

// Makes the device of the first tensor the current one for its lifetime, knows torch's current
// stream there, and refuses tensors that are elsewhere: a kernel given another device's memory would
// fault.
class Device {
 public:
  template <typename... Tensors>
  Device(const char* op, const Tensor& first, const Tensors&... others) : Device(first, op) {
    FASTDA_CHECK((same_device(first, others) && ...), op, ": all tensors must be on one device");
  }
  void* stream() const { return stream_; }

 private:
  static bool same_device(const Tensor& a, const Tensor& b) {
    return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
  }
  static bool same_device(const Tensor& a, const MaybeTensor& b) {
    return !b || same_device(a, *b);
  }
  void* stream_ = nullptr;
#if defined(FASTDA_CUDA_HOST)
  Device(const Tensor&, const char*) {}
#else
  Device(const Tensor& t, const char* op) : guard_((check(t, op), t.get_device_index())) {
    // Not in a header that every torch has, and in a library that a torch without CUDA lacks.
    using Get = int32_t (*)(int32_t, void**);
    static const Get get = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                     : nullptr;
    }();
    FASTDA_CHECK(get != nullptr, op, ": this torch was built without CUDA");
    FASTDA_CHECK(get(t.get_device_index(), &stream_) == 0, op,
                 ": torch has no current CUDA stream");
  }
  static void check(const Tensor& t, const char* op) {
    FASTDA_CHECK(t.is_cuda(), op, ": tensors must be on a CUDA device");
  }
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

}  // namespace fastda::cuda
