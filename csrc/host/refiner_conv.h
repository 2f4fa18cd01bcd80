// Host side of the refiner's convolutions: checks, layouts, what is allocated, and the order of a
// block's forward and backward.
//
// A device gives, as Kernels:
//   Kernels(op, tf32, tensors...)
//   any_strides           its kernels take views of any strides; else activations are copied to a
//                         unit stride along c (channels_last) or w
//   inner_channels_last   between a block's convolutions all is channels_last, whatever x is
//   has_window            it may have backward_in_window()
//   reflects              its kernels read mirrored pixels in place of zeros around x
//   check(problem, op)    refuses sizes beyond its kernels
//   convolve(args, like), filter_gradient(args, d_bias, like)
//                         of no empty output; workspaces on the device of `like`
//   in_one_launch(first, second), convolve_block(first, second, like)
//                         a block in one launch, where it can; first.out without data: not kept
#pragma once

#include <algorithm>
#include <utility>

#include "common/conv.h"
#include "host/pool.h"
#include "host/tensor.h"

namespace fastda {

// The stride of a dimension of size 1 says nothing; as it stands it could spoil wide accesses.
inline View view_of(const Tensor& t) {
  const auto stride = [&](int d) { return t.size(d) == 1 ? (d == 1 ? 1 : 0) : t.stride(d); };
  return {const_cast<void*>(t.const_data_ptr()), stride(0), stride(1), stride(2), stride(3)};
}
inline View view_of(const MaybeTensor& t) { return t ? view_of(*t) : View{}; }

// Rotated by 180 degrees, out and in channels change places.
inline View filter_view(const Tensor& weight, bool rotate) {
  View v{const_cast<void*>(weight.const_data_ptr()), weight.stride(0), weight.stride(1),
         weight.stride(2), weight.stride(3)};
  if (!rotate) return v;
  const int64_t last = (weight.size(2) - 1) * (v.h + v.w) * int64_t(weight.element_size());
  return {static_cast<char*>(v.data) + last, v.c, v.n, -v.h, -v.w};
}

// The padding that keeps height and width.
inline int64_t same(const Tensor& weight) { return weight.size(2) / 2; }

// padding: none for what keeps height and width.
template <typename Kernels>
ConvProblem check(const Tensor& x, const Tensor& weight, const char* op,
                  std::optional<int64_t> padding = std::nullopt, bool reflect = false) {
  FASTDA_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(1) == x.size(1) &&
                   weight.size(2) == weight.size(3) && (padding || weight.size(2) % 2 == 1) &&
                   weight.scalar_type() == x.scalar_type(),
               op,
               ": x must be (N, C, H, W) and weight (K, C, k, k) with odd k, of the same dtype");
  FASTDA_CHECK(!padding || (0 <= *padding && *padding < weight.size(2) &&
                            x.size(2) + 2 * *padding >= weight.size(2) &&
                            x.size(3) + 2 * *padding >= weight.size(2)),
               op, ": padding must be from 0 to k - 1, and x with it no smaller than the filter");
  const ConvProblem problem{.dtype = dtype_of(x, op),
                            .batch = x.size(0),
                            .in_channels = x.size(1),
                            .out_channels = weight.size(0),
                            .height = x.size(2),
                            .width = x.size(3),
                            .kernel = weight.size(2),
                            .padding = padding.value_or(same(weight)),
                            .reflect = reflect};
  FASTDA_CHECK(
      !reflect || (Kernels::reflects && problem.padding < std::min(problem.height, problem.width)),
      op, ": x must be larger than a reflected padding, and on the CPU");
  Kernels::check(problem, op);
  return problem;
}
// The first convolution's problem.
template <typename Kernels>
ConvProblem check_block(const Tensor& x, const Tensor& weight1, const Tensor& weight2,
                        const char* op) {
  ConvProblem problem = check<Kernels>(x, weight1, op);
  FASTDA_CHECK(weight2.dim() == 4 && weight2.size(0) == problem.in_channels &&
                   weight2.size(1) == problem.out_channels && weight2.size(2) == weight2.size(3) &&
                   weight2.size(2) % 2 == 1 && weight2.scalar_type() == x.scalar_type(),
               op, ": weight2 must be (C, K, k, k) with odd k, in the dtype of x");
  ConvProblem second = problem;
  second.kernel = weight2.size(2);
  Kernels::check(second, op);
  return problem;
}
inline void check_image(const MaybeTensor& t, const Tensor& x, const ConvProblem& problem,
                        int64_t channels, const char* op) {
  if (t)
    FASTDA_CHECK(
        t->dim() == 4 && t->size(0) == problem.batch && t->size(1) == channels &&
            t->size(2) == problem.out_height() && t->size(3) == problem.out_width() &&
            t->scalar_type() == x.scalar_type(),
        op, ": every image must have the shape of the convolution's result and the dtype of x");
}
inline void check_slope(double negative_slope, const char* op) {
  FASTDA_CHECK(negative_slope >= 0, op, ": negative_slope must be 0 or more");
}
inline MaybeTensor check_bias(const MaybeTensor& bias, const Tensor& x, int64_t channels,
                              const char* op) {
  if (!bias) return std::nullopt;
  FASTDA_CHECK(
      bias->dim() == 1 && bias->size(0) == channels && bias->scalar_type() == x.scalar_type(), op,
      ": bias must be (K,) in the dtype of x");
  return torch::stable::contiguous(*bias);
}

