// What the kernels that work on packed blocks share: cutting images into blocks, packing, the
// micro-kernel and the epilogue. Internal linkage throughout: see common/dtype.h.
#pragma once

#include "cpu/kernels/refiner_conv.h"
#include "cpu/simd/generic.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Accumulators: panel_vectors<> vectors of out channels wide; micro_rows(KV) pixels high.
constexpr int panel_vectors = vector_registers == 32 ? 4 : 2;
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
    case 3: return micro_kernel < S, micro_rows(3), panel_vectors == 4 ? 3 : 2 > ;
    default: return micro_kernel < S, micro_rows(4), panel_vectors == 4 ? 4 : 2 > ;
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
// halves the rounding error of sums of 256.
template <typename S>
void multiply(const S* x, int64_t row_stride, int64_t pixels, const int64_t* offset, int64_t taps,
              int64_t depth, const S* filter, int64_t padded_k, S* out) {
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
      for (int64_t q = 0; q < pixels; q += rows)
        kernel(x + q * row_stride, row, rows, offset + t, n, depth, 1, b + t * depth * width, width,
               out + q * padded_k + k0, padded_k, t > 0);
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
          if (r < valid && ++c == channels) c = 0, ++t;
        }
        kernel(x + q * x_stride, row, valid, &zero, 1, depth, x_stride, grad + q * padded_k + k0,
               padded_k, sums + i * padded_k + k0, padded_k, true);
      }
    }
    k0 += width;
  }
}

// A rectangle of one image.
struct Block {
  int64_t n, h, w, rows, columns;
};

template <typename T>
const T* at(const View& v, int64_t n, int64_t c, int64_t h, int64_t w) {
  return static_cast<const T*>(v.data) + n * v.n + c * v.c + h * v.h + w * v.w;
}

// out[(r * columns + q)][0, stride) = gate(g, x)[block.n, :, block.h + r, block.w + q], zero
// outside the image and in channels past the last.
template <typename T, typename S>
void pack(const View& x, const View& gate, bool channels_last, int64_t channels, int64_t height,
          int64_t width, const Block& block, S* out, int64_t stride) {
  constexpr int L = lanes<S>;
  const int64_t begin = min(block.columns, max(0, -block.w)),
                end = max(begin, min(block.columns, width - block.w));
  for (int64_t r = 0; r < block.rows; ++r, out += block.columns * stride) {
    const int64_t h = block.h + r;
    if (h < 0 || h >= height) {
      for (int64_t i = 0; i < block.columns * stride; ++i) out[i] = S(0);
      continue;
    }
    for (int64_t i = 0; i < begin * stride; ++i) out[i] = S(0);
    for (int64_t i = end * stride; i < block.columns * stride; ++i) out[i] = S(0);
    if (channels_last) {
      for (int64_t q = begin; q < end; ++q) {
        const T* from = at<T>(x, block.n, 0, h, block.w + q);
        const T* g = gate.data ? at<T>(gate, block.n, 0, h, block.w + q) : nullptr;
        S* to = out + q * stride;
        for (int64_t c = 0; c < stride; c += L) {
          const int valid = int(min(L, channels - c));
          Vec<S> v = valid > 0 ? load_first<S>(from + c, valid) : Vec<S>{};
          if (g && valid > 0) v = relu_mask(v, load_first<S>(g + c, valid));
          if (stride - c >= L) {
            store_vec(to + c, v);
          } else {
            store_first<S>(to + c, v, int(stride - c));
          }
        }
      }
      continue;
    }
    for (int64_t c0 = 0; c0 < stride; c0 += L) {
      const int into = int(min(L, stride - c0)), from_channels = int(min(L, channels - c0));
      for (int64_t q = begin; q < end; q += L) {
        const int valid = int(min(L, end - q));
        if (into == 1) {  // one channel: nothing to turn
          Vec<S> v = load_first<S>(at<T>(x, block.n, c0, h, block.w + q), valid);
          if (gate.data)
            v = relu_mask(v, load_first<S>(at<T>(gate, block.n, c0, h, block.w + q), valid));
          for (int i = 0; i < valid; ++i) out[(q + i) * stride + c0] = v[i];
          continue;
        }
        Vec<S> tile[L];
        for (int c = 0; c < L; ++c) {
          tile[c] = Vec<S>{};
          if (c >= from_channels) continue;
          tile[c] = load_first<S>(at<T>(x, block.n, c0 + c, h, block.w + q), valid);
          if (gate.data)
            tile[c] = relu_mask(tile[c],
                                load_first<S>(at<T>(gate, block.n, c0 + c, h, block.w + q), valid));
        }
        transpose<S>(tile);
        for (int i = 0; i < valid; ++i) {
          if (into == L) {
            store_vec(out + (q + i) * stride + c0, tile[i]);
          } else {
            store_first<S>(out + (q + i) * stride + c0, tile[i], into);
          }
        }
      }
    }
  }
}

