// Patch losses in two launches: one over all patches (and pixels), one that adds what its blocks
// found.
//
//   block b of a side ─ patches [b run, (b + 1) run)
//     thread t ─ patches t, t + 256, …: load logits ─ term, slope ─ store gradient ─ add to sums
//     warp shuffles, then warps in order ─ losses[b], rights[b]
//
// Both sides of a discriminator's loss, or a generator's loss and the ℓ₁ term, are blocks of one
// grid. Nothing is added atomically, so that a result repeats bit for bit.
#pragma once

#include "cuda/kernels/device.cuh"
#include "cuda/kernels/patch_loss.h"

namespace fastda::cuda {

constexpr int loss_threads = 256;
constexpr int loss_unroll = 4;  // patches whose loads are under way at once, per thread

FASTDA_DEVICE float exp_of(float v) { return ::expf(v); }
FASTDA_DEVICE double exp_of(double v) { return ::exp(v); }
FASTDA_DEVICE float log1p_of(float v) { return ::log1pf(v); }
FASTDA_DEVICE double log1p_of(double v) { return ::log1p(v); }
FASTDA_DEVICE float abs_of(float v) { return ::fabsf(v); }
FASTDA_DEVICE double abs_of(double v) { return ::fabs(v); }

template <typename S>
struct Logistic {
  S softplus, softplus_negative, sigmoid, sigmoid_negative;

