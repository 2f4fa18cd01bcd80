// The matrix products: a micro-kernel for packed blocks, of any accumulator type; two for tiles, in
// float, which prefetch; and what hands them their panels. Internal linkage throughout: see
// common/dtype.h.
#pragma once

#include "cpu/conv/layout.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

// Accumulators: at most panel_vectors vectors of output channels wide, micro_rows(KV) pixels high:
// 24 of 32 registers, or 12 of 16 (8 for a single vector).
constexpr int micro_rows(int kv) {
  return vector_registers == 32 ? (kv == 4 ? 6 : kv == 3 ? 8 : 12) : (kv == 2 ? 6 : 8);
}
constexpr int max_rows = 12;

// c[r][0, KV) (+)= sum over t < taps, d < depth of a[row[r] + offset[t] + d * step] * b[t * depth +
// d][0, KV), for r < valid.
template <typename S, int R, int KV>
void micro_kernel(const S* a, const int64_t* row, int valid, const int64_t* offset, int64_t taps,
                  int64_t depth, int64_t step, const S* b, int64_t b_stride, S* c, int64_t c_stride,
                  bool accumulate) {
  constexpr int L = lanes<S>;
  const S* p[R];
  Vec<S> sum[R][KV];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    p[r] = a + row[r];
#pragma GCC unroll 4
    for (int v = 0; v < KV; ++v) sum[r][v] = Vec<S>{};
  }
  for (int64_t t = 0; t < taps; ++t) {
    int64_t i = offset[t];
    for (int64_t d = 0; d < depth; ++d) {
      Vec<S> w[KV];
#pragma GCC unroll 4
      for (int v = 0; v < KV; ++v) w[v] = load_vec(b + v * L);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        Vec<S> x = broadcast(p[r][i]);
        in_register(x);
#pragma GCC unroll 4
        for (int v = 0; v < KV; ++v) sum[r][v] += x * w[v];
      }
      b += b_stride;
      i += step;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (r >= valid) break;
    S* out = c + r * c_stride;
#pragma GCC unroll 4
    for (int v = 0; v < KV; ++v)
      store_vec(out + v * L, accumulate ? load_vec(out + v * L) + sum[r][v] : sum[r][v]);
  }
}

template <typename S>
using MicroKernel = void (*)(const S*, const int64_t*, int, const int64_t*, int64_t, int64_t,
                             int64_t, const S*, int64_t, S*, int64_t, bool);
template <typename S>
MicroKernel<S> micro_kernel_for(int kv) {
  switch (kv) {
    case 1: return micro_kernel<S, micro_rows(1), 1>;
    case 2: return micro_kernel<S, micro_rows(2), 2>;
    case 3: return micro_kernel<S, micro_rows(3), min(3, panel_vectors)>;
    default: return micro_kernel<S, micro_rows(4), panel_vectors>;
  }
}

// Out channels as panels of at most panel_vectors vectors; k0 = first channel of a panel, kv = its
// vectors.
template <typename S>
inline int panel_width(int64_t k0, int64_t channels) {
  return int(min(panel_vectors, (channels - k0) / lanes<S>));
}

// out[q][k] = sum over t, c of x[q * row_stride + offset[t] + c] * filter[panel][t][c][k in panel]
// for q < round_up(pixels, max_rows). The taps are taken in groups whose filters stay in the
// first-level cache, and whose sums are no longer than 64 products where one tap allows it: that
// halves the rounding error of sums of 256. `longest`: of one tap's sum, for a single tap alone.
template <typename S>
void multiply(const S* x, int64_t row_stride, int64_t pixels, const int64_t* offset, int64_t taps,
              int64_t depth, const S* filter, int64_t padded_k, S* out, int64_t longest = 0) {
  int64_t row[max_rows];
  for (int r = 0; r < max_rows; ++r) row[r] = r * row_stride;
  for (int64_t k0 = 0; k0 < padded_k;) {
    const int kv = panel_width<S>(k0, padded_k), rows = micro_rows(kv);
    const int64_t width = kv * lanes<S>;
    const MicroKernel<S> kernel = micro_kernel_for<S>(kv);
    const S* b = filter + k0 * taps * depth;
    const int64_t group =
        max(1, min(64, int64_t(24 << 10) / int64_t(width * sizeof(S))) / max(1, depth));
    for (int64_t t = 0; t < taps; t += group) {
      const int64_t n = min(group, taps - t);
      const int64_t part = longest > 0 ? ceil_div(depth, ceil_div(depth, longest)) : depth;
      int64_t d = 0;
      do {  // once where there are no channels: the sums are zeros
        for (int64_t q = 0; q < pixels; q += rows)
          kernel(x + q * row_stride + d, row, rows, offset + t, n, min(part, depth - d), 1,
                 b + (t * depth + d) * width, width, out + q * padded_k + k0, padded_k, t + d > 0);
        d += part;
      } while (d < depth);
    }
    k0 += width;
  }
}