// One vector of results, from its sum to memory; where = element offsets of the vector in every
// view are given by (n, c, h, w).
template <typename T, typename S>
inline void finish(const ConvArgs& a, Vec<S> v, int valid, int64_t n, int64_t c, int64_t h,
                   int64_t w) {
  if (a.residual.data) {
    Vec<S> add = load_first<S>(at<T>(a.residual, n, c, h, w), valid);
    if (a.residual_gate.data)
      add = relu_mask(add, load_first<S>(at<T>(a.residual_gate, n, c, h, w), valid));
    v += add;
  }
  if (a.relu) v = clamp_min(v, Vec<S>{});
  if (a.out_gate.data) v = relu_mask(v, load_first<S>(at<T>(a.out_gate, n, c, h, w), valid));
  store_first<S>(const_cast<T*>(at<T>(a.out, n, c, h, w)), v, valid);
}

// sums[r * columns + q][0, stride) to the output block at (block.h + r, block.w + q).
template <typename T, typename S>
void epilogue(const ConvArgs& a, const S* sums, int64_t columns, int64_t stride,
              const Block& block) {
  constexpr int L = lanes<S>;
  const T* bias = static_cast<const T*>(a.bias);
  for (int64_t r = 0; r < block.rows; ++r, sums += columns * stride) {
    const int64_t h = block.h + r;
    if (a.out_channels_last) {
      for (int64_t q = 0; q < block.columns; ++q) {
        for (int64_t k = 0; k < a.out_channels; k += L) {
          const int valid = int(min(L, a.out_channels - k));
          Vec<S> v = load_vec(sums + q * stride + k);
          if (bias) v += load_first<S>(bias + k, valid);
          finish<T, S>(a, v, valid, block.n, k, h, block.w + q);
        }
      }
      continue;
    }
    for (int64_t k0 = 0; k0 < a.out_channels; k0 += L) {
      const int64_t channels = min(L, a.out_channels - k0);
      for (int64_t q = 0; q < block.columns; q += L) {
        const int valid = int(min(L, block.columns - q));
        Vec<S> tile[L];
        for (int i = 0; i < L; ++i)
          tile[i] = i < valid ? load_vec(sums + (q + i) * stride + k0) : Vec<S>{};
        transpose<S>(tile);
        for (int64_t k = 0; k < channels; ++k) {
          Vec<S> v = tile[k];
          if (bias) v += broadcast(S(load(bias + k0 + k)));
          finish<T, S>(a, v, valid, block.n, k0 + k, h, block.w + q);
        }
      }
    }
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

// How an image is cut into blocks: whole rows if they are not too long, as many as fit `bytes` with
// their sums.
struct Cut {
  int64_t rows, columns, per_column, per_row, tasks;
  Block block(int64_t task, int64_t height, int64_t width) const {
    const int64_t n = task / (per_column * per_row), rest = task % (per_column * per_row);
    const int64_t h = rest / per_row * rows, w = rest % per_row * columns;
    return {n, h, w, min(rows, height - h), min(columns, width - w)};
  }
};
inline Cut cut(int64_t batch, int64_t height, int64_t width, int64_t bytes_per_pixel,
               int64_t budget) {
  const int64_t pixels = max(1, budget / bytes_per_pixel);
  const int64_t columns = ceil_div(width, ceil_div(width, max(16, min(pixels, 256))));
  const int64_t rows = ceil_div(height, ceil_div(height, max(1, min(height, pixels / columns))));
  const int64_t per_column = ceil_div(height, rows), per_row = ceil_div(width, columns);
  return {rows, columns, per_column, per_row, batch * per_column * per_row};
}

template <typename S>
S* carve(char*& scratch, int64_t count) {
  S* p = reinterpret_cast<S*>(scratch);
  scratch += round_up(count * int64_t(sizeof(S)), 64);
  return p;
}
template <typename S>
constexpr int64_t carved(int64_t count) {
  return round_up(count * int64_t(sizeof(S)), 64);
}

template <typename S>
int64_t padded(int64_t channels) {
  return round_up(channels, lanes<S>);
}

// Calls f.operator()<T, S>() with the element and the accumulator type.
template <typename F>
decltype(auto) with_types(DType dtype, F&& f) {
  return dispatch(dtype, [&]<typename T>() -> decltype(auto) {
    return f.template operator()<T, typename Acc<T>::type>();
  });
}

}  // namespace
}  // namespace fastda::cpu::FASTDA_ISA
