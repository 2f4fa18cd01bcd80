#include "host/refiner_conv.h"

#include "cuda/device.h"
#include "cuda/kernels/refiner_conv.h"

namespace fastda::cuda {
namespace {

Tensor workspace(const Tensor& like, int64_t bytes) {
  return empty(like, {bytes}, ScalarType::Byte);
}

struct RefinerConv : Device {
  template <typename... Tensors>
  RefinerConv(const char* op, bool tf32, const Tensors&... tensors)
      : Device(op, tensors...), tf32_(tf32) {}
  static constexpr bool any_strides = true;
  static constexpr bool inner_channels_last = false;
  static constexpr bool has_window = false;
  static constexpr bool reflects = false;

  static void check(const ConvProblem& p, const char* op) {
    constexpr int64_t most = int64_t(1) << 30;
    FASTDA_CHECK(p.batch * p.height * p.width < 2 * most && p.in_channels < most &&
                     p.out_channels < most && p.kernel < (1 << 12) && p.batch < most &&
                     p.height < most && p.width < most,
                 op, ": x may have at most 2^31 pixels, and a filter at most 4095 x 4095");
  }

  void convolve(const ConvArgs& a, const Tensor& like) const {
    Conv p{.arithmetic = arithmetic(a),
           .batch = int(a.batch),
           .in_channels = int(a.in_channels),
           .out_channels = int(a.out_channels),
           .height = int(a.height),
           .width = int(a.width),
           .kernel = int(a.kernel),
           .x = a.x,
           .x_mask = a.x_mask,
           .filter = a.filter,
           .residual = a.residual,
           .residual_mask = a.residual_mask,
           .out_mask = a.out_mask,
           .out = a.out,
           .bias = a.bias,
           .relu = a.relu,
           .negative_slope = a.negative_slope};
    const Tensor prepared = workspace(like, prepared_bytes(p));
    p.prepared = prepared.mutable_data_ptr();
    cuda::convolve(p, stream());
  }

  void filter_gradient(const FilterGradArgs& a, const Tensor& d_bias, const Tensor& like) const {
    FilterGrad p{.arithmetic = arithmetic(a),
                 .batch = int(a.batch),
                 .in_channels = int(a.in_channels),
                 .out_channels = int(a.out_channels),
                 .height = int(a.height),
                 .width = int(a.width),
                 .kernel = int(a.kernel),
                 .x = a.x,
                 .grad = a.grad,
                 .mask = a.grad_mask,
                 .negative_slope = a.negative_slope,
                 .d_weight = a.d_filter.data,
                 .d_bias = d_bias.numel() > 0 ? d_bias.mutable_data_ptr() : nullptr};
    if (p.d_weight == nullptr && p.d_bias == nullptr) return;
    const Tensor sums = workspace(like, sum_bytes(p));
    p.sums = sums.mutable_data_ptr();
    cuda::filter_gradient(p, stream());
  }

  bool in_one_launch(const ConvArgs& first, const ConvArgs& second) const {
    return first.negative_slope == 0 && block_fits(block(first, second));
  }
  void convolve_block(const ConvArgs& first, const ConvArgs& second, const Tensor& like) const {
    BlockConv p = block(first, second);
    const Tensor prepared = workspace(like, prepared_bytes(p));
    p.prepared = prepared.mutable_data_ptr();
    cuda::convolve_block(p, stream());
  }

 private:
  Arithmetic arithmetic(const ConvProblem& p) const {
    return {p.dtype, p.dtype == DType::f32 && tf32_};
  }
  BlockConv block(const ConvArgs& first, const ConvArgs& second) const {
    return {.arithmetic = arithmetic(first),
            .batch = int(first.batch),
            .channels = int(first.in_channels),
            .inner_channels = int(first.out_channels),
            .height = int(first.height),
            .width = int(first.width),
            .kernel1 = int(first.kernel),
            .kernel2 = int(second.kernel),
            .x = first.x,
            .filter1 = first.filter,
            .filter2 = second.filter,
            .inner = first.out,
            .out = second.out,
            .bias1 = first.bias,
            .bias2 = second.bias};
  }

  bool tf32_;
};

}  // namespace

FASTDA_CUDA_LIBRARY(m) { register_refiner_conv<RefinerConv>(m); }

}  // namespace fastda::cuda
