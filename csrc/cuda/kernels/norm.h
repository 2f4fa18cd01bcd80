// Normalisation with what follows it.
#pragma once

#include "common/dtype.h"
#include "common/norm.h"

namespace fastda::cuda {

// A value a channel, or a statistic; null: none.
struct NormVector {
  const void* data = nullptr;
  DType dtype = DType::f32;
};

// Dense images and what becomes of them. The result is (x - center) scale + shift + residual through
// the activation, and d_x is scale grad + slope (x - center) + offset of what passes it.
struct Norm : NormLayout {
  DType dtype = DType::f32;
  double eps = 0;
  double negative_slope = 1;  // 1: no activation
  const void* x = nullptr;
  NormVector weight, bias;
  NormVector mean, variance;  // that are used; null forward: those of x

  const void* residual = nullptr;  // or null
  void* y = nullptr;
  double *own_mean = nullptr, *own_variance = nullptr;  // [statistics], written

  const void* grad = nullptr;
  const void* output = nullptr;  // the mask is read off it; null: off the result computed again
  void *d_x = nullptr, *d_residual = nullptr;   // or null
  void *d_weight = nullptr, *d_bias = nullptr;  // [channels] in the wide type, or null
  bool through_statistics = false;              // false: d_x = scale grad
  double* partial = nullptr;                    // [norm_partials(p)]
};

// How many doubles a call puts aside: a function of the shape alone, as is the order of sums.
int64_t norm_partials(const Norm& p);
void norm_forward(const Norm& p, void* stream);
void norm_backward(const Norm& p, void* stream);

}  // namespace fastda::cuda