template <typename Kernels>
Tensor laid_out(const Tensor& t, bool channels_last) {
  const int d = channels_last ? 1 : 3;
  if (Kernels::any_strides || t.size(d) == 1 || t.stride(d) == 1) return t;
  return torch::stable::contiguous(
      t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}
template <typename Kernels>
MaybeTensor laid_out(const MaybeTensor& t, bool channels_last) {
  return t ? MaybeTensor(laid_out<Kernels>(*t, channels_last)) : std::nullopt;
}
inline Tensor nothing(const Tensor& x) { return nothing(x, x.scalar_type()); }
inline Tensor empty_image(const Tensor& x, int64_t channels, bool channels_last) {
  return empty_image(x, channels, x.scalar_type(), channels_last);
}
inline Tensor empty_filter(const Tensor& weight, bool needed) {
  if (!needed) return nothing(weight);
  return empty(weight, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)},
               weight.scalar_type());
}
inline Tensor empty_bias(const Tensor& x, int64_t channels, bool needed) {
  return needed ? empty(x, {channels}, x.scalar_type()) : nothing(x);
}

// Everything that a convolution is fused with.
struct Fusion {
  MaybeTensor x_mask, bias, residual, residual_mask, out_mask;
  bool relu = false, reflect = false;
  double negative_slope = 0;
};

// out = the convolution of x with weight, or, `rotate`d, its transpose: then x is a gradient with
// weight.size(0) channels and out has weight.size(1). `like` has the batch, height, width and dtype
// of x. channels_last: of x; out_channels_last: of out and of what it is fused with.
inline ConvArgs conv_args(const Tensor& like, const View& x, bool channels_last,
                          const Tensor& weight, bool rotate, const Fusion& fusion, const View& out,
                          bool out_channels_last, std::optional<int64_t> padding = std::nullopt) {
  ConvArgs args{};
  args.dtype = dtype_of(like, "conv_same");
  args.x_channels_last = channels_last;
  args.out_channels_last = out_channels_last;
  args.batch = like.size(0);
  args.height = like.size(2);
  args.width = like.size(3);
  args.kernel = weight.size(2);
  args.padding = padding.value_or(same(weight));
  args.reflect = fusion.reflect;
  args.in_channels = weight.size(rotate ? 0 : 1);
  args.out_channels = weight.size(rotate ? 1 : 0);
  args.x = x;
  args.x_mask = view_of(fusion.x_mask);
  args.filter = filter_view(weight, rotate);
  args.bias = fusion.bias ? fusion.bias->const_data_ptr() : nullptr;
  args.residual = view_of(fusion.residual);
  args.residual_mask = view_of(fusion.residual_mask);
  args.relu = fusion.relu;
  args.negative_slope = fusion.negative_slope;
  args.out_mask = view_of(fusion.out_mask);
  args.out = out;
  return args;
}

