#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastda::cuda {

struct NegateScale {
  DType dtype, scale_dtype;
  const void* grad;
  const void* scale;  // one value, or one per sample
  void* out;
  int64_t total, inner;  // elements, and those of one sample
  bool per_sample;
};

// out = -scale * grad over dense elements.
void negate_scale(const NegateScale& p, void* stream);

}  // namespace fastda::cuda
