// Host-side helpers over the stable tensor: checks and raw pointers. Only csrc/cpu/*.cpp and csrc/ops.cpp
// include it; kernels never see torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <tuple>

#include "common/dtype.h"

namespace fastda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The public Python functions report bad arguments in full; the raw operators only refuse to touch memory.
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
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(size.begin(), size.size()), dtype);
}

// Whether entries of `a` and of `b`, made by empty_like(a), stand in the same order without gaps, as they do
// where a is dense; and, if `by_sample`, the samples of dim 0 one after another.
inline bool walk_together(const Tensor& a, const Tensor& b, bool by_sample) {
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.stride(i) != b.stride(i)) return false;
  return !by_sample || b.stride(0) * b.size(0) == b.numel();
}

}  // namespace fastda
