#pragma once

#include <cstdint>

#include "common/isa.h"

namespace fastda::cpu {

struct PeakKernels {
  // `n` rounds of multiply-adds in float32 that never leave the registers; returns how many
  // floating-point operations those were.
  int64_t (*multiply_add)(int64_t n);
};
FASTDA_DECLARE_KERNELS(PeakKernels, peak)

}  // namespace fastda::cpu
