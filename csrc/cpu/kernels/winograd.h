// What the two Winograd F(4x4, 3x3) kernels share: the transforms, the micro-kernels, and where
// their operands lie. Internal linkage throughout: see common/dtype.h.
//
// Six neighbouring tiles are a group, and vectors run over channels: channels_last is read and
// written as it lies, contiguous tensors are turned in registers, VL x VL at a time, on their way
// in and out. The products keep one 6-tile x (4 or 2 vectors of output channels) accumulator in
// registers.
#pragma once

#include "cpu/kernels/refiner_conv.h"
#include "cpu/simd/generic.h"

namespace fastda::cpu::FASTDA_ISA {
#if FASTDA_SIMD
namespace {

constexpr int VL = lanes<float>;
constexpr int TILES = 6;  // per group: rows of the micro-kernel
// Vectors of output channels in a micro-kernel.
constexpr int NV = vector_registers == 32 ? 4 : 2;
constexpr int RUN = 15;  // tiles transformed together, neighbours in a row
// Input columns of a run, and room for the last vector's rest.
constexpr int COLUMNS = 4 * RUN + 2 + (VL - 2);

// Interpolation at 0, +-A, +-B, infinity; A B = 1 makes most constants 1, and the error is half
// that of 0, +-1, +-2.
constexpr float A = 0.70710678118654752440f, B = 1.41421356237309504880f;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t padded(int64_t channels) { return round_up(channels, VL); }
// Distance of the C x K matrices of two interpolation points: not a power of two, for the lines of
// all 36 would fall into one set of the first-level cache.
int64_t matrix_floats(int64_t C, int64_t K) { return C * padded(K) + 16; }

struct Grid {
  int64_t height, width, rows, cols, tiles, groups;
  Grid(int64_t n, int64_t h, int64_t w)
      : height(h),
        width(w),
        rows(ceil_div(h, 4)),
        cols(ceil_div(w, 4)),
        tiles(n * rows * cols),
        groups(ceil_div(tiles, TILES)) {}
};

// [group][slot][tile][channel], one slot per interpolation point, the channels from `first` on.
// `slot` is an odd number of cache lines, so that the 36 lines of one tile fall into different
// sets.
struct Workspace {
  float* data;
  int64_t channels, slot, group, first = 0;
  Workspace(float* p, int64_t c, int64_t slots)
      : data(p), channels(c), slot(TILES * c + 16), group(slots * slot) {}
  float* at(int64_t tile, int64_t point, int64_t channel) const {
    return data + tile / TILES * group + point * slot + tile % TILES * channels + (channel - first);
  }
};

FASTDA_INLINE void input_1d(const F32* d, F32* v) {
  const F32 e1 = fnma(broadcast(2.0f), d[2], d[4]), o1 = fnma(broadcast(2.0f), d[1], d[3]);
  const F32 e2 = fnma(broadcast(0.5f), d[2], d[4]), o2 = fnma(broadcast(0.5f), d[1], d[3]);
  v[0] = fnma(broadcast(2.5f), d[2], d[0] + d[4]);
  v[1] = fma(broadcast(A), o1, e1);
  v[2] = fnma(broadcast(A), o1, e1);
  v[3] = fma(broadcast(B), o2, e2);
  v[4] = fnma(broadcast(B), o2, e2);
  v[5] = fnma(broadcast(2.5f), d[3], d[1] + d[5]);
}

FASTDA_INLINE void output_1d(const F32* m, F32* y) {
  const F32 s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
  y[0] = m[0] + s1 + s2;
  y[1] = broadcast(A) * fma(broadcast(2.0f), d2, d1);
  y[2] = fma(broadcast(0.5f), s1, broadcast(2.0f) * s2);
  y[3] = fma(broadcast(A), fma(broadcast(0.5f), d1, broadcast(4.0f) * d2), m[5]);
}

// Transpose of output_1d: 4 -> 6.
FASTDA_INLINE void gradient_1d(const F32* g, F32* z) {
  const F32 e1 = fma(broadcast(0.5f), g[2], g[0]), o1 = fma(broadcast(0.5f), g[3], g[1]);
  const F32 e2 = fma(broadcast(2.0f), g[2], g[0]), o2 = fma(broadcast(2.0f), g[3], g[1]);
  z[0] = g[0];
  z[1] = fma(broadcast(A), o1, e1);
  z[2] = fnma(broadcast(A), o1, e1);
  z[3] = fma(broadcast(B), o2, e2);
  z[4] = fnma(broadcast(B), o2, e2);
  z[5] = g[3];
}

// Filter, 3 -> 6.
FASTDA_INLINE void weight_1d(const F32* w, F32* u) {
  const F32 ea = broadcast(-2.0f / 3) * fma(broadcast(0.5f), w[2], w[0]),
            oa = broadcast(-2.0f / 3 * A) * w[1];
  const F32 eb = broadcast(1.0f / 6) * fma(broadcast(2.0f), w[2], w[0]),
            ob = broadcast(1.0f / 6 * B) * w[1];
  u[0] = w[0];
  u[1] = ea + oa;
  u[2] = ea - oa;
  u[3] = eb + ob;
  u[4] = eb - ob;
  u[5] = w[2];
}

// Transpose of weight_1d: 6 -> 3.
FASTDA_INLINE void weight_gradient_1d(const F32* u, F32* w) {
  const F32 sa = broadcast(-2.0f / 3) * (u[1] + u[2]),
            da = broadcast(-2.0f / 3 * A) * (u[1] - u[2]);
  const F32 sb = broadcast(1.0f / 6) * (u[3] + u[4]), db = broadcast(1.0f / 6 * B) * (u[3] - u[4]);
  w[0] = u[0] + sa + sb;
  w[1] = da + db;
  w[2] = u[5] + fma(broadcast(0.5f), sa, broadcast(2.0f) * sb);
}

// --- tiles of the input (6 x 6 pixels, overlapping) or of the output's gradient (4 x 4) into V

struct Source {
  View x, gate;
  bool channels_last;
  int64_t channels;
};

// Loads `R` rows from y0 and `columns` columns from x0 of channels [c, c + VL) and hands each
// column's R vectors to `f`. Outside of the image, and past the last channel, zeros. strip:
// [R][VL][VL] floats.
template <typename T, int R, typename F>
FASTDA_INLINE void each_column(const Source& s, const Grid& grid, int64_t image, int64_t c,
                               int64_t y0, int64_t x0, int64_t columns, float* strip, F&& f) {
  const bool gated = s.gate.data != nullptr;
  const T* x = static_cast<const T*>(s.x.data) + image * s.x.n + c * s.x.c;
  const T* g = static_cast<const T*>(s.gate.data) + (gated ? image * s.gate.n + c * s.gate.c : 0);
  const int64_t sx = s.x.w, sg = s.gate.w;
  const int64_t r0 = y0 < 0 ? -y0 : 0, r1 = min(R, grid.height - y0);
  if (s.channels_last) {
    const int64_t first = max(x0, 0), last = min(x0 + columns, grid.width);
    F32 d[R];
    for (int r = 0; r < R; ++r) d[r] = broadcast(0.0f);
    for (int64_t i = x0; i < first; ++i) f(i - x0, d);
    for (int64_t i = last; i < x0 + columns; ++i) f(i - x0, d);
    if (r0 == 0 && r1 == R && c + VL <= s.channels) {
      if (!gated) {
        for (int64_t i = first; i < last; ++i) {
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r) d[r] = load_vec(x + (y0 + r) * s.x.h + i * sx);
          f(i - x0, d);
        }
      } else {
        for (int64_t i = first; i < last; ++i) {
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r)
            d[r] = relu_mask(load_vec(x + (y0 + r) * s.x.h + i * sx),
                             load_vec(g + (y0 + r) * s.gate.h + i * sg));
          f(i - x0, d);
        }
      }
    } else {
      const Mask m = mask_of(0, s.channels - c);
      for (int64_t i = first; i < last; ++i) {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          d[r] = broadcast(0.0f);
          if (r < r0 || r >= r1) continue;
          d[r] = load_vec(x + (y0 + r) * s.x.h + i * sx, m);
          if (gated) d[r] = relu_mask(d[r], load_vec(g + (y0 + r) * s.gate.h + i * sg, m));
        }
        f(i - x0, d);
      }
    }
    return;
  }
  const int64_t channels = min(VL, s.channels - c);
  for (int64_t i = 0; i < columns; i += VL) {
    const int64_t width = min(VL, columns - i);
    const int64_t first = max(0, -(x0 + i)), last = min(width, grid.width - (x0 + i));
    const Mask m = mask_of(first, last);
    for (int r = 0; r < R; ++r) {
      float* line = strip + r * VL * VL;
      if (r < r0 || r >= r1) {
        for (int k = 0; k < VL; ++k) store_vec(line + k * VL, broadcast(0.0f));
        continue;
      }
      const T* row = x + (y0 + r) * s.x.h + x0 + i;
      const T* gate_row = gated ? g + (y0 + r) * s.gate.h + x0 + i : nullptr;
      F32 v[VL];
      if (!gated) {
#pragma GCC unroll 16
        for (int k = 0; k < VL; ++k)
          v[k] = k < channels ? load_vec(row + k * s.x.c, m) : broadcast(0.0f);
      } else {
#pragma GCC unroll 16
        for (int k = 0; k < VL; ++k)
          v[k] = k < channels
                     ? relu_mask(load_vec(row + k * s.x.c, m), load_vec(gate_row + k * s.gate.c, m))
                     : broadcast(0.0f);
      }
      transpose<float>(v);
#pragma GCC unroll 16
      for (int k = 0; k < VL; ++k) store_vec(line + k * VL, v[k]);
    }
    for (int64_t j = 0; j < width; ++j) {
      F32 d[R];
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) d[r] = load_vec(strip + (r * VL + j) * VL);
      f(i + j, d);
    }
  }
}