// channels_last: of x; grad_channels_last: of grad and its mask. d_weight: empty where not wanted.
inline FilterGradArgs filter_grad_args(const Tensor& x, bool channels_last, const View& grad,
                                       const View& mask, double negative_slope,
                                       bool grad_channels_last, int64_t out_channels,
                                       const Tensor& d_weight,
                                       std::optional<int64_t> padding = std::nullopt,
                                       bool reflect = false) {
  const bool want_weight = d_weight.dim() == 4;
  FilterGradArgs args{};
  args.dtype = dtype_of(x, "conv_same_backward");
  args.x_channels_last = channels_last;
  args.grad_channels_last = grad_channels_last;
  args.batch = x.size(0);
  args.in_channels = x.size(1);
  args.out_channels = out_channels;
  args.height = x.size(2);
  args.width = x.size(3);
  args.kernel = want_weight ? d_weight.size(2) : 1;
  args.padding = want_weight ? padding.value_or(same(d_weight)) : 0;
  args.reflect = reflect;
  if (want_weight) args.x = view_of(x);
  args.grad = grad;
  args.grad_mask = mask;
  args.negative_slope = negative_slope;
  if (want_weight) args.d_filter = view_of(d_weight);
  return args;
}

template <typename Kernels>
void convolve(const Kernels& kernels, const Tensor& x, bool channels_last, const Tensor& weight,
              bool rotate, const Fusion& fusion, const Tensor& out, bool out_channels_last,
              std::optional<int64_t> padding = std::nullopt) {
  if (out.numel() == 0) return;
  kernels.convolve(conv_args(x, view_of(x), channels_last, weight, rotate, fusion, view_of(out),
                             out_channels_last, padding),
                   x);
}

template <typename Kernels>
void filter_gradient(const Kernels& kernels, const Tensor& x, bool channels_last,
                     const Tensor& grad, const MaybeTensor& mask, double negative_slope,
                     bool grad_channels_last, const Tensor& d_weight, const Tensor& d_bias,
                     std::optional<int64_t> padding = std::nullopt, bool reflect = false) {
  if (d_weight.dim() != 4 && d_bias.numel() == 0) return;
  if (grad.numel() == 0) {
    Tensor zeros[] = {d_weight, d_bias};
    for (Tensor& t : zeros) torch::stable::zero_(t);
    return;
  }
  FilterGradArgs args =
      filter_grad_args(x, channels_last, view_of(grad), view_of(mask), negative_slope,
                       grad_channels_last, grad.size(1), d_weight, padding, reflect);
  if (d_weight.dim() != 4) {  // a filter of 1 x 1 stands for none, and has results of this size
    args.height = grad.size(2);
    args.width = grad.size(3);
  }
  kernels.filter_gradient(args, d_bias, x);
}

