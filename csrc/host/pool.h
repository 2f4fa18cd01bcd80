// Host side of the max-pool.
#pragma once

#include <vector>

#include "common/pool.h"
#include "host/tensor.h"

namespace fastda {

using Pair = std::vector<int64_t>;  // of the vertical and the horizontal

// As PyTorch counts them: every window starts within the image or the padding before it.
inline int64_t pool_extent(int64_t size, int64_t kernel, int64_t stride, int64_t pad, bool ceil) {
  const int64_t spare = size + 2 * pad - kernel;
  if (spare + (ceil ? stride - 1 : 0) < 0) return 0;
  const int64_t out = (spare + (ceil ? stride - 1 : 0)) / stride + 1;
  return ceil && (out - 1) * stride >= size + pad ? out - 1 : out;
}

inline PoolProblem pool_problem(const char* op, DType dtype, int64_t images, int64_t channels,
                                const Pair& size, const Pair& kernel, const Pair& stride,
                                const Pair& padding) {
  FASTDA_CHECK(size.size() == 2 && kernel.size() == 2 && stride.size() == 2 && padding.size() == 2,
               op, ": sizes must be pairs");
  for (int i = 0; i < 2; ++i)
    FASTDA_CHECK(
        size[i] > 0 && kernel[i] > 0 && stride[i] > 0 && padding[i] >= 0 &&
            2 * padding[i] <= kernel[i] && kernel[i] <= no_index && size[i] < (int64_t(1) << 31) &&
            stride[i] < (int64_t(1) << 31),
        op, ": sizes must be positive and below 2^31, and paddings at most half of the kernel");
  FASTDA_CHECK(kernel[0] * kernel[1] <= no_index, op, ": a window must have at most 255 elements");
  PoolProblem p{};
  p.dtype = dtype;
  p.images = images;
  p.channels = channels;
  p.height = size[0];
  p.width = size[1];
  p.kernel_h = kernel[0];
  p.kernel_w = kernel[1];
  p.stride_h = stride[0];
  p.stride_w = stride[1];
  p.pad_h = padding[0];
  p.pad_w = padding[1];
  return p;
}

inline Tensor pool_image(const PoolProblem& p, int64_t height, int64_t width, ScalarType dtype,
                         const Tensor& like) {
  return empty(like, {p.images, p.channels, height, width}, dtype, p.channels_last);
}
inline Tensor pool_layout(const Tensor& t, const PoolProblem& p) {
  return torch::stable::contiguous(
      t, p.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// Kernels::forward(problem, x, y, indices or null) and Kernels::backward(problem, grad, indices, out)
// get tensors that are dense in the problem's layout and not empty.
template <typename Kernels>
std::tuple<Tensor, Tensor> relu_max_pool(const Tensor& x, Pair kernel, Pair stride, Pair padding,
                                         bool ceil_mode, bool relu, bool keep_indices) {
  const char* op = "relu_max_pool";
  const Kernels kernels(op, x);
  FASTDA_CHECK(x.dim() == 4, op, ": x must be (N, C, H, W)");
  PoolProblem p = pool_problem(op, dtype_of(x, op), x.size(0), x.size(1), {x.size(2), x.size(3)},
                               kernel, stride, padding);
  p.relu = relu;
  p.channels_last = prefers_channels_last(x);
  p.out_height = pool_extent(p.height, p.kernel_h, p.stride_h, p.pad_h, ceil_mode);
  p.out_width = pool_extent(p.width, p.kernel_w, p.stride_w, p.pad_w, ceil_mode);
  FASTDA_CHECK(p.out_height > 0 && p.out_width > 0, op, ": x must hold a window at least");
  const Tensor dense = pool_layout(x, p);
  const Tensor y = pool_image(p, p.out_height, p.out_width, x.scalar_type(), x);
  const Tensor indices = keep_indices
                             ? pool_image(p, p.out_height, p.out_width, ScalarType::Byte, x)
                             : nothing(x, ScalarType::Byte);
  if (y.numel() > 0)
    kernels.forward(p, dense.const_data_ptr(), y.mutable_data_ptr(),
                    keep_indices ? data<uint8_t>(indices) : nullptr);
  return {y, indices};
}

template <typename Kernels>
Tensor relu_max_pool_backward(const Tensor& grad, const Tensor& indices, Pair size,
                              bool channels_last, Pair kernel, Pair stride, Pair padding) {
  const char* op = "relu_max_pool_backward";
  const Kernels kernels(op, grad, indices);
  bool same = grad.dim() == 4 && indices.dim() == 4 && indices.scalar_type() == ScalarType::Byte;
  for (int64_t d = 0; same && d < 4; ++d) same = grad.size(d) == indices.size(d);
  FASTDA_CHECK(same, op, ": grad and indices must be (N, C, H, W) of one shape, indices of uint8");
  PoolProblem p = pool_problem(op, dtype_of(grad, op), grad.size(0), grad.size(1), size, kernel,
                               stride, padding);
  p.channels_last = channels_last;
  p.out_height = grad.size(2);
  p.out_width = grad.size(3);
  const auto fits = [&](int d, int64_t out) {
    return out == pool_extent(size[d], kernel[d], stride[d], padding[d], false) ||
           out == pool_extent(size[d], kernel[d], stride[d], padding[d], true);
  };
  FASTDA_CHECK(fits(0, p.out_height) && fits(1, p.out_width), op,
               ": grad must have the shape of the pool's result");
  const Tensor from = pool_layout(grad, p), places = pool_layout(indices, p);
  const Tensor out = pool_image(p, p.height, p.width, grad.scalar_type(), grad);
  if (out.numel() > 0)
    kernels.backward(p, from.const_data_ptr(), const_data<uint8_t>(places), out.mutable_data_ptr());
  return out;
}

template <typename Kernels, typename Library>
void register_pool(Library& m) {
  m.impl("relu_max_pool", TORCH_BOX(&relu_max_pool<Kernels>));
  m.impl("relu_max_pool_backward", TORCH_BOX(&relu_max_pool_backward<Kernels>));
}

}  // namespace fastda
