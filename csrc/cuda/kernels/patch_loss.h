// Patch losses: value, gradient and accuracy sums in one pass over the logits.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/patch_term.h"

namespace fastda::cuda {

// One summand of a loss, `factor` times the sum of what its blocks found. A block's sums stand in
// losses[first + block] and rights[first + block].
struct Part {
  int first = 0, blocks = 0;
  int64_t run = 0;              // entries of one block
  double factor = 0;            // of the loss
  double share = 0;             // of the accuracy
  const void* scale = nullptr;  // one more factor, or null
  DType scale_dtype = DType::f32;
  const double* weight_sums =
      nullptr;            // [weight_blocks] or null; their sum is what share divides by, and factor
  int weight_blocks = 0;  // where divide_by_weight
  bool divide_by_weight = false;
  float* accuracy = nullptr;  // or null
};

// One side of a loss; `patches` is at least 1.
struct Side : PatchView {
  Part part{};
  int64_t total = 0;  // patches of all images
};

// factor * |a - b| over dense entries.
struct L1 {
  Part part{};
  const void *a = nullptr, *b = nullptr;
  void *grad_a = nullptr, *grad_b = nullptr;  // wide type, or null
  int64_t total = 0;
  bool packs = false;  // a and b may be read 16 bytes at a time
};

// The last 1x1 convolution and one side of the loss; the gradient is laid out as x, `patches` is at
// least 1.
struct HeadSide : HeadView {
  Part part{};
  int64_t total = 0;
};

struct Head {
  HeadSide side[2];
  const void* weight = nullptr;  // [1 or 2, C]
  const void* bias = nullptr;    // [1 or 2] or null
  // [rows, C + 1] in the wide type: a warp's gradients of weight and bias; or null.
  void* sums = nullptr;
  int channels = 0;
  int groups = 1;  // of 32 patches, to one warp
};

constexpr int loss_parts = 3;
struct Losses {
  Side side[2];
  L1 l1;
  double* losses = nullptr;
  double* rights = nullptr;
};

// How `total` patches or entries are cut: a function of the size alone, so that the order of the
// sums is too.
int loss_blocks(int64_t total);
int weight_blocks(int64_t total);
int head_groups(int64_t total);
int head_blocks(int64_t total, int groups);
int head_rows(int64_t total, int groups);  // rows of Head::sums that one side takes

// side.part.weight_sums = partial sums of side.weight, for both sides.
void sum_weights(DType dtype, const Side (&sides)[2], double* const (&sums)[2], void* stream);
// Sides with logits and l1 with a, all of `dtype`.
void run_losses(DType dtype, const Losses& p, void* stream);
void run_head(DType dtype, const Head& p, double* losses, double* rights, void* stream);
// The loss, float or double, and the accuracies of the parts.
void finish_losses(const Part (&parts)[loss_parts], const double* losses, const double* rights,
                   void* loss, DType loss_dtype, void* stream);
// Gradients in the wide type from the rows of Head::sums; of two classes the first gets the
// negative.
void finish_head(DType dtype, const void* sums, int rows, int channels, bool pair,
                 void* grad_weight, void* grad_bias, void* stream);
// x *= factor for two dense arrays of float or double.
void scale_both(void* const (&x)[2], const DType (&dtypes)[2], const int64_t (&totals)[2],
                const void* factor, DType factor_dtype, void* stream);

}  // namespace fastda::cuda
