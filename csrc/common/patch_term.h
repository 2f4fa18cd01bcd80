// What a patch costs, by the kind of loss: everything that CPU and CUDA share. No torch.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTDA_EITHER __host__ __device__ __forceinline__
#else
#define FASTDA_EITHER inline __attribute__((always_inline))
#endif

namespace fastda {

// Named in Python as here, in this order.
enum class Kind { softmax, bce, lsgan, hinge, wgan };
constexpr const char* kind_names[] = {"softmax", "bce", "lsgan", "hinge", "wgan"};
enum class Reduction { mean, sum, batchmean };
constexpr const char* reduction_names[] = {"mean", "sum", "batchmean"};

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

inline PatchTerm term_of(Kind kind, bool real, double smoothing) {
  PatchTerm t{};
  switch (kind) {
    case Kind::softmax:
    case Kind::bce: t.formula = smoothing > 0 ? Formula::log_smooth : Formula::log; break;
    case Kind::lsgan: t.formula = Formula::square; break;
    case Kind::hinge: t.formula = Formula::hinge; break;
    case Kind::wgan: t.formula = Formula::linear; break;
  }
  t.pair = kind == Kind::softmax;
  t.sign = real == t.pair ? 1 : -1;
  t.hit = 1 - smoothing / 2;
  t.miss = smoothing / 2;
  t.target = real ? t.hit : t.miss;
  t.threshold = kind == Kind::lsgan ? 0.5 : 0;
  return t;
}

// The generator wants its patches to pass for real ones; a score beyond hinge's margin is still
// worth having.
inline PatchTerm generator_term(Kind kind) {
  return term_of(kind == Kind::hinge ? Kind::wgan : kind, true, 0);
}

// Of a loss; a mean over nothing is NaN, as 0 times the infinite reciprocal.
inline double factor_of(Reduction reduction, int64_t images, double total) {
  if (reduction == Reduction::sum) return 1.0;
  return 1.0 / (reduction == Reduction::batchmean ? double(images) : total);
}

// One side of a loss in memory. Strides are in elements. Accumulator type: float, or double for
// double logits.
struct PatchView {
  PatchTerm term{};
  const void* logits = nullptr;
  int64_t image = 0, channel = 0, patch = 0;  // of logits
  const void* weight = nullptr;               // accumulator type, or null
  int64_t weight_image = 0, weight_patch = 0;
  void* terms = nullptr;  // [images, patches] weighted terms in the accumulator type, or null
  void* grad = nullptr;   // factor * d term / d logits in the accumulator type, or null
  int64_t grad_image = 0, grad_channel = 0, grad_patch = 0;
  int64_t images = 0, patches = 1;  // patches of one image
};

// The features that the last 1x1 convolution makes one side's logits of.
struct HeadView {
  PatchTerm term{};
  const void* x = nullptr;
  int64_t image = 0, channel = 0, patch = 0;  // of x; channel or patch is 1
  void* grad = nullptr;                       // accumulator type, or null
  int64_t grad_image = 0, grad_channel = 0, grad_patch = 0;
  int64_t images = 0, patches = 1;  // patches of one image
};

// What follows is of scalars S or, but for the first, of vectors V of them; each translation unit
// has its own, as kernels are compiled once per instruction set.
namespace {

// A softmax with a logit of +Inf has no value: NaN.
template <typename S>
FASTDA_EITHER S difference(S real, S fake) {
  const S larger = real > fake ? real : fake;
  return (fake - real) + (larger - larger);
}

template <typename V>
struct Scored {
  V term, slope;
};

// The loss of a patch with score z and its derivative by z, NaN where PyTorch has NaN. Logistic(y):
// softplus(y), softplus(-y), and their derivatives, sigmoid(y) and sigmoid(-y).
template <typename Logistic, typename S, typename V>
FASTDA_EITHER Scored<V> score(Formula formula, const PatchTerm& p, V z) {
  const V sign = V{} + S(p.sign), y = sign * z;
  switch (formula) {
    case Formula::log: {
      const Logistic g(y);
      return {g.softplus, g.sigmoid * sign};
    }
    case Formula::log_smooth: {
      const Logistic g(y);
      const S hit = S(p.hit), miss = S(p.miss);
      return {hit * g.softplus + miss * g.softplus_negative,
              (hit * g.sigmoid - miss * g.sigmoid_negative) * sign};
    }
    case Formula::square: {
      const V d = z - S(p.target);
      return {d * d, d + d};
    }
    case Formula::hinge: {
      const V margin = y + S(1);
      return {margin <= S(0) ? V{} : margin, margin <= S(0) ? V{} : sign};
    }
    default: return {y, sign};
  }
}

template <typename S, typename V>
FASTDA_EITHER auto is_right(const PatchTerm& p, V z) {
  return S(p.sign) * (z - S(p.threshold)) < S(0);
}

}  // namespace
}  // namespace fastda
