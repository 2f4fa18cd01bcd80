// Host-side helpers over the stable tensor: checks, layouts and raw pointers. Only the *.cpp of
// csrc include it; kernels never see torch.
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

inline Tensor empty(std::initializer_list<int64_t> size, ScalarType dtype) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(size.begin(), size.size()),
                              dtype);
}

// Whether entries of `a` and of `b`, made by empty_like(a), stand in the same order without gaps,
// as they do where a is dense; and, if `by_sample`, the samples of dim 0 one after another.
inline bool walk_together(const Tensor& a, const Tensor& b, bool by_sample) {
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.stride(i) != b.stride(i)) return false;
  return !by_sample || b.stride(0) * b.size(0) == b.numel();
}

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
