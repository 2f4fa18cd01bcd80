// Compiled once per instruction set, with FASTDA_ISA naming it.
//
// Patches go through in blocks that stay in the first-level cache:
//
//   logits, any strides
//     -> scores z
//     -> terms and slopes, full vectors whatever the size of an image
//     -> gradient
//
// Sums are kept in the accumulator type within a block and in double from block to block.
#include "cpu/kernels/patch_loss.h"

#include "cpu/simd/generic.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

// Patches (or pixels) a block: 32 additions in a lane round little, and the buffers take 8 KiB at
// most.
template <typename S>
constexpr int block = 32 * lanes<S>;

template <typename S>
struct Constants;
// exp(r) = 1 + r + r^2 (exp[0] + exp[1] r + ...) for |r| <= ln(2) / 2, and atanh(s) = s + s t
// (atanh[0] + atanh[1] t + ...) with t = s^2 for s <= 1/3: Chebyshev interpolation, relative errors
// of 1e-8 and 2e-8 (float), 2e-17 and 5e-18 (double).
template <>
struct Constants<float> {
  // 1.5 * 2^23: adding it rounds to an integer, in the low bits.
  static constexpr float round = 12582912.0f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float smallest = -87.33654f;  // below, exp would be subnormal
  static constexpr int mantissa = 23;
  static constexpr float exp[] = {0.5f, 0.1666657699f, 0.04166655462f, 0.008363179053f,
                                  0.001392618359f};
  static constexpr float atanh[] = {0.3333332017f, 0.2000378032f, 0.141183099f, 0.1342574901f};
};
template <>
struct Constants<double> {
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 6.93147180369123816490e-01,
                          ln2_low = 1.90821492927058770002e-10;
  static constexpr double smallest = -708.3964185322641;
  static constexpr int mantissa = 52;
  static constexpr double exp[] = {0.500000000000000102,     0.166666666666666675,
                                   0.0416666666666241279,    0.00833333333333006183,
                                   0.00138888889172137169,   0.000198412698630536169,
                                   0.0000248015212959543751, 2.75572684599970648e-6,
                                   2.76200884454097482e-7,   2.51003854955103191e-8};
  static constexpr double atanh[] = {
      0.333333333333333293,  0.200000000000072913,  0.142857142835543786,  0.111111113587139315,
      0.0909089471806642908, 0.0769278503247931155, 0.0665707210482746808, 0.0600053640479535627,
      0.0440036924307233694, 0.0808202280597176611};
};

