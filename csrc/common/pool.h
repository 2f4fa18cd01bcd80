// What a max-pool is, for the kernels of every device.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastda {

struct PoolProblem {
  DType dtype;
  bool channels_last;
  bool relu;
  int64_t images, channels, height, width;  // of the input
  int64_t out_height, out_width;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;
};

// The index of an output is its element's place in the window, row * kernel_w + column; no_index
// where ReLU left nothing of the window, whose gradient is then zero.
constexpr int no_index = 255;

}  // namespace fastda