// Calls f(image, tile row, first tile column, tiles, position in the block) for each run of
// neighbouring tiles.
template <typename F>
FASTDA_INLINE void each_run(const Grid& grid, int64_t begin, int64_t end, F&& f) {
  for (int64_t tile = begin; tile < end;) {
    const int64_t row = tile / grid.cols, col = tile % grid.cols;
    const int64_t left = min(end - tile, grid.cols - col);
    const int64_t count = ceil_div(left, ceil_div(left, RUN));
    f(row / grid.rows, row % grid.rows, col, count, tile - begin);
    tile += count;
  }
}

struct Scratch {
  alignas(64) float strip[6 * VL * VL];
  alignas(64) float columns[COLUMNS * 6 * VL];
};

template <typename T>
void transform_input_run(const Source& s, const Grid& grid, int64_t image, int64_t row, int64_t col,
                         int64_t count, int64_t position, int64_t c, const Workspace& v,
                         int64_t first_slot, Scratch& scratch) {
  each_column<T, 6>(s, grid, image, c, row * 4 - 1, col * 4 - 1, count * 4 + 2, scratch.strip,
                    [&](int64_t i, const F32* d) __attribute__((always_inline)) {
                      F32 t[6];
                      input_1d(d, t);
#pragma GCC unroll 6
                      for (int r = 0; r < 6; ++r)
                        store_vec(scratch.columns + (i * 6 + r) * VL, t[r]);
                    });
  for (int64_t q = 0; q < count; ++q) {
    float* out = v.at(position + q, first_slot, c);
    const float* in = scratch.columns + q * 4 * 6 * VL;
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      F32 d[6], t[6];
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) d[j] = load_vec(in + (j * 6 + i) * VL);
      input_1d(d, t);
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) store_vec(out + (i * 6 + j) * v.slot, t[j]);
    }
  }
}