template <typename S, int N>
inline Vec<S> polynomial(const S (&coefficient)[N], Vec<S> x) {
  Vec<S> sum = broadcast(coefficient[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) sum = sum * x + coefficient[i];
  return sum;
}

// exp(x) for x <= 0, and NaN for NaN. What would be subnormal is 0.
template <typename S>
inline Vec<S> exp_negative(Vec<S> x) {
  using C = Constants<S>;
  const Vec<S> shifted = x * S(1.4426950408889634) + C::round;
  const Vec<S> n = shifted - C::round;
  const Vec<S> r = (x - n * C::ln2_high) - n * C::ln2_low;
  const Vec<S> p = polynomial(C::exp, r) * (r * r) + r + S(1);
  const IntVec<S> one = (IntVec<S>)broadcast(S(1));
  const Vec<S> power = (Vec<S>)(((IntVec<S>)shifted << C::mantissa) + one);  // 2^n
  return x < C::smallest ? Vec<S>{} : p * power;
}

// softplus(y) = max(y, 0) + log(1 + exp(-|y|)), the same for -y, and both derivatives, off one
// exponential and one division.
template <typename S>
struct Logistic {
  Vec<S> softplus, softplus_negative, sigmoid, sigmoid_negative;

  inline explicit Logistic(Vec<S> y) {
    const Vec<S> size = y < S(0) ? -y : y;
    const Vec<S> e = exp_negative<S>(-size);
    const Vec<S> u = e + S(1), v = e + S(2);
    const Vec<S> reciprocal = S(1) / (u * v);
    const Vec<S> s = e * u * reciprocal, t = s * s;
    // log(1 + e) = 2 atanh(e / (2 + e))
    const Vec<S> log1p = (s + s) * (polynomial(Constants<S>::atanh, t) * t + S(1));
    const Vec<S> large = v * reciprocal, small = e * large;
    softplus = (y > S(0) ? y : Vec<S>{}) + log1p;
    softplus_negative = (y < S(0) ? -y : Vec<S>{}) + log1p;
    sigmoid = y < S(0) ? small : large;
    sigmoid_negative = y < S(0) ? large : small;
  }
};

template <bool V>
struct Bool {
  static constexpr bool value = V;
};

template <typename S>
inline S sum_lanes(Vec<S> v) {
  S lane[lanes<S>];
  store_vec(lane, v);
#pragma GCC unroll 4
  for (int half = lanes<S> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}
template <typename S>
inline IntVec<S> first_lanes(int n) {
  IntVec<S> lane;
#pragma GCC unroll 16
  for (int i = 0; i < lanes<S>; ++i) lane[i] = i;
  return lane < typename Bits<S>::type(n);
}

template <typename S>
struct Block {
  alignas(64) S z[block<S>], weight[block<S>], term[block<S>], slope[block<S>];
};

// Scores b.z[0, n) become b.term, b.slope (times factor) and their sums. A patch of weight zero is
// taken out, whatever its logits are.
template <typename S, Formula F, bool Weighted>
void evaluate(const PatchTerm& given, Block<S>& b, int n, S factor, PatchSums& sums) {
  constexpr int L = lanes<S>;
  const PatchTerm p = given;  // of its own, or the stores below could change it
  Vec<S> loss{}, right{}, slopes{};
  const auto step = [&](int i, auto whole) {
    const Vec<S> z = load_vec(b.z + i);
    auto [term, slope] = score<Logistic<S>, S>(F, p, z);
    Vec<S> good = is_right<S>(p, z) ? broadcast(S(1)) : Vec<S>{};
    if constexpr (Weighted) {
      const Vec<S> w = load_vec(b.weight + i);
      term = w == S(0) ? Vec<S>{} : term * w;
      slope = w == S(0) ? Vec<S>{} : slope * w;
      good *= w;
      // The factor of a mean over no weight at all is infinite.
      store_vec(b.slope + i, w == S(0) ? Vec<S>{} : slope * factor);
    } else {
      store_vec(b.slope + i, slope * factor);
    }
    store_vec(b.term + i, term);
    if constexpr (!decltype(whole)::value) {
      const IntVec<S> inside = first_lanes<S>(n - i);
      term = inside ? term : Vec<S>{};
      good = inside ? good : Vec<S>{};
      slope = inside ? slope : Vec<S>{};
    }
    loss += term;
    right += good;
    slopes += slope;
  };
  int i = 0;
  for (; i + L <= n; i += L) step(i, Bool<true>{});
  if (i < n) step(i, Bool<false>{});
  sums.loss += double(sum_lanes<S>(loss));
  sums.right += double(sum_lanes<S>(right));
  sums.slope += double(sum_lanes<S>(slopes));
}

template <typename S>
using Evaluate = void (*)(const PatchTerm&, Block<S>&, int, S, PatchSums&);
template <typename S, bool Weighted>
Evaluate<S> evaluate_of(Formula f) {
  switch (f) {
    case Formula::log: return evaluate<S, Formula::log, Weighted>;
    case Formula::log_smooth: return evaluate<S, Formula::log_smooth, Weighted>;
    case Formula::square: return evaluate<S, Formula::square, Weighted>;
    case Formula::hinge: return evaluate<S, Formula::hinge, Weighted>;
    default: return evaluate<S, Formula::linear, Weighted>;
  }
}

// Calls run(image, patch, at, count) for every run of patches within one image among [begin, begin
// + n).
template <typename F>
inline void for_runs(int64_t patches, int64_t begin, int n, F&& run) {
  int64_t image = begin / patches, patch = begin % patches;
  for (int at = 0; at < n;) {
    const int64_t left = patches - patch;
    const int count = left < n - at ? int(left) : n - at;
    run(image, patch, at, count);
    at += count;
    ++image;
    patch = 0;
  }
}

template <typename T, typename S>
PatchSums side_of(const PatchSide& s, int64_t begin, int64_t end) {
  const T* logits = static_cast<const T*>(s.logits);
  const S* weight = static_cast<const S*>(s.weight);
  S* terms = static_cast<S*>(s.terms);
  S* grad = static_cast<S*>(s.grad);
  const bool pair = s.term.pair;
  // Images that follow each other without a gap are as good as one.
  const bool gapless = !pair && s.image == s.patches * s.patch &&
                       (!weight || s.weight_image == s.patches * s.weight_patch) &&
                       (!grad || s.grad_image == s.patches);
  const int64_t patches = gapless ? end : s.patches;
  const auto run =
      weight ? evaluate_of<S, true>(s.term.formula) : evaluate_of<S, false>(s.term.formula);
  PatchSums sums{0, 0, 0};
  Block<S> b;
  for (int64_t first = begin; first < end; first += block<S>) {
    const int n = int(end - first < block<S> ? end - first : block<S>);
    // What fills the last vector must not trap or be slow, no more.
    for (int i = n; i < block<S> && i < n + lanes<S>; ++i) b.z[i] = b.weight[i] = 0;
    for_runs(patches, first, n, [&](int64_t image, int64_t patch, int at, int count) {
      const T* x = logits + image * s.image + patch * s.patch;
      const T* fake = x + s.channel;
      S* z = b.z + at;
      const int64_t step = s.patch;
      if (pair && step == 1) {
#pragma omp simd
        for (int i = 0; i < count; ++i) z[i] = difference<S>(load(x + i), load(fake + i));
      } else if (pair) {
        for (int i = 0; i < count; ++i)
          z[i] = difference<S>(load(x + i * step), load(fake + i * step));
      } else if (step == 1) {
#pragma omp simd
        for (int i = 0; i < count; ++i) z[i] = S(load(x + i));
      } else {
        for (int i = 0; i < count; ++i) z[i] = S(load(x + i * step));
      }
      if (weight) {
        const S* w = weight + image * s.weight_image + patch * s.weight_patch;
        for (int i = 0; i < count; ++i) b.weight[at + i] = w[i * s.weight_patch];
      }
    });
    run(s.term, b, n, S(s.factor), sums);
    if (terms)
      for (int i = 0; i < n; ++i) terms[first + i] = b.term[i];
    if (grad)
      for_runs(patches, first, n, [&](int64_t image, int64_t patch, int at, int count) {
        S* g = grad + image * s.grad_image + patch * s.grad_patch;
        S* fake = g + s.grad_channel;
        const S* slope = b.slope + at;
        const int64_t step = s.grad_patch;
        if (pair && step == 1) {
#pragma omp simd
          for (int i = 0; i < count; ++i) {
            g[i] = -slope[i];
            fake[i] = slope[i];
          }
        } else if (pair) {
          for (int i = 0; i < count; ++i) {
            g[i * step] = -slope[i];
            fake[i * step] = slope[i];
          }
        } else {
          std::memcpy(g, slope, size_t(count) * sizeof(S));  // the host side makes it dense
        }
      });
  }
  return sums;
}

template <typename S, typename T>
inline Vec<S> load_lanes(const T* p, int n) {
  if constexpr (sizeof(T) == sizeof(S)) {
    if (n >= lanes<S>) return load_vec(p);
  }
  return load_first<S>(p, n < lanes<S> ? n : lanes<S>);
}
template <typename S>
inline void store_lanes(S* p, Vec<S> v, int n) {
  if (n >= lanes<S>)
    store_vec(p, v);
  else
    store_first<S>(p, v, n);
}

// A run of patches through the 1x1 convolution, x by channel: z[p] = bias + sum over c of w[c]
// x[c][p].
template <typename S, typename T>
void head_scores_planar(const PatchHead& h, const T* x, const S* w, int n, S* z) {
  constexpr int L = lanes<S>, group = 8;
  for (int i = 0; i < n; i += group * L) {
    Vec<S> sum[group];
    for (int v = 0; v < group; ++v) sum[v] = broadcast(S(h.bias));
    const int left = n - i;
    if (left >= group * L) {
      for (int64_t c = 0; c < h.channels; ++c)
#pragma GCC unroll 8
        for (int v = 0; v < group; ++v)
          sum[v] += load_lanes<S>(x + c * h.channel + i + v * L, L) * w[c];
    } else {
      const int whole = left / L;
      for (int64_t c = 0; c < h.channels; ++c) {
        const T* row = x + c * h.channel + i;
#pragma GCC unroll 8
        for (int v = 0; v < group; ++v)
          if (v < whole) sum[v] += load_lanes<S>(row + v * L, L) * w[c];
        if (left % L) sum[group - 1] += load_lanes<S>(row + whole * L, left % L) * w[c];
      }
      if (whole < group - 1) sum[whole] = sum[group - 1];
    }
    for (int v = 0; v < group && v * L < left; ++v) store_vec(z + i + v * L, sum[v]);
  }
}
// And back: grad[c][p] = slope[p] w[c], weights[c] += sum over p of slope[p] x[c][p]. slope is 0
// past n.
template <typename S, typename T>
void head_gradients_planar(const PatchHead& h, const T* x, const S* w, int n, const S* slope,
                           S* grad, double* weights) {
  constexpr int L = lanes<S>;
  for (int64_t c = 0; c < h.channels; ++c) {
    const T* row = x + c * h.channel;
    S* out = grad ? grad + c * h.grad_channel : nullptr;
    Vec<S> sum{};
    int i = 0;
    for (; i + L <= n; i += L) {
      const Vec<S> s = load_vec(slope + i);
      if (weights) sum += s * load_lanes<S>(row + i, L);
      if (out) store_vec(out + i, s * w[c]);
    }
    if (i < n) {
      const Vec<S> s = load_vec(slope + i);
      if (weights) sum += s * load_lanes<S>(row + i, n - i);
      if (out) store_lanes<S>(out + i, s * w[c], n - i);
    }
    if (weights) weights[c] += double(sum_lanes<S>(sum));
  }
}

// The same, x by patch.
template <typename S, typename T>
void head_scores_interleaved(const PatchHead& h, const T* x, const S* w, int n, S* z) {
  constexpr int L = lanes<S>;
  for (int i = 0; i < n; ++i) {
    const T* row = x + i * h.patch;
    Vec<S> sum{};
    int64_t c = 0;
    for (; c + L <= h.channels; c += L) sum += load_lanes<S>(row + c, L) * load_vec(w + c);
    if (c < h.channels) {
      const int left = int(h.channels - c);
      sum += load_lanes<S>(row + c, left) * load_lanes<S>(w + c, left);
    }
    z[i] = S(h.bias) + sum_lanes<S>(sum);
  }
}
template <typename S, typename T>
void head_gradients_interleaved(const PatchHead& h, const T* x, const S* w, int n, const S* slope,
                                S* grad, double* weights) {
  constexpr int L = lanes<S>, group = 4;
  for (int64_t c = 0; c < h.channels; c += group * L) {
    Vec<S> sum[group] = {}, filter[group];
    int count[group];
    for (int v = 0; v < group; ++v) {
      const int64_t left = h.channels - c - v * L;
      count[v] = left <= 0 ? 0 : left < L ? int(left) : L;
      filter[v] = count[v] ? load_lanes<S>(w + c + v * L, count[v]) : Vec<S>{};
    }
    for (int i = 0; i < n; ++i) {
      const T* row = x + i * h.patch + c;
#pragma GCC unroll 4
      for (int v = 0; v < group; ++v) {
        if (count[v] == 0) break;
        if (weights) sum[v] += load_lanes<S>(row + v * L, count[v]) * slope[i];
        if (grad)
          store_lanes<S>(grad + i * h.grad_patch + c + v * L, filter[v] * slope[i], count[v]);
      }
    }
    if (weights)
      for (int v = 0; v < group; ++v) {
        S lane[L];
        store_vec(lane, sum[v]);
        for (int i = 0; i < count[v]; ++i) weights[c + v * L + i] += double(lane[i]);
      }
  }
}

template <typename T, typename S>
PatchSums head_of(const PatchHead& h, int64_t begin, int64_t end, double* weights) {
  constexpr int L = lanes<S>;
  const T* features = static_cast<const T*>(h.x);
  const S* w = static_cast<const S*>(h.weight);
  S* grad = static_cast<S*>(h.grad);
  const auto run = evaluate_of<S, false>(h.term.formula);
  // Features are read twice; the second time they should still be in the first-level cache.
  const int64_t fit = 24 * 1024 / (int64_t(sizeof(T)) * (h.channels + 1)) / L * L;
  const int most = int(fit < 4 * L ? 4 * L : fit > block<S> ? block<S> : fit);
  PatchSums sums{0, 0, 0};
  Block<S> b;
  int64_t image = begin / h.patches, patch = begin % h.patches;
  for (int64_t at = begin; at < end;) {
    const int64_t left = h.patches - patch < end - at ? h.patches - patch : end - at;
    const int n = int(left < most ? left : most);
    const T* x = features + image * h.image + patch * h.patch;
    S* g = grad ? grad + image * h.grad_image + patch * h.grad_patch : nullptr;
    if (h.patch == 1)
      head_scores_planar<S>(h, x, w, n, b.z);
    else
      head_scores_interleaved<S>(h, x, w, n, b.z);
    for (int i = n; i % L; ++i) b.z[i] = 0;
    if (h.term.pair)
      for (int i = 0; i < n; ++i)
        b.z[i] += b.z[i] - b.z[i];  // infinite where both classes are: their loss is NaN
    run(h.term, b, n, S(h.factor), sums);
    for (int i = n; i % L; ++i) b.slope[i] = 0;
    if (g || weights) {
      if (h.patch == 1)
        head_gradients_planar<S>(h, x, w, n, b.slope, g, weights);
      else
        head_gradients_interleaved<S>(h, x, w, n, b.slope, g, weights);
    }
    at += n;
    patch += n;
    if (patch == h.patches) {
      patch = 0;
      ++image;
    }
  }
  if (weights) weights[h.channels] += sums.slope * h.factor;
  return sums;
}

template <typename S>
double weight_sum_of(const PatchSide& s, int64_t begin, int64_t end) {
  const S* weight = static_cast<const S*>(s.weight);
  double sum = 0;
  for (int64_t first = begin; first < end; first += block<S>)
    for_runs(s.patches, first, int(end - first < block<S> ? end - first : block<S>),
             [&](int64_t image, int64_t patch, int, int count) {
               const S* w = weight + image * s.weight_image + patch * s.weight_patch;
               double part[8] = {};  // short chains of additions round less
               for (int i = 0; i < count; ++i) part[i % 8] += double(w[i * s.weight_patch]);
               sum += ((part[0] + part[1]) + (part[2] + part[3])) +
                      ((part[4] + part[5]) + (part[6] + part[7]));
             });
  return sum;
}

template <typename T, typename S, bool A, bool B>
double l1_of(const T* a, const T* b, S* grad_a, S* grad_b, S factor, int64_t n) {
  double total = 0;
  for (int64_t first = 0; first < n; first += block<S>) {
    const int count = int(n - first < block<S> ? n - first : block<S>);
    S sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; ++i) {
      const S d = load(a + first + i) - load(b + first + i);
      sum += d < 0 ? -d : d;
      // The derivative at 0 and at NaN is 0, as PyTorch has it.
      const S slope = d > 0 ? factor : d < 0 ? -factor : S(0);
      if constexpr (A) grad_a[first + i] = slope;
      if constexpr (B) grad_b[first + i] = -slope;
    }
    total += double(sum);
  }
  return total;
}

PatchSums side(const PatchSide& s, int64_t begin, int64_t end) {
  return dispatch(s.dtype,
                  [&]<typename T>() { return side_of<T, typename Acc<T>::type>(s, begin, end); });
}

PatchSums head(const PatchHead& h, int64_t begin, int64_t end, double* weights) {
  return dispatch(h.dtype, [&]<typename T>() {
    return head_of<T, typename Acc<T>::type>(h, begin, end, weights);
  });
}

double weight_sum(const PatchSide& s, int64_t begin, int64_t end) {
  return s.dtype == DType::f64 ? weight_sum_of<double>(s, begin, end)
                               : weight_sum_of<float>(s, begin, end);
}

double l1(DType dtype, const void* a, const void* b, void* grad_a, void* grad_b, double factor,
          int64_t begin, int64_t end) {
  return dispatch(dtype, [&]<typename T>() {
    using S = typename Acc<T>::type;
    const T* x = static_cast<const T*>(a) + begin;
    const T* y = static_cast<const T*>(b) + begin;
    S* gx = static_cast<S*>(grad_a) + (grad_a ? begin : 0);
    S* gy = static_cast<S*>(grad_b) + (grad_b ? begin : 0);
    const auto run = grad_a && grad_b ? l1_of<T, S, true, true>
                     : grad_a         ? l1_of<T, S, true, false>
                     : grad_b         ? l1_of<T, S, false, true>
                                      : l1_of<T, S, false, false>;
    return run(x, y, gx, gy, S(factor), end - begin);
  });
}

template <typename S>
void scale_of(S* x, S factor, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}
void scale(DType dtype, void* x, double factor, int64_t begin, int64_t end) {
  if (dtype == DType::f64)
    scale_of(static_cast<double*>(x) + begin, factor, end - begin);
  else
    scale_of(static_cast<float*>(x) + begin, float(factor), end - begin);
}

}  // namespace

extern const PatchLossKernels patch_loss;
const PatchLossKernels patch_loss = {side, head, weight_sum, l1, scale};

}  // namespace fastda::cpu::FASTDA_ISA