  FASTDA_DEVICE explicit Logistic(S y) {
    const S e = exp_of(-abs_of(y)), large = S(1) / (1 + e), small = e * large;
    const S log1p = log1p_of(e);
    softplus = (y > 0 ? y : S(0)) + log1p;
    softplus_negative = (y < 0 ? -y : S(0)) + log1p;
    sigmoid = y >= 0 ? large : small;
    sigmoid_negative = y >= 0 ? small : large;
  }
};

FASTDA_DEVICE Scored<float> score(const PatchTerm& p, float z) {
  return fastda::score<Logistic<float>, float>(p.formula, p, z);
}
// Out of line: exp and log1p are long in float64, and ptxas takes its time over every copy.
FASTDA_DEVICE_CALL Scored<double> score(const PatchTerm p, double z) {
  return fastda::score<Logistic<double>, double>(p.formula, p, z);
}

// What the loss and the accuracy of a part are multiplied by; the whole block calls it.
struct Factors {
  double loss, accuracy;
};
template <int threads>
FASTDA_DEVICE Factors factors_of(const Part& part, double* scratch) {
  Factors f{part.factor, part.share};
  if (part.weight_sums) {
    double sum = 0;
    for (int i = int(threadIdx.x); i < part.weight_blocks; i += threads) sum += part.weight_sums[i];
    sum = block_sum<threads>(sum, scratch);
    f.accuracy = 1 / sum;
    if (part.divide_by_weight) f.loss = 1 / sum;
  }
  if (part.scale) f.loss *= load_scalar(part.scale, part.scale_dtype, 0);
  return f;
}

template <typename S>
struct Sums {
  S loss = 0, right = 0;
};

template <typename T>
FASTDA_DEVICE Sums<typename Wide<T>::type> side_block(const Side& p, int block, Divisor patches,
                                                      typename Wide<T>::type factor) {
  using S = typename Wide<T>::type;
  const int64_t begin = block * p.part.run;
  const int64_t left = p.total - begin;
  const auto n = uint32_t(left < p.part.run ? left : p.part.run);
  // One division in 64 bits, the others within an image.
  const int64_t first_image = begin / p.patches;
  const auto first_patch = uint32_t(begin - first_image * p.patches);
  const auto* logits = static_cast<const T*>(p.logits);
  const auto* weight = static_cast<const S*>(p.weight);
  auto* grad = static_cast<S*>(p.grad);
  auto* terms = static_cast<S*>(p.terms);
  Sums<S> sums;
  FASTDA_NO_UNROLL
  for (uint32_t start = threadIdx.x; start < n; start += loss_threads * loss_unroll) {
    int64_t image[loss_unroll];
    uint32_t patch[loss_unroll];
    S z[loss_unroll], w[loss_unroll];
    FASTDA_UNROLL
    for (int u = 0; u < loss_unroll; ++u) {
      uint32_t i = start + u * loss_threads;
      i = i < n ? i : start;
      const uint32_t q = first_patch + i, ahead = patches.quotient(q);
      image[u] = first_image + ahead;
      patch[u] = q - ahead * patches.value;
      const T* at = logits + image[u] * p.image + patch[u] * p.patch;
      z[u] = p.term.pair ? difference<S>(widen(at[0]), widen(at[p.channel])) : S(widen(at[0]));
      w[u] = weight ? weight[image[u] * p.weight_image + patch[u] * p.weight_patch] : S(1);
    }
    FASTDA_UNROLL
    for (int u = 0; u < loss_unroll; ++u) {
      const uint32_t i = start + u * loss_threads;
      if (i >= n) break;
      const Scored<S> s = score(p.term, z[u]);
      // A patch of weight zero is taken out, whatever its logits are.
      const S term = w[u] == 0 ? S(0) : s.term * w[u];
      const S slope = w[u] == 0 ? S(0) : s.slope * w[u] * factor;
      sums.loss += term;
      sums.right += is_right<S>(p.term, z[u]) ? w[u] : S(0);
      if (terms) terms[begin + i] = term;
      if (grad) {
        S* g = grad + image[u] * p.grad_image + patch[u] * p.grad_patch;
        g[0] = p.term.pair ? -slope : slope;
        if (p.term.pair) g[p.grad_channel] = slope;
      }
    }
  }
  return sums;
}

template <typename T>
FASTDA_DEVICE Sums<typename Wide<T>::type> l1_block(const L1& p, int block,
                                                    typename Wide<T>::type factor) {
  using S = typename Wide<T>::type;
  constexpr int N = sizeof(S) == 4 ? 4 : 2;  // 16 bytes of gradient
  const int64_t begin = block * p.part.run;
  const int64_t end = begin + p.part.run < p.total ? begin + p.part.run : p.total;
  const auto* a = static_cast<const T*>(p.a);
  const auto* b = static_cast<const T*>(p.b);
  auto* grad_a = static_cast<S*>(p.grad_a);
  auto* grad_b = static_cast<S*>(p.grad_b);
  Sums<S> sums;
  for (int64_t i = begin + threadIdx.x * N; i < end; i += loss_threads * N) {
    const bool whole = p.packs && i + N <= end;
    Pack<T, N> va{}, vb{};
    if (whole) {
      va = load_pack<N>(a + i);
      vb = load_pack<N>(b + i);
    } else {
      FASTDA_UNROLL
      for (int e = 0; e < N; ++e)
        if (i + e < end) va.at[e] = a[i + e], vb.at[e] = b[i + e];
    }
    Pack<S, N> up, down;
    FASTDA_UNROLL
    for (int e = 0; e < N; ++e) {
      const S d = S(widen(va.at[e])) - S(widen(vb.at[e]));
      sums.loss += abs_of(d);
      up.at[e] = d > 0 ? factor : d < 0 ? -factor : S(0);  // PyTorch's at NaN, too
      down.at[e] = -up.at[e];
    }
    if (whole) {
      if (grad_a) store_pack(grad_a + i, up);
      if (grad_b) store_pack(grad_b + i, down);
    } else {
      FASTDA_UNROLL
      for (int e = 0; e < N; ++e) {
        if (grad_a && i + e < end) grad_a[i + e] = up.at[e];
        if (grad_b && i + e < end) grad_b[i + e] = down.at[e];
      }
    }
  }
  return sums;
}

template <typename T>
FASTDA_KERNEL(loss_threads)
loss_kernel(Losses p, Divisor patches0, Divisor patches1) {
  using S = typename Wide<T>::type;
  FASTDA_SHARED(double, scratch, loss_threads / 32);
  int block = int(blockIdx.x);
  const bool first = block < p.side[0].part.blocks;
  if (!first) block -= p.side[0].part.blocks;
  const bool is_side = first || block < p.side[1].part.blocks;
  if (!is_side) block -= p.side[1].part.blocks;
  const Part& part = !is_side ? p.l1.part : first ? p.side[0].part : p.side[1].part;
  const auto factor = S(factors_of<loss_threads>(part, scratch).loss);
  Sums<S> sums;
  if (is_side) {
    sums = side_block<T>(first ? p.side[0] : p.side[1], block, first ? patches0 : patches1, factor);
  } else {
    sums = l1_block<T>(p.l1, block, factor);
  }
  const double loss = block_sum<loss_threads>(double(sums.loss), scratch);
  const double right = block_sum<loss_threads>(double(sums.right), scratch);
  if (threadIdx.x == 0) {
    p.losses[part.first + block] = loss;
    p.rights[part.first + block] = right;
  }
}

template <typename S>
FASTDA_KERNEL(loss_threads)
weight_sum_kernel(Side side0, Side side1, double* sums0, double* sums1, int blocks0, int blocks1) {
  FASTDA_SHARED(double, scratch, loss_threads / 32);
  const bool first = int(blockIdx.x) < blocks0;
  const Side& p = first ? side0 : side1;
  const int block = int(blockIdx.x) - (first ? 0 : blocks0), blocks = first ? blocks0 : blocks1;
  const auto* weight = static_cast<const S*>(p.weight);
  double sum = 0;
  for (int64_t i = int64_t(block) * loss_threads + threadIdx.x; i < p.total;
       i += int64_t(blocks) * loss_threads) {
    const int64_t image = i / p.patches;
    sum += weight[image * p.weight_image + (i - image * p.patches) * p.weight_patch];
  }
  sum = block_sum<loss_threads>(sum, scratch);
  if (threadIdx.x == 0) (first ? sums0 : sums1)[block] = sum;
}

struct Finish {
  Part parts[loss_parts];
  const double* losses;
  const double* rights;
  void* loss;
  DType loss_dtype;
};

// One block adds what all blocks found, in order.
FASTDA_KERNEL(loss_threads) finish_kernel(Finish p) {
  FASTDA_SHARED(double, scratch, loss_threads / 32);
  double total = 0;
  FASTDA_UNROLL
  for (int i = 0; i < loss_parts; ++i) {
    const Part& part = p.parts[i];
    if (part.blocks == 0 && part.factor == 0) continue;
    const Factors factors = factors_of<loss_threads>(part, scratch);
    double loss = 0, right = 0;
    for (int b = int(threadIdx.x); b < part.blocks; b += loss_threads) {
      loss += p.losses[part.first + b];
      right += p.rights[part.first + b];
    }
    loss = block_sum<loss_threads>(loss, scratch);
    right = block_sum<loss_threads>(right, scratch);
    total += loss * factors.loss;
    if (threadIdx.x == 0 && part.accuracy) *part.accuracy = float(right * factors.accuracy);
  }
  if (threadIdx.x != 0) return;
  if (p.loss_dtype == DType::f64) {
    *static_cast<double*>(p.loss) = total;
  } else {
    *static_cast<float*>(p.loss) = float(total);
  }
}

// -- the last 1×1 convolution and the loss
//
// A warp owns groups · 32 patches and goes over their features twice, the second time out of the
// cache:
//
//   scores: lane = patch;  z = bias + Σ_c x[patch, c] · w[c]
//   slopes: in registers
//   contiguous     lane = patch:    for every c: store slope · w[c], add slope · x over the warp
//   channels_last  lane = channel:  for every patch: store slope · w[c], add slope · x in the lane
//
// With two classes only the difference of their filters counts, so that the convolution has one
// channel.

constexpr int head_threads = 128;
constexpr int head_most_groups = 4;

template <typename T>
FASTDA_DEVICE typename Wide<T>::type head_weight(const Head& p, bool pair, int c) {
  using S = typename Wide<T>::type;
  const auto* w = static_cast<const T*>(p.weight);
  return pair ? S(widen(w[p.channels + c])) - S(widen(w[c])) : S(widen(w[c]));
}

template <typename T>
FASTDA_KERNEL(head_threads, 8)
head_kernel(Head p, double* losses, double* rights, Divisor patches0, Divisor patches1,
            bool packs) {
  using S = typename Wide<T>::type;
  constexpr int G = head_most_groups, N = 16 / int(sizeof(T));
  FASTDA_SHARED(double, scratch, head_threads / 32);
  const bool first = int(blockIdx.x) < p.side[0].part.blocks;
  const HeadSide& side = first ? p.side[0] : p.side[1];
  const Divisor patches = first ? patches0 : patches1;
  const int block = int(blockIdx.x) - (first ? 0 : p.side[0].part.blocks);
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const bool pair = side.term.pair;
  const auto* x = static_cast<const T*>(side.x);
  auto* grad = static_cast<S*>(side.grad);

  const int64_t begin = (int64_t(block) * (head_threads / 32) + warp) * (p.groups * 32);
  const int64_t first_image = begin / side.patches;
  const auto first_patch = uint32_t(begin - first_image * side.patches);
  int64_t at[G];  // where each of the lane's patches begins
  bool inside[G];
  S z[G], slope[G];
  const auto* bias = static_cast<const T*>(p.bias);
  S offset = 0;
  if (bias) offset = pair ? S(widen(bias[1])) - S(widen(bias[0])) : S(widen(bias[0]));
  FASTDA_UNROLL
  for (int g = 0; g < G; ++g) {
    inside[g] = g < p.groups && begin + g * 32 + lane < side.total;
    const uint32_t q = first_patch + uint32_t(g * 32 + lane), ahead = patches.quotient(q);
    at[g] = inside[g] ? (first_image + ahead) * side.image +
                            int64_t(q - ahead * patches.value) * side.patch
                      : 0;
    z[g] = offset;
  }
  if (packs) {
    for (int c = 0; c < p.channels; c += N) {
      S w[N];
      FASTDA_UNROLL
      for (int e = 0; e < N; ++e) w[e] = head_weight<T>(p, pair, c + e);
      FASTDA_UNROLL
      for (int g = 0; g < G; ++g) {
        if (!inside[g]) continue;
        const Pack<T, N> v = load_pack<N>(x + at[g] + c);
        FASTDA_UNROLL
        for (int e = 0; e < N; ++e) z[g] += S(widen(v.at[e])) * w[e];
      }
    }
  } else {
    for (int c = 0; c < p.channels; ++c) {
      const S w = head_weight<T>(p, pair, c);
      FASTDA_UNROLL
      for (int g = 0; g < G; ++g)
        if (inside[g]) z[g] += S(widen(x[at[g] + c * side.channel])) * w;
    }
  }
  Sums<S> sums;
  S slopes = 0;
  FASTDA_UNROLL
  for (int g = 0; g < G; ++g) {
    if (pair) z[g] += z[g] - z[g];  // infinite where both classes are: their loss is NaN
    const Scored<S> s = score(side.term, z[g]);
    slope[g] = inside[g] ? s.slope * S(side.part.factor) : S(0);
    slopes += slope[g];
    if (inside[g]) sums.loss += s.term;
    if (inside[g] && is_right<S>(side.term, z[g])) sums.right += 1;
  }
  const double loss = block_sum<head_threads>(double(sums.loss), scratch);
  const double right = block_sum<head_threads>(double(sums.right), scratch);
  if (threadIdx.x == 0) {
    losses[side.part.first + block] = loss;
    rights[side.part.first + block] = right;
  }
  if (grad == nullptr && p.sums == nullptr) return;
  slopes = warp_sum(slopes);
  const int64_t row = int64_t(blockIdx.x) * (head_threads / 32) + warp;
  S* out = p.sums ? static_cast<S*>(p.sums) + row * (p.channels + 1) : nullptr;
  if (side.channel == 1 && p.channels > 1) {
    for (int c0 = 0; c0 < p.channels; c0 += 32) {
      const int c = c0 + lane;
      const bool known = c < p.channels;
      const S w = known ? head_weight<T>(p, pair, c) : S(0);
      S sum = 0;
      FASTDA_UNROLL
      for (int g = 0; g < G; ++g) {
        if (g >= p.groups) break;
        for (int l = 0; l < 32; ++l) {
          const S s = __shfl_sync(0xffffffffu, slope[g], l);
          const int64_t where = __shfl_sync(0xffffffffu, at[g], l);
          if (!known || begin + g * 32 + l >= side.total) continue;
          if (grad) grad[where + c] = s * w;
          if (out) sum += s * S(widen(x[where + c]));
        }
      }
      if (out && known) out[c] = sum;
    }
  } else {
    for (int c = 0; c < p.channels; ++c) {
      const S w = head_weight<T>(p, pair, c);
      S sum = 0;
      FASTDA_UNROLL
      for (int g = 0; g < G; ++g) {
        if (!inside[g]) continue;
        if (grad) grad[at[g] + c * side.channel] = slope[g] * w;
        if (out) sum += slope[g] * S(widen(x[at[g] + c * side.channel]));
      }
      if (out) {
        sum = warp_sum(sum);
        if (lane == 0) out[c] = sum;
      }
    }
  }
  if (out && lane == 0) out[p.channels] = slopes;
}

// Block b adds the rows of columns [32 b, 32 b + 32): warps take rows in turn, then the warps' sums
// in order.
template <typename S>
FASTDA_KERNEL(loss_threads)
head_weight_kernel(const S* sums, int rows, int channels, bool pair, S* grad_weight, S* grad_bias) {
  constexpr int warps = loss_threads / 32;
  FASTDA_SHARED(double, parts, warps * 32);
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32),
            c = int(blockIdx.x) * 32 + lane;
  double sum = 0;
  if (c <= channels)
    for (int r = warp; r < rows; r += warps) sum += double(sums[int64_t(r) * (channels + 1) + c]);
  parts[warp * 32 + lane] = sum;
  __syncthreads();
  if (warp > 0 || c > channels) return;
  FASTDA_UNROLL
  for (int w = 1; w < warps; ++w) sum += parts[w * 32 + lane];
  if (c < channels) {
    grad_weight[c] = S(pair ? -sum : sum);
    if (pair) grad_weight[channels + c] = S(sum);
  } else if (grad_bias) {
    grad_bias[0] = S(pair ? -sum : sum);
    if (pair) grad_bias[1] = S(sum);
  }
}