template <typename T>
void transform_gradient_run(const Source& s, const Grid& grid, int64_t image, int64_t row,
                            int64_t col, int64_t count, int64_t position, int64_t c,
                            const Workspace& v, double* sums, Scratch& scratch) {
  F32 sum = broadcast(0.0f);
  each_column<T, 4>(s, grid, image, c, row * 4, col * 4, count * 4, scratch.strip,
                    [&](int64_t i, const F32* d) __attribute__((always_inline)) {
                      F32 t[6];
                      sum += (d[0] + d[1]) + (d[2] + d[3]);
                      gradient_1d(d, t);
#pragma GCC unroll 6
                      for (int r = 0; r < 6; ++r)
                        store_vec(scratch.columns + (i * 6 + r) * VL, t[r]);
                    });
  alignas(64) float total[VL];
  store_vec(total, sum);
  for (int k = 0; k < VL; ++k) sums[c + k] += double(total[k]);
  for (int64_t q = 0; q < count; ++q) {
    float* out = v.at(position + q, 0, c);
    const float* in = scratch.columns + q * 4 * 6 * VL;
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      F32 d[4], t[6];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) d[j] = load_vec(in + (j * 6 + i) * VL);
      gradient_1d(d, t);
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) store_vec(out + (i * 6 + j) * v.slot, t[j]);
    }
  }
}

