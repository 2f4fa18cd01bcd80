// Host side of normalisation.
#pragma once

#include "common/norm.h"
#include "host/tensor.h"

namespace fastda {

// What kernels compute: images that are dense in one layout and not empty, and contiguous vectors of
// a value a channel (mean and variance: a statistic). Without negative_slope there is no activation.
struct NormForward {
  const char* op;
  NormLayout layout;
  double eps;
  std::optional<double> negative_slope;
  Tensor x;
  MaybeTensor residual, weight, bias, running_mean, running_var;  // given: they are the statistics
  Tensor y, mean, variance;
};
struct NormBackward {
  const char* op;
  NormLayout layout;
  double eps;
  std::optional<double> negative_slope;
  bool through_statistics;  // they depend on x
  Tensor grad, x;
  MaybeTensor output;  // the activation's mask is read off it; none: off the result computed again
  MaybeTensor weight, bias;
  Tensor mean, variance;
  bool need_x, need_weight, need_bias, need_residual;
  Tensor d_x, d_weight, d_bias, d_residual;
};

inline Tensor norm_dense(const Tensor& t, bool channels_last) {
  return torch::stable::contiguous(
      t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}
inline NormLayout norm_layout(const Tensor& x, bool channels_last, bool per_image) {
  const int64_t n = x.size(0);
  // One pixel: both formats are the same, and rows are longer.
  return {.by_rows = x.size(1) > 1 && (channels_last || x.size(2) * x.size(3) == 1),
          .groups = per_image ? n : 1,
          .images = per_image ? 1 : n,
          .channels = x.size(1),
          .pixels = x.size(2) * x.size(3)};
}
inline Tensor norm_image(const Tensor& t, const Tensor& x, bool channels_last, const char* op) {
  bool same = t.dim() == 4 && t.scalar_type() == x.scalar_type();
  for (int64_t d = 0; same && d < 4; ++d) same = t.size(d) == x.size(d);
  FASTDA_CHECK(same, op, ": every image must have the shape and dtype of x");
  return norm_dense(t, channels_last);
}
inline Tensor norm_vector(const Tensor& t, int64_t count, const char* op) {
  FASTDA_CHECK(t.dim() == 1 && t.size(0) == count, op,
               ": what is given for channels must have one value of each");
  return torch::stable::contiguous(t);
}
inline MaybeTensor norm_vector(const MaybeTensor& t, int64_t count, const char* op) {
  return t ? MaybeTensor(norm_vector(*t, count, op)) : std::nullopt;
}

// Kernels::forward(NormForward) and Kernels::backward(NormBackward) write the results.
template <typename Kernels>
std::tuple<Tensor, Tensor, Tensor> norm_act(const Tensor& x, const MaybeTensor& weight,
                                            const MaybeTensor& bias,
                                            const MaybeTensor& running_mean,
                                            const MaybeTensor& running_var,
                                            const MaybeTensor& residual, bool per_image, double eps,
                                            std::optional<double> negative_slope) {
  const char* op = "norm_act";
  const Kernels kernels(op, x, weight, bias, running_mean, running_var, residual);
  const bool given = bool(running_mean);
  FASTDA_CHECK(x.dim() == 4 && given == bool(running_var) && !(per_image && given), op,
               ": x must be (N, C, H, W), with both running statistics or none");
  const bool last = prefers_channels_last(x);
  const NormLayout layout = norm_layout(x, last, per_image);
  NormForward f{.op = op,
                .layout = layout,
                .eps = eps,
                .negative_slope = negative_slope,
                .x = norm_dense(x, last),
                .residual = {},
                .weight = norm_vector(weight, layout.channels, op),
                .bias = norm_vector(bias, layout.channels, op),
                .running_mean = norm_vector(running_mean, layout.channels, op),
                .running_var = norm_vector(running_var, layout.channels, op),
                .y = empty_image(x, x.size(1), x.scalar_type(), last),
                .mean = empty(x, {layout.statistics()}, ScalarType::Double),
                .variance = empty(x, {layout.statistics()}, ScalarType::Double)};
  if (residual) f.residual = norm_image(*residual, x, last, op);
  if (x.numel() > 0) {
    kernels.forward(f);
  } else if (given) {
    torch::stable::copy_(f.mean, *f.running_mean);
    torch::stable::copy_(f.variance, *f.running_var);
  } else {
    torch::stable::zero_(f.mean);
    torch::stable::zero_(f.variance);
  }
  return {f.y, f.mean, f.variance};
}

template <typename Kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_backward(
    const Tensor& grad, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
    const Tensor& mean, const Tensor& variance, const MaybeTensor& output, bool per_image,
    bool through_statistics, double eps, std::optional<double> negative_slope, bool need_x,
    bool need_weight, bool need_bias, bool need_residual) {
  const char* op = "norm_act_backward";
  const Kernels kernels(op, x, grad, weight, bias, mean, variance, output);
  FASTDA_CHECK(x.dim() == 4, op, ": x must be (N, C, H, W)");
  const bool last = prefers_channels_last(x);
  const NormLayout layout = norm_layout(x, last, per_image);
  const auto image = [&](bool need) {
    return need ? empty_image(x, x.size(1), x.scalar_type(), last) : empty(x, {0}, x.scalar_type());
  };
  NormBackward b{.op = op,
                 .layout = layout,
                 .eps = eps,
                 .negative_slope = negative_slope,
                 .through_statistics = through_statistics,
                 .grad = norm_image(grad, x, last, op),
                 .x = norm_dense(x, last),
                 .output = {},
                 .weight = norm_vector(weight, layout.channels, op),
                 .bias = norm_vector(bias, layout.channels, op),
                 .mean = norm_vector(mean, layout.statistics(), op),
                 .variance = norm_vector(variance, layout.statistics(), op),
                 .need_x = need_x,
                 .need_weight = need_weight,
                 .need_bias = need_bias,
                 .need_residual = need_residual,
                 .d_x = image(need_x),
                 .d_weight = empty(x, {need_weight ? layout.channels : 0}, wide(x)),
                 .d_bias = empty(x, {need_bias ? layout.channels : 0}, wide(x)),
                 .d_residual = image(need_residual)};
  if (output) b.output = norm_image(*output, x, last, op);
  if (x.numel() > 0) {
    kernels.backward(b);
  } else {
    torch::stable::zero_(b.d_weight);
    torch::stable::zero_(b.d_bias);
  }
  return {b.d_x, b.d_weight, b.d_bias, b.d_residual};
}

template <typename Kernels, typename Library>
void register_norm(Library& m) {
  m.impl("norm_act", TORCH_BOX(&norm_act<Kernels>));
  m.impl("norm_act_backward", TORCH_BOX(&norm_act_backward<Kernels>));
}

}  // namespace fastda