template <typename Kernels>
Tensor convolution(const char* op, const Tensor& x_any, const Tensor& weight,
                   const MaybeTensor& bias, const MaybeTensor& residual,
                   std::optional<int64_t> padding, bool relu, bool tf32, double negative_slope,
                   bool reflect) {
  check_slope(negative_slope, op);
  const Kernels kernels(op, tf32, x_any, weight, bias, residual);
  const ConvProblem s = check<Kernels>(x_any, weight, op, padding, reflect);
  check_image(residual, x_any, s, s.out_channels, op);
  const bool channels_last = prefers_channels_last(x_any);
  const Tensor x = laid_out<Kernels>(x_any, channels_last);
  Fusion fusion;
  fusion.bias = check_bias(bias, x, s.out_channels, op);
  fusion.residual = laid_out<Kernels>(residual, channels_last);
  fusion.relu = relu;
  fusion.reflect = reflect;
  fusion.negative_slope = negative_slope;
  Tensor out = empty(x, {s.batch, s.out_channels, s.out_height(), s.out_width()}, x.scalar_type(),
                     channels_last);
  convolve(kernels, x, channels_last, weight, false, fusion, out, channels_last, padding);
  return out;
}
template <typename Kernels>
Tensor conv_same(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                 const MaybeTensor& residual, bool relu, bool tf32, double negative_slope,
                 bool reflect) {
  return convolution<Kernels>("conv_same", x, weight, bias, residual, std::nullopt, relu, tf32,
                              negative_slope, reflect);
}
template <typename Kernels>
Tensor conv2d(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
              const MaybeTensor& residual, int64_t padding, bool relu, double negative_slope) {
  return convolution<Kernels>("conv2d", x, weight, bias, residual, padding, relu, false,
                              negative_slope, false);
}

template <typename Kernels>
std::tuple<Tensor, Tensor, Tensor> convolution_backward(const char* op, const Tensor& grad_any,
                                                        const Tensor& x_any, const Tensor& weight,
                                                        const MaybeTensor& output,
                                                        std::optional<int64_t> padding, bool need_x,
                                                        bool need_weight, bool need_bias, bool tf32,
                                                        double negative_slope, bool reflect) {
  check_slope(negative_slope, op);
  FASTDA_CHECK(!reflect || !need_x, op, ": with reflect the gradient of x must not be needed");
  const Kernels kernels(op, tf32, x_any, grad_any, weight, output);
  const ConvProblem s = check<Kernels>(x_any, weight, op, padding, reflect);
  check_image(grad_any, x_any, s, s.out_channels, op);
  check_image(output, x_any, s, s.out_channels, op);
  const bool channels_last = prefers_channels_last(x_any);
  const Tensor x = laid_out<Kernels>(x_any, channels_last),
               grad = laid_out<Kernels>(grad_any, channels_last);
  Fusion fusion;
  fusion.x_mask = laid_out<Kernels>(output, channels_last);
  fusion.negative_slope = negative_slope;
  Tensor d_x = nothing(x);
  if (need_x) {
    d_x = empty_image(x, s.in_channels, channels_last);
    convolve(kernels, grad, channels_last, weight, true, fusion, d_x, channels_last,
             s.kernel - 1 - s.padding);
  }
  Tensor d_weight = empty_filter(weight, need_weight);
  Tensor d_bias = empty_bias(x, s.out_channels, need_bias);
  filter_gradient(kernels, x, channels_last, grad, fusion.x_mask, negative_slope, channels_last,
                  d_weight, d_bias, padding, reflect);
  return {d_x, d_weight, d_bias};
}
template <typename Kernels>
std::tuple<Tensor, Tensor, Tensor> conv_same_backward(const Tensor& grad, const Tensor& x,
                                                      const Tensor& weight,
                                                      const MaybeTensor& output, bool need_x,
                                                      bool need_weight, bool need_bias, bool tf32,
                                                      double negative_slope, bool reflect) {
  return convolution_backward<Kernels>("conv_same_backward", grad, x, weight, output, std::nullopt,
                                       need_x, need_weight, need_bias, tf32, negative_slope,
                                       reflect);
}
template <typename Kernels>
std::tuple<Tensor, Tensor, Tensor> conv2d_backward(const Tensor& grad, const Tensor& x,
                                                   const Tensor& weight, const MaybeTensor& output,
                                                   int64_t padding, bool need_x, bool need_weight,
                                                   bool need_bias, double negative_slope) {
  return convolution_backward<Kernels>("conv2d_backward", grad, x, weight, output, padding, need_x,
                                       need_weight, need_bias, false, negative_slope, false);
}