// Visits all runs and vectors of the channels [c0, c1) of a block, in the order in which the
// tensor's layout lies in memory.
template <typename F>
FASTDA_INLINE void each_run_and_vector(bool channels_last, const Grid& grid, int64_t begin,
                                       int64_t end, int64_t c0, int64_t c1, F&& f) {
  if (channels_last) {
    each_run(grid, begin, end,
             [&](int64_t image, int64_t row, int64_t col, int64_t count, int64_t position) {
               for (int64_t c = c0; c < c1; c += VL) f(image, row, col, count, position, c);
             });
  } else {
    for (int64_t c = c0; c < c1; c += VL)
      each_run(grid, begin, end,
               [&](int64_t image, int64_t row, int64_t col, int64_t count, int64_t position) {
                 f(image, row, col, count, position, c);
               });
  }
}

// The channels of s that v has room for.
template <typename T>
void transform_input(const Source& s, const Grid& grid, int64_t begin, int64_t end,
                     const Workspace& v, int64_t first_slot, Scratch& scratch) {
  each_run_and_vector(
      s.channels_last, grid, begin, end, v.first, min(s.channels, v.first + v.channels),
      [&](int64_t image, int64_t row, int64_t col, int64_t count, int64_t position, int64_t c) {
        transform_input_run<T>(s, grid, image, row, col, count, position, c, v, first_slot,
                               scratch);
      });
}

template <typename T>
void transform_gradient(const Source& s, const Grid& grid, int64_t begin, int64_t end,
                        const Workspace& v, double* sums, Scratch& scratch) {
  each_run_and_vector(
      s.channels_last, grid, begin, end, v.first, min(s.channels, v.first + v.channels),
      [&](int64_t image, int64_t row, int64_t col, int64_t count, int64_t position, int64_t c) {
        transform_gradient_run<T>(s, grid, image, row, col, count, position, c, v, sums, scratch);
      });
}

// The last group of the last block has fewer than six tiles: the rest are zeros.
void clear_rest(const Workspace& v, int64_t tiles, int64_t first_slot) {
  for (int64_t tile = tiles; tile < round_up(tiles, TILES); ++tile)
    for (int t = 0; t < 36; ++t)
      for (int64_t c = 0; c < v.channels; c += VL)
        store_vec(v.at(tile, first_slot + t, v.first + c), broadcast(0.0f));
}

// --- 36 matrix products

// Cache lines that will be wanted later. Products fetch them one by one: many at once would hold up
// what the products themselves wait for.
struct Lines {
  const char* const* at = nullptr;
  int64_t count = 0;
};

