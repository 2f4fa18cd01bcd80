// ReLU and max-pool, and their gradient. A thread has one entry of the result, neighbours in memory
// are neighbouring threads': forward it looks through its window, backward through the windows that it
// is in, in their order, so that nothing is added by two threads.
#pragma once

#include "cuda/kernels/device.cuh"
#include "cuda/kernels/pool.h"

namespace fastda::cuda {

constexpr int pool_threads = 256;

// Where an entry is, and where the other tensor's entries of its channel are: entry (row, column) is
// plane + (row * width + column) * step.
struct PoolEntry {
  int row, column;
  int64_t plane, step;
};

// i: of a tensor of that height and width; other: pixels of an image of the other tensor.
FASTDA_DEVICE PoolEntry pool_entry(const PoolProblem& p, int64_t i, const Divisor& channels,
                                   const Divisor& height, const Divisor& width, int64_t other) {
  PoolEntry e;
  const int64_t channel = p.channels_last ? divide(i, channels) : 0;
  e.column = int(divide(i, width));
  e.row = int(divide(i, height));
  e.step = p.channels_last ? p.channels : 1;
  e.plane = i * other * e.step + channel;
  return e;
}

template <typename T>
FASTDA_KERNEL(pool_threads)
pool_forward_kernel(PoolProblem p, const T* x, T* y, uint8_t* indices, int64_t total,
                    Divisor channels, Divisor height, Divisor width) {
  using S = typename Wide<T>::type;
  const int64_t i = int64_t(blockIdx.x) * pool_threads + threadIdx.x;
  if (i >= total) return;
  const PoolEntry e = pool_entry(p, i, channels, height, width, p.height * p.width);
  const int64_t top = e.row * p.stride_h - p.pad_h, left = e.column * p.stride_w - p.pad_w;
  const PoolRange rows = pool_places(e.row, p.kernel_h, p.stride_h, p.pad_h, p.height);
  const PoolRange columns = pool_places(e.column, p.kernel_w, p.stride_w, p.pad_w, p.width);
  // What is larger than zero or NaN passes ReLU; without it, the first element stands for -inf alone.
  S largest = p.relu ? S(0) : S(-INFINITY);
  int index = p.relu ? no_index : int(rows.begin * p.kernel_w + columns.begin);
  for (int64_t r = rows.begin; r < rows.end; ++r)
    for (int64_t c = columns.begin; c < columns.end; ++c) {
      const S v = widen(x[e.plane + ((top + r) * p.width + left + c) * e.step]);
      const bool wins = v > largest || v != v;
      largest = wins ? v : largest;
      index = wins ? int(r * p.kernel_w + c) : index;
    }
  y[i] = narrowed<T>(largest);
  if (indices != nullptr) indices[i] = uint8_t(index);
}

template <typename T>
FASTDA_KERNEL(pool_threads)
pool_backward_kernel(PoolProblem p, const T* grad, const uint8_t* indices, T* out, int64_t total,
                     Divisor channels, Divisor height, Divisor width) {
  using S = typename Wide<T>::type;
  const int64_t i = int64_t(blockIdx.x) * pool_threads + threadIdx.x;
  if (i >= total) return;
  const PoolEntry e = pool_entry(p, i, channels, height, width, p.out_height * p.out_width);
  const PoolRange rows = pool_windows(e.row, p.kernel_h, p.stride_h, p.pad_h, p.out_height);
  const PoolRange columns = pool_windows(e.column, p.kernel_w, p.stride_w, p.pad_w, p.out_width);
  const int kernel = int(p.kernel_w), down = int(p.stride_h), right = int(p.stride_w);
  S sum = 0;
  for (int r = int(rows.begin); r < int(rows.end); ++r)
    for (int c = int(columns.begin); c < int(columns.end); ++c) {
      const int64_t from = e.plane + (r * p.out_width + c) * e.step;
      const int place =
          (e.row + int(p.pad_h) - r * down) * kernel + e.column + int(p.pad_w) - c * right;
      if (indices[from] == place) sum += widen(grad[from]);
    }
  out[i] = narrowed<T>(sum);
}

}  // namespace fastda::cuda
