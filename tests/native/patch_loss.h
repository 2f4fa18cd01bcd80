// Patch losses against double loops.
#pragma once
#include "checks.h"
#include "cpu/kernels/patch_loss.h"

namespace fastda::harness {

using namespace cpu;

inline double softplus(double y) { return std::fmax(y, 0) + std::log1p(std::exp(-std::fabs(y))); }
inline double sigmoid(double y) { return 1 / (1 + std::exp(-y)); }

struct Term {
  double loss, slope, right;
};
Term term_at(const PatchTerm& t, double z) {
  const double y = t.sign * z;
  const double right = t.sign * (z - t.threshold) < 0 ? 1 : 0;
  switch (t.formula) {
    case Formula::log: return {softplus(y), sigmoid(y) * t.sign, right};
    case Formula::log_smooth:
      return {t.hit * softplus(y) + t.miss * softplus(-y),
              (t.hit * sigmoid(y) - t.miss * sigmoid(-y)) * t.sign, right};
    case Formula::square: return {(z - t.target) * (z - t.target), 2 * (z - t.target), right};
    case Formula::hinge: return {std::fmax(0, 1 + y), 1 + y > 0 ? t.sign : 0, right};
    default: return {y, t.sign, right};
  }
}

inline void check_loss(DType dtype, Kind kind, bool real, double smoothing, bool channels_last,
                       bool weighted) {
  constexpr int64_t N = 3, H = 9, W = 15, P = H * W;
  const PatchTerm term = term_of(kind, real, smoothing);
  const DType wide = dtype == DType::f64 ? DType::f64 : DType::f32;
  Image logits(dtype, N, term.pair ? 2 : 1, H, W, channels_last), weight(wide, N, 1, H, W);
  Image grad(wide, N, term.pair ? 2 : 1, H, W, channels_last), terms(wide, N, 1, H, W);
  logits.fill(3);
  weight.fill();
  for (int64_t i = 0; i < weight.size(); ++i)
    weight.put(i, weight.entry(i) > 0 ? weight.entry(i) : 0);
  const double factor = 0.37;
  PatchSide side{};
  side.dtype = dtype;
  side.term = term;
  side.logits = logits.data();
  side.image = logits.view().n;
  side.channel = logits.view().c;
  side.patch = logits.view().w;
  if (weighted) {
    side.weight = weight.data();
    side.weight_image = P;
    side.weight_patch = 1;
  }
  side.terms = terms.data();
  side.grad = grad.data();
  side.grad_image = grad.view().n;
  side.grad_channel = grad.view().c;
  side.grad_patch = grad.view().w;
  side.images = N;
  side.patches = P;
  side.factor = factor;
  const PatchLossKernels& kernels = patch_loss_kernels();
  // Two chunks, the second one of no round size.
  const PatchSums first = kernels.side(side, 0, 150), second = kernels.side(side, 150, N * P);
  std::vector<double> sums(2), expected_terms, expected_grad;
  double all_weights = 0;
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t i = 0; i < P; ++i) {
      const int64_t h = i / W, w = i % W;
      const double z =
          term.pair ? logits.at(n, 1, h, w) - logits.at(n, 0, h, w) : logits.at(n, 0, h, w);
      const Term t = term_at(term, z);
      const double by = weighted ? weight.entry(n * P + i) : 1;
      all_weights += weight.entry(n * P + i);
      sums[0] += by * t.loss;
      sums[1] += by * t.right;
      expected_terms.push_back(by * t.loss);
    }
  }
  for (int64_t n = 0; n < N; ++n)
    for (int c = 0; c < (term.pair ? 2 : 1); ++c)
      for (int64_t i = 0; i < P; ++i) {
        const int64_t h = i / W, w = i % W;
        const double z =
            term.pair ? logits.at(n, 1, h, w) - logits.at(n, 0, h, w) : logits.at(n, 0, h, w);
        const double slope = term_at(term, z).slope * factor;
        const double by = weighted ? weight.entry(n * P + i) : 1;
        expected_grad.push_back(term.pair && c == 0 ? -slope * by : slope * by);
      }
  const double tolerance = dtype == DType::f64 ? 1e-14 : 1e-6;
  compare("loss, right patches", {first.loss + second.loss, first.right + second.right}, sums,
          tolerance);
  compare("terms", terms.values(), expected_terms, tolerance);
  compare("gradient of logits", grad.values(), expected_grad, tolerance);
  side.weight = weight.data();
  side.weight_image = P;
  side.weight_patch = 1;
  compare("sum of weights", {kernels.weight_sum(side, 0, N * P)}, {all_weights}, tolerance);
}