// m[6][N vectors] = v[6][C] u[C][N vectors], `Add`ed to what m is. Meanwhile the six rows at `next`
// are fetched, of what is at `ahead`, `pace` floats for every input channel, and `far`.
template <int N, bool Add>
[[gnu::noinline]] void multiply(const float* v, int64_t v_stride, const float* u, int64_t C,
                                float* m, int64_t m_stride, const float* next, const float* ahead,
                                int64_t pace, Lines far) {
  F32 acc[TILES][N];
#pragma GCC unroll 6
  for (int r = 0; r < TILES; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[r][n] = broadcast(0.0f);
  const float* w = v + 3 * v_stride;
  const auto step = [&]() __attribute__((always_inline)) {
    F32 b[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) b[n] = load_vec(u + n * VL);
#pragma GCC unroll 6
    for (int r = 0; r < TILES; ++r) {
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
    next += 2 * TILES;
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
  for (int r = 0; r < TILES; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      float* to = m + r * m_stride + n * VL;
      store_vec(to, Add ? load_vec(to) + acc[r][n] : acc[r][n]);
    }
}

// Calls f(integral constant N, first vector) for each panel of at most NV vectors.
template <int N>
struct Width {
  static constexpr int value = N;
};
template <typename F>
FASTDA_INLINE void each_panel(int64_t vectors, F&& f) {
  int64_t v = 0;
  for (; v + NV <= vectors; v += NV) f(Width<NV>{}, v);
  switch (vectors - v) {
    case 1: f(Width<1>{}, v); break;
    case 2: f(Width<(NV > 2 ? 2 : 1)>{}, v); break;
    case 3: f(Width<(NV > 3 ? 3 : 1)>{}, v); break;
    default: break;
  }
}

// --- output

// The epilogue's operands at one pixel (channels_last) or one channel's row (contiguous): `in`
// elements from p.
template <typename T>
struct Epilogue {
  const T *residual, *residual_gate, *output_gate;
  T* output;
  F32 low;

  template <typename... M>
  [[gnu::always_inline]] inline F32 apply(F32 x, int64_t at_residual, int64_t at_residual_gate,
                                          int64_t at_output_gate, M... m) const {
    if (residual) {
      F32 r = load_vec(residual + at_residual, m...);
      if (residual_gate) r = relu_mask(r, load_vec(residual_gate + at_residual_gate, m...));
      x = x + r;
    }
    x = clamp_min(x, low);
    if (output_gate) x = relu_mask(x, load_vec(output_gate + at_output_gate, m...));
    return x;
  }
};

// 36 points of one tile, VL channels -> 4 x 4 pixels.
FASTDA_INLINE void output_tile(const float* m, int64_t slot, F32 (*y)[4], F32& finite) {
  F32 s[4][6];
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) {
    F32 d[6], t[4];
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) d[i] = load_vec(m + (i * 6 + j) * slot);
    output_1d(d, t);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) s[i][j] = t[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) output_1d(s[i], y[i]);
  finite = fma((y[0][0] + y[0][3]) + (y[3][0] + y[3][3]), broadcast(0.0f), finite);
}

// `finite` stays zero where every value of the block is finite, and becomes NaN otherwise: what is
// not finite in the 36 points shows in the corners of the 4 x 4 pixels.
template <typename T>
void output_run(const ConvArgs& p, const Grid& grid, int64_t image, int64_t row, int64_t col,
                int64_t count, int64_t position, int64_t k, const Workspace& m, Scratch& scratch,
                F32& finite) {
  const auto base = [&](const View& v) {
    return v.data ? static_cast<T*>(v.data) + image * v.n + k * v.c + row * 4 * v.h + col * 4 * v.w
                  : nullptr;
  };
  const View &vr = p.residual, &vq = p.residual_gate, &vg = p.out_gate, &vo = p.out;
  const Epilogue<T> e{base(vr), base(vq), base(vg), base(vo),
                      broadcast(p.relu ? 0.0f : -__builtin_inff())};
  const T* bias = static_cast<const T*>(p.bias);
  const int64_t channels = min(VL, p.out_channels - k), rows = min(4, grid.height - row * 4);
  const int64_t width = min(count * 4, grid.width - col * 4);

  if (p.out_channels_last) {
    const Mask mask = mask_of(0, channels);
    const F32 b = bias ? load_vec(bias + k, mask) : broadcast(0.0f);
    for (int64_t q = 0; q < count; ++q) {
      F32 y[4][4];
      output_tile(m.at(position + q, 0, k), m.slot, y, finite);
      if (channels == VL && rows == 4 && width >= q * 4 + 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {
            const int64_t x = q * 4 + j;
            store_vec(e.output + i * vo.h + x * vo.w,
                      e.apply(y[i][j] + b, i * vr.h + x * vr.w, i * vq.h + x * vq.w,
                              i * vg.h + x * vg.w));
          }
      } else {
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < min(4, width - q * 4); ++j) {
            const int64_t x = q * 4 + j;
            store_vec(e.output + i * vo.h + x * vo.w,
                      e.apply(y[i][j] + b, i * vr.h + x * vr.w, i * vq.h + x * vq.w,
                              i * vg.h + x * vg.w, mask),
                      mask);
          }
      }
    }
    return;
  }

  for (int64_t q = 0; q < count; q += VL / 4) {
    float* pixels = scratch.columns;  // [4 rows][VL pixels][VL channels]
    for (int64_t a = 0; a < min(VL / 4, count - q); ++a) {
      F32 y[4][4];
      output_tile(m.at(position + q + a, 0, k), m.slot, y, finite);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) store_vec(pixels + ((i * VL) + a * 4 + j) * VL, y[i][j]);
    }
    const Mask mask = mask_of(0, width - q * 4);
    for (int64_t i = 0; i < rows; ++i) {
      F32 v[VL];
#pragma GCC unroll 16
      for (int j = 0; j < VL; ++j) v[j] = load_vec(pixels + (i * VL + j) * VL);
      transpose<float>(v);
      const int64_t x = q * 4;
#pragma GCC unroll 16
      for (int c = 0; c < VL; ++c) {
        if (c >= channels) break;
        const F32 b = bias ? broadcast(load(bias + k + c)) : broadcast(0.0f);
        store_vec(e.output + i * vo.h + x + c * vo.c,
                  e.apply(v[c] + b, i * vr.h + x + c * vr.c, i * vq.h + x + c * vq.c,
                          i * vg.h + x + c * vg.c, mask),
                  mask);
      }
    }
  }
}

