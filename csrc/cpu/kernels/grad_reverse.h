#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastda::cpu {

struct GradReverseKernels {
  // out[i] = -scale * grad[i] for i in [0, n)
  void (*negate_scale)(DType dtype, const void* grad, void* out, int64_t n, double scale);
};
FASTDA_DECLARE_KERNELS(GradReverseKernels, grad_reverse)

}  // namespace fastda::cpu