// sums[t][c][k] += sum over q < pixels of x[q * x_stride + offset[t] + c] * grad[q][k].
template <typename S>
void multiply_transposed(const S* x, int64_t x_stride, int64_t pixels, const int64_t* offset,
                         int64_t taps, int64_t channels, const S* grad, int64_t padded_k, S* sums) {
  const int64_t zero = 0, pairs = taps * channels;
  for (int64_t k0 = 0; k0 < padded_k;) {
    const int kv = panel_width<S>(k0, padded_k), rows = micro_rows(kv);
    const int64_t width = kv * lanes<S>;
    const MicroKernel<S> kernel = micro_kernel_for<S>(kv);
    const int64_t stretch = max(32, int64_t(16 << 10) / int64_t(width * sizeof(S)));
    for (int64_t q = 0; q < pixels; q += stretch) {
      const int64_t depth = min(stretch, pixels - q);
      int64_t t = 0, c = 0;
      for (int64_t i = 0; i < pairs; i += rows) {
        const int valid = int(min(rows, pairs - i));
        int64_t row[max_rows];
        for (int r = 0; r < rows; ++r) {
          row[r] = r < valid ? offset[t] + c : row[0];
          if (r < valid && ++c == channels) {
            c = 0;
            ++t;
          }
        }
        kernel(x + q * x_stride, row, valid, &zero, 1, depth, x_stride, grad + q * padded_k + k0,
               padded_k, sums + i * padded_k + k0, padded_k, true);
      }
    }
    k0 += width;
  }
}

// bias[k] += sum over q of grad[q][k], in double.
template <typename S>
void add_rows(const S* grad, int64_t pixels, int64_t padded_k, double* bias) {
  constexpr int L = lanes<S>;
  for (int64_t k = 0; k < padded_k; k += L) {
    for (int64_t q0 = 0; q0 < pixels; q0 += 256) {
      Vec<S> sum = {};
      for (int64_t q = q0; q < min(pixels, q0 + 256); ++q) sum += load_vec(grad + q * padded_k + k);
      for (int i = 0; i < L; ++i) bias[k + i] += double(sum[i]);
    }
  }
}

#if FASTDA_SIMD

// Cache lines that will be wanted later. Products fetch them one by one: many at once would hold up
// what the products themselves wait for.
struct Lines {
  const char* const* at = nullptr;
  int64_t count = 0;
};