// Calls f.operator()<T>() with the element type: anything but double.
template <typename F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16: return f.template operator()<bf16>();
    case DType::f16: return f.template operator()<f16>();
    default: return f.template operator()<float>();
  }
}

// --- filters

// Offset of the vector's column within one point's matrix, and the distance of its rows.
void panel_of(int64_t vector, int64_t vectors, int64_t C, int64_t& offset, int64_t& stride) {
  const int64_t first = vector / NV * NV;
  stride = min(NV, vectors - first) * VL;
  offset = first * VL * C + (vector - first) * VL;
}

// The taps of VL output channels from k on, of one input channel; zeros past the last output
// channel.
using Taps = float[9][VL];

// A filter whose 3 x 3 taps lie side by side, in their order (1) or, rotated, in the other (-1).
int64_t adjacent(const View& filter) {
  return filter.h == 3 && filter.w == 1 ? 1 : filter.h == -3 && filter.w == -1 ? -1 : 0;
}

// Of `count` (at most VL) input channels from c on.
template <typename T>
void load_taps(const View& filter, int64_t k, int64_t outputs, int64_t c, int64_t count,
               Taps* taps) {
  const int64_t valid = min(VL, outputs - k), order = adjacent(filter);
  const T* from = static_cast<const T*>(filter.data) + k * filter.n + c * filter.c;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (filter.n == 1 || filter.c == 1) {
      for (int t = 0; t < 9; ++t) {
        const T* tap = from + t / 3 * filter.h + t % 3 * filter.w;
        if (filter.n == 1) {
          for (int64_t i = 0; i < count; ++i)
            store_vec(taps[i][t], load_vec(tap + i * filter.c, mask_of(0, valid)));
          continue;
        }
        F32 v[VL];
        const Mask m = mask_of(0, count);
        for (int i = 0; i < VL; ++i)
          v[i] = i < valid ? load_vec(tap + i * filter.n, m) : broadcast(0.0f);
        transpose<float>(v);
        for (int i = 0; i < VL; ++i) {
          if (i >= count) break;
          store_vec(taps[i][t], v[i]);
        }
      }
      return;
    }
    if (order != 0) {
      const int64_t first = order > 0 ? 0 : -8;  // of the nine in memory
      for (int64_t i = 0; i < count; ++i) {
        const T* row = from + i * filter.c + first;
        F32 v[VL];
        const Mask m = mask_of(0, 9);
        for (int j = 0; j < VL; ++j)
          v[j] = j < valid ? load_vec(row + j * filter.n, m) : broadcast(0.0f);
        transpose<float>(v);
        for (int t = 0; t < (VL < 9 ? VL : 9); ++t) store_vec(taps[i][order > 0 ? t : 8 - t], v[t]);
        for (int t = VL; t < 9; ++t)
          for (int64_t j = 0; j < VL; ++j)
            taps[i][order > 0 ? t : 8 - t][j] = j < valid ? row[j * filter.n + t] : 0.0f;
      }
      return;
    }
  }
  for (int64_t i = 0; i < count; ++i)
    for (int t = 0; t < 9; ++t)
      for (int64_t j = 0; j < VL; ++j)
        taps[i][t][j] =
            j < valid
                ? load(from + i * filter.c + j * filter.n + t / 3 * filter.h + t % 3 * filter.w)
                : 0.0f;
}

