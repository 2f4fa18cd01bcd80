#pragma once

#include "common/pool.h"

namespace fastda::cuda {

// x [N, C, H, W], y and indices [N, C, OH, OW], contiguous or all channels_last; indices may be null.
void pool_forward(const PoolProblem& p, const void* x, void* y, uint8_t* indices, void* stream);
void pool_backward(const PoolProblem& p, const void* grad, const uint8_t* indices, void* out,
                   void* stream);

}  // namespace fastda::cuda