inline void check_head(DType dtype, int64_t channels, bool channels_last) {
  constexpr int64_t N = 3, H = 7, W = 13, P = H * W;
  const DType wide = dtype == DType::f64 ? DType::f64 : DType::f32;
  Image x(dtype, N, channels, H, W, channels_last), grad(wide, N, channels, H, W, channels_last);
  Image weight(wide, 1, channels, 1, 1);
  x.fill();
  weight.fill(1 / std::sqrt(double(channels)));
  PatchHead head{};
  head.dtype = dtype;
  head.term = term_of(Kind::softmax, true, 0.1);
  head.x = x.data();
  head.image = x.view().n;
  head.channel = x.view().c;
  head.patch = x.view().w;
  head.weight = weight.data();
  head.bias = 0.25;
  head.grad = grad.data();
  head.grad_image = grad.view().n;
  head.grad_channel = grad.view().c;
  head.grad_patch = grad.view().w;
  head.images = N;
  head.patches = P;
  head.channels = channels;
  head.factor = 0.37;
  std::vector<double> weights(size_t(channels) + 1), expected(size_t(channels) + 1);
  const PatchLossKernels& kernels = patch_loss_kernels();
  const PatchSums got = kernels.head(head, 0, N * P, weights.data());
  double loss = 0;
  std::vector<double> slopes;
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t i = 0; i < P; ++i) {
      double z = head.bias;
      for (int64_t c = 0; c < channels; ++c) z += weight.entry(c) * x.at(n, c, i / W, i % W);
      const Term t = term_at(head.term, z);
      loss += t.loss;
      slopes.push_back(t.slope * head.factor);
      for (int64_t c = 0; c < channels; ++c)
        expected[size_t(c)] += slopes.back() * x.at(n, c, i / W, i % W);
      expected[size_t(channels)] += slopes.back();
    }
  }
  std::vector<double> expected_grad;
  for (int64_t n = 0; n < N; ++n)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < P; ++i)
        expected_grad.push_back(slopes[size_t(n * P + i)] * weight.entry(c));
  const double tolerance = dtype == DType::f64 ? 1e-14 : 2e-6;
  compare("head's loss", {got.loss}, {loss}, tolerance);
  compare("gradient of features", grad.values(), expected_grad, tolerance);
  compare("gradient of the head's weight and bias", weights, expected, tolerance);
}

inline void check_l1_and_scale(DType dtype) {
  constexpr int64_t size = 1003;
  const DType wide = dtype == DType::f64 ? DType::f64 : DType::f32;
  Image a(dtype, 1, 1, 1, size), b(dtype, 1, 1, 1, size);
  Image grad_a(wide, 1, 1, 1, size), grad_b(wide, 1, 1, 1, size);
  a.fill();
  b.fill();
  b.put(5, a.entry(5));
  const double factor = 0.37;
  const PatchLossKernels& kernels = patch_loss_kernels();
  const double got =
      kernels.l1(dtype, a.data(), b.data(), grad_a.data(), grad_b.data(), factor, 0, size);
  double sum = 0;
  std::vector<double> slopes, negative, scaled;
  for (int64_t i = 0; i < size; ++i) {
    const double d = a.entry(i) - b.entry(i);
    sum += std::fabs(d);
    slopes.push_back(d > 0 ? factor : d < 0 ? -factor : 0);
    negative.push_back(-slopes.back());
    scaled.push_back(slopes.back() * 3);
  }
  const double tolerance = dtype == DType::f64 ? 1e-14 : 1e-6;
  compare("absolute difference", {got}, {sum}, tolerance);
  compare("its gradient", grad_a.values(), slopes, tolerance);
  compare("its negative gradient", grad_b.values(), negative, tolerance);
  kernels.scale(wide, grad_a.data(), 3, 0, size);
  compare("scaled", grad_a.values(), scaled, tolerance);
}

}  // namespace fastda::harness