// A convolution of `s` and what a max-pool of its result leaves, in windows of size x size side by side;
// within, both are channels_last.
inline PoolProblem pool_of(const char* op, const ConvProblem& s, int64_t size) {
  PoolProblem p = pool_problem(op, s.dtype, s.batch, s.out_channels,
                               {s.out_height(), s.out_width()}, {size, size}, {size, size}, {0, 0});
  p.channels_last = true;
  p.out_height = p.height / size;
  p.out_width = p.width / size;
  FASTDA_CHECK(p.out_height > 0 && p.out_width > 0, op,
               ": the convolution's result must hold a window at least");
  return p;
}
template <typename Kernels>
std::tuple<Tensor, Tensor> conv2d_max_pool(const Tensor& x_any, const Tensor& weight,
                                           const MaybeTensor& bias, int64_t padding, int64_t size,
                                           bool relu, bool keep_indices) {
  const char* op = "conv2d_max_pool";
  const Kernels kernels(op, false, x_any, weight, bias);
  const ConvProblem s = check<Kernels>(x_any, weight, op, padding);
  PoolProblem p = pool_of(op, s, size);
  const bool channels_last = prefers_channels_last(x_any);
  p.relu = relu;
  p.out_contiguous = !channels_last;
  const Tensor x = laid_out<Kernels>(x_any, channels_last);
  Fusion fusion;
  fusion.bias = check_bias(bias, x, s.out_channels, op);
  const std::initializer_list<int64_t> pooled = {s.batch, s.out_channels, p.out_height,
                                                 p.out_width};
  const Tensor y = empty(x, pooled, x.scalar_type(), channels_last);
  const Tensor indices =
      keep_indices ? empty(x, pooled, ScalarType::Byte, true) : nothing(x, ScalarType::Byte);
  if (y.numel() > 0)
    kernels.convolve_pooled(
        conv_args(x, view_of(x), channels_last, weight, false, fusion, {}, true, padding), p,
        y.mutable_data_ptr(), keep_indices ? data<uint8_t>(indices) : nullptr, x);
  return {y, indices};
}

template <typename Kernels>
std::tuple<Tensor, Tensor, Tensor> conv2d_max_pool_backward(
    const Tensor& grad_any, const Tensor& indices_any, const Tensor& x_any, const Tensor& weight,
    int64_t padding, int64_t size, bool need_x, bool need_weight, bool need_bias) {
  const char* op = "conv2d_max_pool_backward";
  const Kernels kernels(op, false, x_any, grad_any, indices_any, weight);
  const ConvProblem s = check<Kernels>(x_any, weight, op, padding);
  const PoolProblem p = pool_of(op, s, size);
  for (const Tensor* t : {&grad_any, &indices_any})
    FASTDA_CHECK(t->dim() == 4 && t->size(0) == s.batch && t->size(1) == s.out_channels &&
                     t->size(2) == p.out_height && t->size(3) == p.out_width,
                 op, ": grad and indices must have the shape of the pool's result");
  FASTDA_CHECK(grad_any.scalar_type() == x_any.scalar_type() &&
                   indices_any.scalar_type() == ScalarType::Byte,
               op, ": grad must have the dtype of x, indices uint8");
  const bool channels_last = prefers_channels_last(x_any);
  const Tensor grad = pool_layout(grad_any, p), indices = pool_layout(indices_any, p);
  const View pooled{const_cast<void*>(grad.const_data_ptr()),
                    p.out_height * p.out_width * s.out_channels, 1, p.out_width * s.out_channels,
                    s.out_channels};
  const Winners winners{const_data<uint8_t>(indices), size, p.out_height, p.out_width};
  const Tensor x = laid_out<Kernels>(x_any, channels_last);
  Tensor d_x = need_x ? empty_image(x, s.in_channels, channels_last) : nothing(x);
  Tensor d_weight = empty_filter(weight, need_weight);
  Tensor d_bias = empty_bias(x, s.out_channels, need_bias);
  ConvArgs to_x = conv_args(grad, pooled, true, weight, true, {}, need_x ? view_of(d_x) : View{},
                            channels_last, s.kernel - 1 - padding);
  to_x.height = p.height;
  to_x.width = p.width;
  to_x.x_winners = winners;
  FilterGradArgs to_filter =
      filter_grad_args(x, channels_last, pooled, {}, 0, true, s.out_channels, d_weight, padding);
  to_filter.grad_winners = winners;
  if (!need_weight) {  // as in filter_gradient()
    to_filter.height = p.height;
    to_filter.width = p.width;
  }
  const bool to_be_summed = need_weight || need_bias;
  if (grad.numel() == 0 || (need_x && !kernels.reads_winners(to_x)) ||
      (to_be_summed && !kernels.reads_winners(to_filter))) {
    const Tensor whole = relu_max_pool_backward<typename Kernels::Pool>(
        grad, indices, {p.height, p.width}, channels_last, {size, size}, {size, size}, {0, 0});
    return convolution_backward<Kernels>(op, whole, x, weight, std::nullopt, padding, need_x,
                                         need_weight, need_bias, false, 0, false);
  }
  if (need_x) kernels.convolve(to_x, grad);
  if (to_be_summed) kernels.filter_gradient(to_filter, d_bias, x);
  return {d_x, d_weight, d_bias};
}

