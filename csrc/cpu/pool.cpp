#include "cpu/kernels/pool.h"

#include <vector>

#include "host/pool.h"

namespace fastda::cpu {
namespace {

// Calls run(first row, last row, scratch); a row has `entries` inputs or outputs.
template <typename F>
void over_rows(const PoolProblem& p, int64_t rows, int64_t entries, F&& run) {
  constexpr int64_t grain = 1 << 15;
  torch::stable::parallel_for(
      0, rows, (grain + entries - 1) / entries, [&](int64_t begin, int64_t end) {
        // In doubles, so that every type is aligned.
        std::vector<double> scratch(size_t((pool_kernels().scratch_bytes(p) + 7) / 8));
        run(begin, end, scratch.data());
      });
}

std::tuple<Tensor, Tensor> pool_forward(const Tensor& x, Pair kernel, Pair stride, Pair padding,
                                        bool ceil_mode, bool relu, bool keep_indices) {
  return relu_max_pool(
      x, kernel, stride, padding, ceil_mode, relu, keep_indices,
      [](const PoolProblem& p, const void* x, void* y, uint8_t* indices) {
        const int64_t planes = p.channels_last ? 1 : p.channels;
        over_rows(p, p.images * planes * p.out_height,
                  p.out_width * p.channels / planes * p.stride_h * p.stride_w,
                  [&](int64_t begin, int64_t end, void* scratch) {
                    pool_kernels().forward(p, x, y, indices, begin, end, scratch);
                  });
      });
}

Tensor pool_backward(const Tensor& grad, const Tensor& indices, Pair size, bool channels_last,
                     Pair kernel, Pair stride, Pair padding) {
  return relu_max_pool_backward(
      grad, indices, size, channels_last, kernel, stride, padding,
      [](const PoolProblem& p, const void* grad, const uint8_t* indices, void* out) {
        const int64_t planes = p.channels_last ? 1 : p.channels;
        over_rows(p, p.images * planes * p.height, p.width * p.channels / planes,
                  [&](int64_t begin, int64_t end, void* scratch) {
                    pool_kernels().backward(p, grad, indices, out, begin, end, scratch);
                  });
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastda, CPU, m) {
  m.impl("relu_max_pool", TORCH_BOX(&pool_forward));
  m.impl("relu_max_pool_backward", TORCH_BOX(&pool_backward));
}

}  // namespace fastda::cpu
