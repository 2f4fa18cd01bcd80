// Patch losses: value, gradient and accuracy sums in one pass over the logits.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/patch_term.h"

namespace fastda::cpu {

// One side of a loss. Strides are in elements. Accumulator type: float, or double for double
// logits.
struct PatchSide {
  DType dtype;
  PatchTerm term;
  const void* logits;
  int64_t image, channel, patch;  // of logits
  const void* weight;             // accumulator type, or null
  int64_t weight_image, weight_patch;
  void* terms;  // [images, patches] weighted terms in the accumulator type, or null
  void* grad;   // factor * d term / d logits in the accumulator type, or null
  int64_t grad_image, grad_channel, grad_patch;
  int64_t images, patches;
  double factor;
};

// The last 1x1 convolution and one side of the loss. With two classes only the difference of their
// filters and biases counts, so the convolution has one channel.
struct PatchHead {
  DType dtype;
  PatchTerm term;
  const void* x;
  int64_t image, channel, patch;  // of x; channel or patch is 1
  const void* weight;             // [channels] in the accumulator type
  double bias;
  void* grad;  // accumulator type, or null
  int64_t grad_image, grad_channel, grad_patch;
  int64_t images, patches, channels;
  double factor;
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
