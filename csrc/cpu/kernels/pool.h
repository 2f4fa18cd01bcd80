// ReLU and max-pool in one pass over the input, and their gradient in one over the output.
#pragma once

#include "common/isa.h"
#include "common/pool.h"

namespace fastda::cpu {

// x [N, C, H, W], y and indices [N, C, OH, OW], contiguous or all channels_last, but for a contiguous
// y where the problem says so; indices may be null. A row is one of a plane, N * C * OH of them, or,
// channels_last, of all channels, N * OH.
struct PoolKernels {
  int64_t (*scratch_bytes)(const PoolProblem& p);  // for either direction, per thread
  // y and indices of the rows [begin, end).
  void (*forward)(const PoolProblem& p, const void* x, void* y, uint8_t* indices, int64_t begin,
                  int64_t end, void* scratch);
  // The gradient of x in its rows [begin, end).
  void (*backward)(const PoolProblem& p, const void* grad, const uint8_t* indices, void* out,
                   int64_t begin, int64_t end, void* scratch);
};
FASTDA_DECLARE_KERNELS(PoolKernels, pool)

}  // namespace fastda::cpu
