// What a max-pool is, for the kernels of every device.
#pragma once

#include <cstdint>

#include "common/dtype.h"

#if defined(__CUDACC__)
#define FASTDA_POOL_INLINE __host__ __device__ __forceinline__
#else
#define FASTDA_POOL_INLINE [[gnu::always_inline, maybe_unused]] static inline
#endif

namespace fastda {

struct PoolProblem {
  DType dtype;
  bool channels_last;
  bool out_contiguous;  // forward: of channels_last alone, whose indices stay so
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

struct PoolRange {
  int64_t begin, end;
};
// Places of the window of output i, in one dimension, that are within the input.
FASTDA_POOL_INLINE PoolRange pool_places(int64_t i, int64_t kernel, int64_t stride, int64_t pad,
                                         int64_t size) {
  const int64_t first = i * stride - pad, room = size - first;
  return {first < 0 ? -first : 0, room < kernel ? room : kernel};
}
// The host side refuses what does not fit 32 bits; 64 would be a call of a function on a GPU.
FASTDA_POOL_INLINE int64_t pool_quotient(int64_t a, int64_t b) {
  return int64_t(uint32_t(a) / uint32_t(b));
}
// Outputs in whose windows input i is.
FASTDA_POOL_INLINE PoolRange pool_windows(int64_t i, int64_t kernel, int64_t stride, int64_t pad,
                                          int64_t out) {
  const int64_t past = i + pad - kernel, last = pool_quotient(i + pad, stride);
  return {past < 0 ? 0 : pool_quotient(past, stride) + 1, last < out ? last + 1 : out};
}

}  // namespace fastda
