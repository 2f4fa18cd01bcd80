// What the CUDA host side has beyond common/tensor.h: the stream, the device, and the name to
// register under.
#pragma once

#include <optional>

#include "common/tensor.h"

#if defined(FASTDA_CUDA_HOST)
// tests/cuda_host serves CPU tensors with the device code, under a name of its own.
#define FASTDA_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fastda_cuda_host, CPU, m)
#else
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#define FASTDA_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fastda, CUDA, m)
#endif

namespace fastda::cuda {

// Makes the device of `t` the current one for its lifetime, and knows torch's current stream there.
class OnDevice {
 public:
#if defined(FASTDA_CUDA_HOST)
  OnDevice(const Tensor&, const char*) {}
#else
  OnDevice(const Tensor& t, const char* op) : guard_((check(t, op), t.get_device_index())) {
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
#endif
  void* stream() const { return stream_; }

 private:
  void* stream_ = nullptr;
#if !defined(FASTDA_CUDA_HOST)
  static void check(const Tensor& t, const char* op) {
    FASTDA_CHECK(t.is_cuda(), op, ": tensors must be on a CUDA device");
  }
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// Uninitialised, on the device of `like`.
inline Tensor empty_on(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype,
                       bool channels_last = false) {
  return torch::stable::empty(
      torch::headeronly::IntHeaderOnlyArrayRef(size.begin(), size.size()), dtype, std::nullopt,
      like.device(), std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// Every tensor must be where the first is: a kernel given another device's memory would fault.
inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}
inline bool same_device(const Tensor& a, const MaybeTensor& b) { return !b || same_device(a, *b); }
template <typename... Tensors>
void check_devices(const char* op, const Tensor& first, const Tensors&... others) {
  FASTDA_CHECK((same_device(first, others) && ...), op, ": all tensors must be on one device");
}

}  // namespace fastda::cuda
