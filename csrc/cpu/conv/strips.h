// Sums over rows of pixels, for filters from few channels: what a row of taps reads for a pixel lies
// side by side, so that a micro-kernel of the filter's gradient has one address for all its rows.
// Internal linkage throughout: see common/dtype.h.
#pragma once

#include "cpu/conv/gemm.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

// Rows of pixels: `row` elements from row to row, `pixel` from pixel to pixel.
template <typename S>
struct Strips {
  const S* at;
  int64_t row, pixel;
};

// sums[r][0, KV) += sum over rows and pixels of x[r] * grad[0, KV), r < R.
template <typename S, int R, int KV>
void accumulate_strips(Strips<S> x, Strips<S> grad, int64_t rows, int64_t pixels, S* sums,
                       int64_t stride) {
  constexpr int L = lanes<S>;
  Vec<S> sum[R][KV] = {};
  for (; rows > 0; --rows, x.at += x.row, grad.at += grad.row) {
    const S *p = x.at, *g = grad.at;
    for (int64_t q = 0; q < pixels; ++q, p += x.pixel, g += grad.pixel) {
      Vec<S> b[KV];
#pragma GCC unroll 4
      for (int v = 0; v < KV; ++v) b[v] = load_vec(g + v * L);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        Vec<S> a = broadcast(p[r]);
        in_register(a);
#pragma GCC unroll 4
        for (int v = 0; v < KV; ++v) sum[r][v] += a * b[v];
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < KV; ++v) {
      S* to = sums + r * stride + v * L;
      store_vec(to, load_vec(to) + sum[r][v]);
    }
}
template <typename S>
using StripKernel = void (*)(Strips<S>, Strips<S>, int64_t, int64_t, S*, int64_t);
template <typename S, int KV>
StripKernel<S> strip_kernel(int64_t r) {
  constexpr StripKernel<S> kernels[] = {accumulate_strips<S, 1, KV>, accumulate_strips<S, 2, KV>,
                                        accumulate_strips<S, 3, KV>, accumulate_strips<S, 4, KV>,
                                        accumulate_strips<S, 5, KV>, accumulate_strips<S, 6, KV>};
  return kernels[r - 1];
}
template <typename S>
StripKernel<S> strip_kernel_for(int64_t r, int kv) {
  switch (kv) {
    case 1: return strip_kernel<S, 1>(r);
    case 2: return strip_kernel<S, 2>(r);
    case 3: return strip_kernel<S, min(3, panel_vectors)>(r);
    default: return strip_kernel<S, panel_vectors>(r);
  }
}

// sums[t][i][k] += sum over rows and pixels of x[t * x.row + i] * grad[k] for t < tap_rows and i <
// `across`: what a row of taps reads for a pixel lies side by side.
template <typename S>
void multiply_strips(const Strips<S>& x, const Strips<S>& grad, int64_t rows, int64_t pixels,
                     int64_t tap_rows, int64_t across, int64_t padded_k, S* sums) {
  const int64_t parts = ceil_div(across, 6);
  for (int64_t k0 = 0; k0 < padded_k;) {
    const int kv = panel_width<S>(k0, padded_k);
    const int64_t width = kv * lanes<S>;
    // Of the gradient, in the first-level cache.
    const int64_t stretch = max(32, int64_t(16 << 10) / int64_t(width * sizeof(S)));
    const int64_t columns = min(pixels, stretch), high = max(1, stretch / columns);
    for (int64_t r = 0; r < rows; r += high)
      for (int64_t q = 0; q < pixels; q += columns)
        for (int64_t t = 0; t < tap_rows; ++t)
          for (int64_t part = 0; part < parts; ++part) {
            const int64_t i = across * part / parts, next = across * (part + 1) / parts;
            strip_kernel_for<S>(next - i, kv)(
                {x.at + (r + t) * x.row + q * x.pixel + i, x.row, x.pixel},
                {grad.at + r * grad.row + q * grad.pixel + k0, grad.row, grad.pixel},
                min(high, rows - r), min(columns, pixels - q),
                sums + (t * across + i) * padded_k + k0, padded_k);
          }
    k0 += width;
  }
}

}  // namespace
}  // namespace fastda::cpu::FASTDA_ISA
