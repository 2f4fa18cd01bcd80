// The max-pool's kernels as the host side calls them.
#pragma once

#include <vector>

#include "cpu/device.h"
#include "cpu/kernels/pool.h"
#include "host/pool.h"

namespace fastda::cpu {

struct Pool : Device {
  using Device::Device;

  void forward(const PoolProblem& p, const void* x, void* y, uint8_t* indices) const {
    over_rows(p, p.out_height, p.width * p.stride_h,
              [&](int64_t begin, int64_t end, void* scratch) {
                pool_kernels().forward(p, x, y, indices, begin, end, scratch);
              });
  }
  void backward(const PoolProblem& p, const void* grad, const uint8_t* indices, void* out) const {
    over_rows(p, p.height, p.width, [&](int64_t begin, int64_t end, void* scratch) {
      pool_kernels().backward(p, grad, indices, out, begin, end, scratch);
    });
  }

 private:
  // Calls run(first row, last row, scratch); a row of a plane stands for `entries` inputs.
  template <typename F>
  static void over_rows(const PoolProblem& p, int64_t height, int64_t entries, F&& run) {
    constexpr int64_t grain = 1 << 15;
    const int64_t planes = p.channels_last ? 1 : p.channels;
    const int64_t work = entries * p.channels / planes;
    const auto task = [&](int64_t begin, int64_t end) {
      // In doubles, so that every type is aligned.
      std::vector<double> scratch(size_t((pool_kernels().scratch_bytes(p) + 7) / 8));
      run(begin, end, scratch.data());
    };
    torch::stable::parallel_for(0, p.images * planes * height, (grain + work - 1) / work, task);
  }
};

}  // namespace fastda::cpu
