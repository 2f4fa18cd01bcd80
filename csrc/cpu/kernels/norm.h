#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastda::cpu {

enum class Activation : int { none, relu, leaky_relu };

// Dense images, and what is known of each statistic (a channel's, or that of one image's channel).
// Constants are in the accumulator type.
struct Norm {
  DType dtype;
  Activation activation;
  double negative_slope;
  const void *x, *residual, *grad;
  const void* output;  // the activation's mask is read off it; null: off the result computed again
  void *y, *d_x, *d_residual;
  const void *center, *scale, *shift;  // before the activation: (x - center) scale + shift
  const void *slope, *offset;          // d_x = scale grad + slope (x - center) + offset
  bool through_statistics;             // false: d_x = scale grad
  bool past_the_cache;                 // results are too large to be found in it later
};

// Entries from `begin` on, and the first of their statistics: `positions` rows of all channels one
// after another, or, with channels = 1, `planes` times as many positions of one channel, `stride`
// from one plane to the next.
struct NormRun {
  int64_t begin, positions, channels, statistic, planes, stride;
};

struct NormKernels {
  // Of every channel the mean and the sum of squared differences from it.
  void (*moments)(const Norm& norm, const NormRun& run, double* mean, double* squares);
  void (*normalize)(const Norm& norm, const NormRun& run);
  // Of every channel added to: the sum of what passes the activation of grad, and of that times
  // (x - center). Writes d_residual, if there is one.
  void (*sums)(const Norm& norm, const NormRun& run, double* grads, double* products);
  // Writes d_x. Where d_residual is there, it has been written.
  void (*input_gradient)(const Norm& norm, const NormRun& run);
};
FASTDA_DECLARE_KERNELS(NormKernels, norm)

// The statistics of two parts as that of their union, in place of the first's (Chan, Golub and
// LeVeque 1979). Weighted means, not a difference: two infinite means stay infinite.
struct Merge {
  double first, second, product;
  Merge(int64_t n, int64_t m)
      : first(double(n) / double(n + m)),
        second(double(m) / double(n + m)),
        product(double(n) * second) {}
  void operator()(double& mean, double& squares, double other_mean, double other_squares) const {
    const double difference = other_mean - mean;
    mean = first * mean + second * other_mean;
    squares += other_squares + difference * difference * product;
  }
};

}  // namespace fastda::cpu