template <typename T>
void store_taps(const View& filter, int64_t k, int64_t outputs, int64_t c, const Taps& taps) {
  const int64_t valid = min(VL, outputs - k);
  T* to = static_cast<T*>(filter.data) + k * filter.n + c * filter.c;
  if constexpr (sizeof(T) == sizeof(float) && VL > 9) {
    if (adjacent(filter) == 1) {
      F32 v[VL];
      for (int t = 0; t < VL; ++t) v[t] = t < 9 ? load_vec(taps[t]) : broadcast(0.0f);
      transpose<float>(v);
      for (int i = 0; i < VL; ++i) {
        if (i >= valid) break;
        store_vec(to + i * filter.n, v[i], mask_of(0, 9));
      }
      return;
    }
  }
  for (int64_t i = 0; i < valid; ++i)
    for (int t = 0; t < 9; ++t)
      store(to + i * filter.n + t / 3 * filter.h + t % 3 * filter.w, taps[t][i]);
}

// out[36 points], `size` floats apart.
FASTDA_INLINE void transform_taps(const Taps& taps, float* out, int64_t size) {
  F32 half[6][3];
  for (int s = 0; s < 3; ++s) {
    F32 d[3], u[6];
    for (int r = 0; r < 3; ++r) d[r] = load_vec(taps[r * 3 + s]);
    weight_1d(d, u);
    for (int i = 0; i < 6; ++i) half[i][s] = u[i];
  }
  for (int i = 0; i < 6; ++i) {
    F32 u[6];
    weight_1d(half[i], u);
    for (int j = 0; j < 6; ++j) store_vec(out + (i * 6 + j) * size, u[j]);
  }
}

// The transpose; f(point) is the gradient of a point. `finite` stays zero where all of it is
// finite.
template <typename F>
FASTDA_INLINE void taps_gradient(F&& f, Taps& taps, F32& finite) {
  F32 half[3][6];
  for (int j = 0; j < 6; ++j) {
    F32 u[6], w[3];
    for (int i = 0; i < 6; ++i) u[i] = f(i * 6 + j);
    weight_gradient_1d(u, w);
    for (int r = 0; r < 3; ++r) half[r][j] = w[r];
  }
  for (int r = 0; r < 3; ++r) {
    F32 w[3];
    weight_gradient_1d(half[r], w);
    for (int s = 0; s < 3; ++s) {
      store_vec(taps[r * 3 + s], w[s]);
      finite = fma(w[s], broadcast(0.0f), finite);
    }
  }
}

// --- weight gradient

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
    for (int q = 0; q < TILES; ++q) {
      F32 b[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) b[n] = load_vec(zq + n * VL);
      prefetch_first_level(next);
      if (int64_t i = g * TILES + q; i < far.count) prefetch_second_level(far.at[i]);
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
      vq += v_stride, zq += z_stride, next += 64;
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

}  // namespace
#endif
}  // namespace fastda::cpu::FASTDA_ISA