template <typename Kernels>
std::tuple<Tensor, Tensor> refiner_block(const Tensor& x_any, const Tensor& weight1,
                                         const MaybeTensor& bias1, const Tensor& weight2,
                                         const MaybeTensor& bias2, bool keep_inner, bool tf32,
                                         double negative_slope) {
  const char* op = "refiner_block";
  check_slope(negative_slope, op);
  const Kernels kernels(op, tf32, x_any, weight1, bias1, weight2, bias2);
  const ConvProblem s = check_block<Kernels>(x_any, weight1, weight2, op);
  const bool channels_last = prefers_channels_last(x_any);
  const bool inner_last = channels_last || Kernels::inner_channels_last;
  const Tensor x = laid_out<Kernels>(x_any, channels_last);
  Fusion first, second;
  first.bias = check_bias(bias1, x, s.out_channels, op);
  second.bias = check_bias(bias2, x, s.in_channels, op);
  second.residual = x;
  first.relu = second.relu = true;
  first.negative_slope = second.negative_slope = negative_slope;
  Tensor out = empty_image(x, s.in_channels, channels_last);
  ConvArgs to_inner =
      conv_args(x, view_of(x), channels_last, weight1, false, first, {}, inner_last);
  ConvArgs to_out =
      conv_args(x, {}, inner_last, weight2, false, second, view_of(out), channels_last);
  const bool one_launch = out.numel() > 0 && kernels.in_one_launch(to_inner, to_out);
  const bool make_inner = keep_inner || !one_launch;
  const Tensor inner = make_inner ? empty_image(x, s.out_channels, inner_last) : nothing(x);
  if (make_inner) to_inner.out = to_out.x = view_of(inner);
  if (one_launch) {
    kernels.convolve_block(to_inner, to_out, x);
  } else {
    if (inner.numel() > 0) kernels.convolve(to_inner, x);
    if (out.numel() > 0) kernels.convolve(to_out, x);
  }
  return {out, keep_inner ? inner : nothing(x)};
}

