// What the host side of every operator shares, whatever its device: allocation, checks, layouts and
// raw pointers over the stable tensor. Kernels never see torch.
//
// A family's host side is csrc/host/<family>.h, once for all devices: functions with the schemas'
// arguments, templates over what a device gives, and register_<family>(), which registers them.
// csrc/cpu/<family>.cpp and csrc/cuda/<family>.cpp each pass a struct that derives from their Device
// (cpu/device.h, cuda/device.h) and adds the calls of their kernels:
//
//   template <typename Kernels>
//   Tensor op(const Tensor& x, const Tensor& y) {
//     const Kernels kernels("op", x, y);  // where the call runs, and that all tensors are there
//     const Tensor out = empty(x, {x.size(0)}, x.scalar_type());
//     kernels.run(x.const_data_ptr(), y.const_data_ptr(), out.mutable_data_ptr());
//     return out;
//   }
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "common/dtype.h"

namespace fastda {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The public Python functions report bad arguments in full; the raw operators only refuse to touch
// memory.
#define FASTDA_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

inline DType dtype_of(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: break;
  }
  FASTDA_CHECK(false, op, ": dtype must be float32, float64, bfloat16 or float16");
  return DType::f32;
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <typename T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// Uninitialised, on the device of `like`, as are all that follow.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype,
                    bool channels_last = false) {
  return torch::stable::empty(
      torch::headeronly::IntHeaderOnlyArrayRef(size.begin(), size.size()), dtype, std::nullopt,
      like.device(), std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}
// (N, channels, H, W), of the N, H and W of `like`.
inline Tensor empty_image(const Tensor& like, int64_t channels, ScalarType dtype,
                          bool channels_last) {
  return empty(like, {like.size(0), channels, like.size(2), like.size(3)}, dtype, channels_last);
}
// A scalar for 0 dims, an empty vector for 1. torch::stable::empty looks its operator up by name at
// every call, which for many tiny results costs as much as a small loss itself. This way around it,
// PyTorch does not fill the memory where it is asked to (torch.utils.deterministic), so what a
// kernel writes doesn't go here: tests find what was left unwritten by its NaN.
inline Tensor tiny(const Tensor& like, int64_t dims, ScalarType dtype) {
  const int64_t size = 0, stride = 1;
  const auto device = like.device();
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, &size, &stride, static_cast<int32_t>(dtype),
                                                  static_cast<int32_t>(device.type()),
                                                  device.index(), &handle));
  return Tensor(handle);
}
// What stands for a gradient that is not needed.
inline Tensor nothing(const Tensor& like, ScalarType dtype) { return tiny(like, 1, dtype); }

// Accumulator type: float32 or wider.
inline ScalarType wide(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool is_dense(const Tensor& t, std::initializer_list<int> order) {
  int64_t expected = 1;
  for (int d : order) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}
inline bool is_contiguous(const Tensor& t) { return t.numel() == 0 || is_dense(t, {3, 2, 1, 0}); }
// channels_last, and not also contiguous.
inline bool is_channels_last(const Tensor& t) {
  return t.dim() == 4 && t.numel() > 0 && !is_contiguous(t) && is_dense(t, {1, 3, 2, 0});
}
// The layout that PyTorch's own convolutions would choose for these strides
// (at::suggest_memory_format).
inline bool prefers_channels_last(const Tensor& t) {
  int64_t least = 0;
  if (t.stride(1) == 0) return false;
  for (int d : {1, 3, 2, 0}) {
    const int64_t size = t.size(d), stride = t.stride(d);
    if (size == 0 || stride < least) return false;
    if (d == 0 && least == t.stride(1)) return false;
    least = stride > 1 ? stride * size : stride;
  }
  return true;
}

// `t` (N, C, H, W), copied if H and W do not make one arithmetic sequence of addresses together.
inline Tensor with_planes(const Tensor& t) {
  if (t.size(2) <= 1 || t.size(3) <= 1 || t.stride(2) == t.stride(3) * t.size(3)) return t;
  return torch::stable::contiguous(t);
}
inline int64_t patch_stride(const Tensor& t) { return t.size(3) == 1 ? t.stride(2) : t.stride(3); }

}  // namespace fastda
