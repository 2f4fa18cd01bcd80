// What a patch's score costs, by the kind of loss. No torch: kernels and their host sides share it.
#pragma once

#include <cstdint>

namespace fastda {

// z is a patch's only logit or, of two, fake - real; y = sign * z.
enum class Formula : int {
  log,         // softplus(y)
  log_smooth,  // hit * softplus(y) + miss * softplus(-y)
  square,      // (z - target)^2
  hinge,       // max(0, 1 + y)
  linear,      // y
};

struct PatchTerm {
  Formula formula;
  bool pair;  // two logits a patch
  double sign, hit, miss, target;
  double threshold;  // right where sign * (z - threshold) < 0
};

// As fastda/ops/patch_loss.py numbers them.
enum Kind : int64_t { softmax, bce, lsgan, hinge, wgan };
enum Reduction : int64_t { mean, sum, batchmean };

inline PatchTerm term_of(int64_t kind, bool real, double smoothing) {
  PatchTerm t{};
  switch (kind) {
    case softmax:
    case bce: t.formula = smoothing > 0 ? Formula::log_smooth : Formula::log; break;
    case lsgan: t.formula = Formula::square; break;
    case hinge: t.formula = Formula::hinge; break;
    default: t.formula = Formula::linear;
  }
  t.pair = kind == softmax;
  t.sign = real == t.pair ? 1 : -1;
  t.hit = 1 - smoothing / 2, t.miss = smoothing / 2;
  t.target = real ? t.hit : t.miss;
  t.threshold = kind == lsgan ? 0.5 : 0;
  return t;
}

// The generator wants its patches to pass for real ones; a score beyond hinge's margin is still
// worth having.
inline PatchTerm generator_term(int64_t kind) {
  return term_of(kind == hinge ? int64_t(wgan) : kind, true, 0);
}

// Of a loss; a mean over nothing is NaN, as 0 times the infinite reciprocal.
inline double factor_of(int64_t reduction, int64_t images, double total) {
  return reduction == sum ? 1.0 : 1.0 / (reduction == batchmean ? double(images) : total);
}

}  // namespace fastda