template <typename Kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> refiner_block_backward(
    const Tensor& grad_any, const Tensor& x_any, const MaybeTensor& inner_any,
    const Tensor& output_any, const Tensor& weight1, const MaybeTensor& bias1,
    const Tensor& weight2, bool need_x, bool need_weight1, bool need_bias1, bool need_weight2,
    bool need_bias2, bool tf32, double negative_slope) {
  const char* op = "refiner_block_backward";
  check_slope(negative_slope, op);
  const Kernels kernels(op, tf32, x_any, grad_any, inner_any, output_any, weight1, bias1, weight2);
  const ConvProblem s = check_block<Kernels>(x_any, weight1, weight2, op);
  check_image(grad_any, x_any, s, s.in_channels, op);
  check_image(output_any, x_any, s, s.in_channels, op);
  check_image(inner_any, x_any, s, s.out_channels, op);
  const bool channels_last = prefers_channels_last(x_any);
  const bool inner_last = channels_last || Kernels::inner_channels_last;
  const Tensor x = laid_out<Kernels>(x_any, channels_last),
               grad = laid_out<Kernels>(grad_any, channels_last),
               output = laid_out<Kernels>(output_any, channels_last);
  MaybeTensor inner = laid_out<Kernels>(inner_any, inner_last);
  if (!inner) {
    Fusion first;
    first.bias = check_bias(bias1, x, s.out_channels, op);
    first.relu = true;
    first.negative_slope = negative_slope;
    inner = empty_image(x, s.out_channels, inner_last);
    convolve(kernels, x, channels_last, weight1, false, first, *inner, inner_last);
  }
  Tensor d_weight2 = empty_filter(weight2, need_weight2);
  Tensor d_bias2 = empty_bias(x, s.in_channels, need_bias2);
  filter_gradient(kernels, *inner, inner_last, grad, output, negative_slope, channels_last,
                  d_weight2, d_bias2);
  Tensor d_weight1 = empty_filter(weight1, need_weight1);
  Tensor d_bias1 = empty_bias(x, s.out_channels, need_bias1);
  Fusion to_inner, to_x;
  to_inner.negative_slope = to_x.negative_slope = negative_slope;
  to_inner.x_mask = output;
  to_inner.out_mask = std::move(inner);
  to_x.residual = grad;
  to_x.residual_mask = output;
  Tensor d_x = nothing(x);
  if constexpr (Kernels::has_window) {
    if (need_x && need_weight1 && x.numel() > 0) {
      d_x = empty_image(x, s.in_channels, channels_last);
      if (kernels.backward_in_window(
              conv_args(x, view_of(grad), channels_last, weight2, true, to_inner, {}, true),
              conv_args(x, {}, true, weight1, true, to_x, view_of(d_x), channels_last),
              filter_grad_args(x, channels_last, {}, {}, 0, true, s.out_channels, d_weight1),
              d_bias1, x))
        return {d_x, d_weight1, d_bias1, d_weight2, d_bias2};
      d_x = nothing(x);
    }
  }
  if (need_x || need_weight1 || need_bias1) {
    const Tensor d_inner = empty_image(x, s.out_channels, inner_last);
    convolve(kernels, grad, channels_last, weight2, true, to_inner, d_inner, inner_last);
    to_inner.out_mask.reset();  // a recomputed inner activation is freed before d_x is made
    filter_gradient(kernels, x, channels_last, d_inner, std::nullopt, 0, inner_last, d_weight1,
                    d_bias1);
    if (need_x) {
      d_x = empty_image(x, s.in_channels, channels_last);
      convolve(kernels, d_inner, inner_last, weight1, true, to_x, d_x, channels_last);
    }
  }
  return {d_x, d_weight1, d_bias1, d_weight2, d_bias2};
}

template <typename Kernels, typename Library>
void register_refiner_conv(Library& m) {
  m.impl("conv_same", TORCH_BOX(&conv_same<Kernels>));
  m.impl("conv_same_backward", TORCH_BOX(&conv_same_backward<Kernels>));
  m.impl("refiner_block", TORCH_BOX(&refiner_block<Kernels>));
  m.impl("refiner_block_backward", TORCH_BOX(&refiner_block_backward<Kernels>));
}

}  // namespace fastda