// m[6][N vectors] = v[6][C] u[C][N vectors], `Add`ed to what m is. Meanwhile the six rows at `next`
// are fetched, of what is at `ahead`, `pace` floats for every input channel, and `far`.
template <int N, bool Add>
[[gnu::noinline]] void multiply_tiles(const float* v, int64_t v_stride, const float* u, int64_t C,
                                      float* m, int64_t m_stride, const float* next,
                                      const float* ahead, int64_t pace, Lines far) {
  F32 acc[group_tiles][N];
#pragma GCC unroll 6
  for (int r = 0; r < group_tiles; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[r][n] = broadcast(0.0f);
  const float* w = v + 3 * v_stride;
  const auto step = [&]() __attribute__((always_inline)) {
    F32 b[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) b[n] = load_vec(u + n * VL);
#pragma GCC unroll 6
    for (int r = 0; r < group_tiles; ++r) {
      F32 a = broadcast(r < 3 ? v[r * v_stride] : w[(r - 3) * v_stride]);
      in_register(a);  // one broadcast for N products, not N products that each load it
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = fma(a, b[n], acc[r][n]);
    }
    ++v, ++w;
    u += N * VL;
  };
  int64_t c = 0;
  for (; c + 2 <= C; c += 2) {
    prefetch_first_level(next);
    next += 2 * group_tiles;
    prefetch_first_level(ahead);
    ahead += 2 * pace;
    if (c < far.count) {  // an even number
      prefetch_second_level(far.at[c]);
      prefetch_second_level(far.at[c + 1]);
    }
    step();
    step();
  }
  if (c < C) step();
#pragma GCC unroll 6
  for (int r = 0; r < group_tiles; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      float* to = m + r * m_stride + n * VL;
      store_vec(to, Add ? load_vec(to) + acc[r][n] : acc[r][n]);
    }
}

// Calls f(integral constant N, first vector) for each panel of at most panel_vectors vectors.
template <int N>
struct Width {
  static constexpr int value = N;
};
template <typename F>
FASTDA_INLINE void each_panel(int64_t vectors, F&& f) {
  int64_t v = 0;
  for (; v + panel_vectors <= vectors; v += panel_vectors) f(Width<panel_vectors>{}, v);
  switch (vectors - v) {
    case 1: f(Width<1>{}, v); break;
    case 2: f(Width<(panel_vectors > 2 ? 2 : 1)>{}, v); break;
    case 3: f(Width<(panel_vectors > 3 ? 3 : 1)>{}, v); break;
    default: break;
  }
}

// u[R][N vectors] += sum over groups and tiles of v[tile][R] z[tile][N vectors]. On the way, the
// accumulators of the next R rows are fetched, this call's share of the next point's v and z
// (`line` of z's N lines), and `far`.
template <int R, int N>
[[gnu::noinline]] void accumulate(const float* v, const Workspace& vs, const float* z,
                                  const Workspace& zs, int64_t groups, int64_t line, float* u,
                                  bool first, Lines far) {
  F32 acc[R][N];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      acc[r][n] = first ? broadcast(0.0f) : load_vec(u + (r * N + n) * VL);
  const char* next = reinterpret_cast<const char*>(u + R * N * VL);
  const int64_t v_stride = vs.channels, z_stride = zs.channels;
  for (int64_t g = 0; g < groups; ++g) {
    const float *vq = v + g * vs.group, *zq = z + g * zs.group;
    for (int q = 0; q < group_tiles; ++q) {
      F32 b[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) b[n] = load_vec(zq + n * VL);
      prefetch_first_level(next);
      if (int64_t i = g * group_tiles + q; i < far.count) prefetch_second_level(far.at[i]);
      if constexpr (VL == 16) {  // with AVX2 the loads leave no room for these
        prefetch_first_level(vq + vs.slot);
        prefetch_first_level(zq + zs.slot + line * 16);
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        F32 a = broadcast(vq[r]);
        in_register(a);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[r][n] = fma(a, b[n], acc[r][n]);
      }
      vq += v_stride;
      zq += z_stride;
      next += 64;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store_vec(u + (r * N + n) * VL, acc[r][n]);
}

// The same for all C rows of v; far() has the lines to fetch with each six.
template <int N, typename F>
void accumulate_panel(const float* v, const Workspace& vs, const float* z, const Workspace& zs,
                      int64_t groups, int64_t C, float* u, bool first, F&& far) {
  const auto rows = [&]<int R>(Width<R>, int64_t c) {
    accumulate<R, N>(v + c, vs, z, zs, groups, c / 6 % N * VL / 16, u + c * N * VL, first, far());
  };
  int64_t c = 0;
  for (; c + 6 <= C; c += 6) rows(Width<6>{}, c);
  switch (C - c) {
    case 1: rows(Width<1>{}, c); break;
    case 2: rows(Width<2>{}, c); break;
    case 3: rows(Width<3>{}, c); break;
    case 4: rows(Width<4>{}, c); break;
    case 5: rows(Width<5>{}, c); break;
    default: break;
  }
}

#endif

}  // namespace
}  // namespace fastda::cpu::FASTDA_ISA
