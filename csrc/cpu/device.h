// Where a call of an operator on the CPU runs: nothing to find out, and all tensors are there, or
// PyTorch would have called another device's.
#pragma once

#include "host/tensor.h"

#define FASTDA_CPU_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fastda, CPU, m)

namespace fastda::cpu {

struct Device {
  template <typename... Tensors>
  Device(const char*, const Tensors&...) {}
};

}  // namespace fastda::cpu