struct ScaleBoth {
  void* x[2];
  DType dtype[2];
  int64_t total[2];
  int64_t blocks[2];
  bool packs[2];
  const void* factor;
  DType factor_dtype;
};

template <typename S>
FASTDA_DEVICE void scale_block(S* x, int64_t total, int64_t block, bool packs, S factor) {
  constexpr int N = 16 / int(sizeof(S));
  const int64_t begin = (block * loss_threads + threadIdx.x) * N;
  if (packs && begin + N <= total) {
    Pack<S, N> v = load_pack<N>(x + begin);
    FASTDA_UNROLL
    for (int e = 0; e < N; ++e) v.at[e] *= factor;
    store_pack(x + begin, v);
  } else {
    for (int64_t i = begin; i < begin + N && i < total; ++i) x[i] *= factor;
  }
}

FASTDA_KERNEL(loss_threads) scale_kernel(ScaleBoth p) {
  const double factor = load_scalar(p.factor, p.factor_dtype, 0);
  if (factor == 1) return;
  const bool second = int64_t(blockIdx.x) >= p.blocks[0];
  const int64_t block = int64_t(blockIdx.x) - (second ? p.blocks[0] : 0);
  void* x = second ? p.x[1] : p.x[0];
  const int64_t total = second ? p.total[1] : p.total[0];
  const bool packs = second ? p.packs[1] : p.packs[0];
  if ((second ? p.dtype[1] : p.dtype[0]) == DType::f64) {
    scale_block(static_cast<double*>(x), total, block, packs, factor);
  } else {
    scale_block(static_cast<float*>(x), total, block, packs, float(factor));
  }
}

}  // namespace fastda::cuda
