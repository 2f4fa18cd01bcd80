// Patch losses: value, gradient and accuracy sums in one pass over the logits.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/patch_term.h"

namespace fastda::cpu {

struct PatchSide : PatchView {
  DType dtype = DType::f32;
  double factor = 0;
};

// With two classes only the difference of their filters and biases counts, so the convolution has
// one channel.
struct PatchHead : HeadView {
  DType dtype = DType::f32;
  const void* weight = nullptr;  // [channels] in the accumulator type
  double bias = 0;
  int64_t channels = 0;
  double factor = 0;
};

struct PatchSums {
  double loss, right, slope;  // without the factors
};

struct PatchLossKernels {
  // Patches [begin, end) of all images together.
  PatchSums (*side)(const PatchSide&, int64_t begin, int64_t end);
  // weights: null, or [channels + 1], to which the chunk's gradients of weight and bias are added.
  PatchSums (*head)(const PatchHead&, int64_t begin, int64_t end, double* weights);
  // The sum of side.weight.
  double (*weight_sum)(const PatchSide&, int64_t begin, int64_t end);
  // The sum of |a - b|; where not null, grad_a = factor * sign(a - b) and grad_b its negative, in
  // the accumulator type.
  double (*l1)(DType dtype, const void* a, const void* b, void* grad_a, void* grad_b, double factor,
               int64_t begin, int64_t end);
  // x *= factor; float or double
  void (*scale)(DType dtype, void* x, double factor, int64_t begin, int64_t end);
};
FASTDA_DECLARE_KERNELS(PatchLossKernels, patch_loss)

}  // namespace fastda::cpu
