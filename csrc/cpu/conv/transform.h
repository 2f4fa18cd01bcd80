// Winograd's transforms. F(4x4, 3x3) gives a tile of 4 x 4 pixels of the output from 6 x 6 pixels of
// the input and a filter of 3 x 3 taps; F(4x4, 4x4) and F(3x3, 5x5) take 7 x 7 pixels. As many
// products as pixels of the input:
//
//   output = A' [ (G filter G') * (B' input B) ] A      (* entry by entry)
//
// and, transposed, filter gradient = G' [ (A gradient A') * (B' input B) ] G. The functions apply
// one matrix to vectors: lanes are channels. Internal linkage throughout: see common/dtype.h.
#pragma once

#include "cpu/conv/outliers.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

#if FASTDA_SIMD

// Interpolation at 0, +-a, +-b, infinity with a = sqrt(1/2), b = sqrt(2): a b = 1 makes most
// constants 1, and the error is half that of 0, +-1, +-2.
struct Winograd43 {
  static constexpr int tile = 4, taps = 3, points = 6;
  static constexpr float a = 0.70710678118654752440f, b = 1.41421356237309504880f;

  //        |  1    0   -5/2   0    1   0 |
  //        |  0   -2a   -2    a    1   0 |
  //   B' = |  0    2a   -2   -a    1   0 |
  //        |  0  -b/2  -1/2   b    1   0 |
  //        |  0   b/2  -1/2  -b    1   0 |
  //        |  0    1    0   -5/2   0   1 |
  FASTDA_INLINE void input(const F32* d, F32* v) {
    const F32 even_a = fnma(broadcast(2.0f), d[2], d[4]);
    const F32 odd_a = fnma(broadcast(2.0f), d[1], d[3]);
    const F32 even_b = fnma(broadcast(0.5f), d[2], d[4]);
    const F32 odd_b = fnma(broadcast(0.5f), d[1], d[3]);
    v[0] = fnma(broadcast(2.5f), d[2], d[0] + d[4]);
    v[1] = fma(broadcast(a), odd_a, even_a);
    v[2] = fnma(broadcast(a), odd_a, even_a);
    v[3] = fma(broadcast(b), odd_b, even_b);
    v[4] = fnma(broadcast(b), odd_b, even_b);
    v[5] = fnma(broadcast(2.5f), d[3], d[1] + d[5]);
  }

  //        |  1    1    1    1    1   0 |
  //   A' = |  0    a   -a    b   -b   0 |
  //        |  0   1/2  1/2   2    2   0 |
  //        |  0   a/2 -a/2   2b  -2b  1 |
  FASTDA_INLINE void output(const F32* m, F32* y) {
    const F32 sum_a = m[1] + m[2], difference_a = m[1] - m[2];
    const F32 sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    y[0] = m[0] + sum_a + sum_b;
    y[1] = broadcast(a) * fma(broadcast(2.0f), difference_b, difference_a);
    y[2] = fma(broadcast(0.5f), sum_a, broadcast(2.0f) * sum_b);
    y[3] =
        fma(broadcast(a), fma(broadcast(0.5f), difference_a, broadcast(4.0f) * difference_b), m[5]);
  }

  // A: 4 pixels -> 6 points.
  FASTDA_INLINE void gradient(const F32* g, F32* z) {
    const F32 even_a = fma(broadcast(0.5f), g[2], g[0]), odd_a = fma(broadcast(0.5f), g[3], g[1]);
    const F32 even_b = fma(broadcast(2.0f), g[2], g[0]), odd_b = fma(broadcast(2.0f), g[3], g[1]);
    z[0] = g[0];
    z[1] = fma(broadcast(a), odd_a, even_a);
    z[2] = fnma(broadcast(a), odd_a, even_a);
    z[3] = fma(broadcast(b), odd_b, even_b);
    z[4] = fnma(broadcast(b), odd_b, even_b);
    z[5] = g[3];
  }

  //       |   1     0     0  |
  //       | -2/3 -2a/3  -1/3 |
  //   G = | -2/3  2a/3  -1/3 |
  //       |  1/6   b/6   1/3 |
  //       |  1/6  -b/6   1/3 |
  //       |   0     0     1  |
  FASTDA_INLINE void filter(const F32* w, F32* u) {
    const F32 even_a = broadcast(-2.0f / 3) * fma(broadcast(0.5f), w[2], w[0]);
    const F32 odd_a = broadcast(-2.0f / 3 * a) * w[1];
    const F32 even_b = broadcast(1.0f / 6) * fma(broadcast(2.0f), w[2], w[0]);
    const F32 odd_b = broadcast(1.0f / 6 * b) * w[1];
    u[0] = w[0];
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = w[2];
  }

  // G': 6 points -> 3 taps.
  FASTDA_INLINE void filter_gradient(const F32* u, F32* w) {
    const F32 sum_a = broadcast(-2.0f / 3) * (u[1] + u[2]);
    const F32 difference_a = broadcast(-2.0f / 3 * a) * (u[1] - u[2]);
    const F32 sum_b = broadcast(1.0f / 6) * (u[3] + u[4]);
    const F32 difference_b = broadcast(1.0f / 6 * b) * (u[3] - u[4]);
    w[0] = u[0] + sum_a + sum_b;
    w[1] = difference_a + difference_b;
    w[2] = u[5] + fma(broadcast(0.5f), sum_a, broadcast(2.0f) * sum_b);
  }
};

// F(4x4, 2x2): interpolation at +-a, +-b, infinity.
struct Winograd42 {
  static constexpr int tile = 4, taps = 2, points = 5;
  static constexpr double a = 0.6, b = 1.6, a2 = a * a, b2 = b * b;
  static constexpr double norm_a = 1 / (2 * a * (a2 - b2)), norm_b = 1 / (2 * b * (b2 - a2));

  //        | -a b2  -b2     a    1   0 |
  //        |  a b2  -b2    -a    1   0 |
  //   B' = | -b a2  -a2     b    1   0 |
  //        |  b a2  -a2    -b    1   0 |
  //        |  a2 b2   0  -a2-b2  0   1 |
  FASTDA_INLINE void input(const F32* d, F32* v) {
    const F32 even_a = fnma(broadcast(float(b2)), d[0], d[2]);
    const F32 odd_a = fnma(broadcast(float(b2)), d[1], d[3]);
    const F32 even_b = fnma(broadcast(float(a2)), d[0], d[2]);
    const F32 odd_b = fnma(broadcast(float(a2)), d[1], d[3]);
    v[0] = fma(broadcast(float(a)), even_a, odd_a);
    v[1] = fnma(broadcast(float(a)), even_a, odd_a);
    v[2] = fma(broadcast(float(b)), even_b, odd_b);
    v[3] = fnma(broadcast(float(b)), even_b, odd_b);
    v[4] = fma(broadcast(float(a2 * b2)), d[0], fnma(broadcast(float(a2 + b2)), d[2], d[4]));
  }

  //        |  1   1   1   1   0 |
  //   A' = |  a  -a   b  -b   0 |
  //        |  a2  a2  b2  b2  0 |
  //        |  a3 -a3  b3 -b3  1 |
  FASTDA_INLINE void output(const F32* m, F32* y) {
    const F32 sum_a = m[0] + m[1], difference_a = broadcast(float(a)) * (m[0] - m[1]);
    const F32 sum_b = m[2] + m[3], difference_b = broadcast(float(b)) * (m[2] - m[3]);
    y[0] = sum_a + sum_b;
    y[1] = difference_a + difference_b;
    y[2] = fma(broadcast(float(a2)), sum_a, broadcast(float(b2)) * sum_b);
    y[3] = fma(broadcast(float(a2)), difference_a, fma(broadcast(float(b2)), difference_b, m[4]));
  }

  // A: 4 pixels -> 5 points.
  FASTDA_INLINE void gradient(const F32* g, F32* z) {
    const F32 even_a = fma(broadcast(float(a2)), g[2], g[0]);
    const F32 odd_a = fma(broadcast(float(a2)), g[3], g[1]);
    const F32 even_b = fma(broadcast(float(b2)), g[2], g[0]);
    const F32 odd_b = fma(broadcast(float(b2)), g[3], g[1]);
    z[0] = fma(broadcast(float(a)), odd_a, even_a);
    z[1] = fnma(broadcast(float(a)), odd_a, even_a);
    z[2] = fma(broadcast(float(b)), odd_b, even_b);
    z[3] = fnma(broadcast(float(b)), odd_b, even_b);
    z[4] = g[3];
  }

  //       |  n   a n |
  //       | -n   a n |
  //   G = |  m   b m |    n = norm_a, m = norm_b
  //       | -m   b m |
  //       |  0    1  |
  FASTDA_INLINE void filter(const F32* w, F32* u) {
    const F32 even_a = broadcast(float(norm_a)) * w[0], odd_a = broadcast(float(a * norm_a)) * w[1];
    const F32 even_b = broadcast(float(norm_b)) * w[0], odd_b = broadcast(float(b * norm_b)) * w[1];
    u[0] = odd_a + even_a;
    u[1] = odd_a - even_a;
    u[2] = odd_b + even_b;
    u[3] = odd_b - even_b;
    u[4] = w[1];
  }

  // G': 5 points -> 2 taps.
  FASTDA_INLINE void filter_gradient(const F32* u, F32* w) {
    w[0] = fma(broadcast(float(norm_a)), u[0] - u[1], broadcast(float(norm_b)) * (u[2] - u[3]));
    w[1] = fma(broadcast(float(a * norm_a)), u[0] + u[1],
               fma(broadcast(float(b * norm_b)), u[2] + u[3], u[4]));
  }
};

// Input columns of a run, and room for what the last vector has beyond them.
constexpr int run_columns = tile_size * longest_run + 2 + (VL - 2);

struct Scratch {
  alignas(64) float strip[6 * VL * VL];
  alignas(64) float columns[run_columns * 6 * VL];
};

template <typename T>
void transform_input_run(const Source& s, const Grid& grid, const Run& run, int64_t c,
                         const Workspace& v, int64_t first_slot, Scratch& scratch) {
  Peak peak;
  each_column<T, 6>(s, run.image, c, run.row * 4 - s.padding, run.column * 4 - s.padding,
                    run.count * 4 + 2, scratch.strip,
                    [&](int64_t i, const F32* d) __attribute__((always_inline)) {
                      F32 t[6];
                      Winograd43::input(d, t);
#pragma GCC unroll 6
                      for (int r = 0; r < 6; ++r) {
                        peak.add(d[r]);
                        store_vec(scratch.columns + (i * 6 + r) * VL, t[r]);
                      }
                    });
  peak.note(s.range, run.image);
  for (int64_t q = 0; q < run.count; ++q) {
    float* out = v.at(run.position + q, first_slot, c);
    const float* in = scratch.columns + q * 4 * 6 * VL;
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      F32 d[6], t[6];
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) d[j] = load_vec(in + (j * 6 + i) * VL);
      Winograd43::input(d, t);
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) store_vec(out + (i * 6 + j) * v.slot, t[j]);
    }
  }
}

template <typename T, typename W = Winograd43>
void transform_gradient_run(const Source& s, const Grid& grid, const Run& run, int64_t c,
                            const Workspace& v, double* sums, Scratch& scratch) {
  F32 sum = broadcast(0.0f);
  Peak peak;
  each_column<T, 4>(s, run.image, c, run.row * 4, run.column * 4, run.count * 4, scratch.strip,
                    [&](int64_t i, const F32* d) __attribute__((always_inline)) {
                      F32 t[W::points];
                      sum += (d[0] + d[1]) + (d[2] + d[3]);
#pragma GCC unroll 4
                      for (int r = 0; r < 4; ++r) peak.add(d[r]);
                      W::gradient(d, t);
#pragma GCC unroll 6
                      for (int r = 0; r < W::points; ++r)
                        store_vec(scratch.columns + (i * W::points + r) * VL, t[r]);
                    });
  peak.note(s.range, run.image);
  alignas(64) float total[VL];
  store_vec(total, sum);
  for (int k = 0; k < VL; ++k) sums[c + k] += double(total[k]);
  for (int64_t q = 0; q < run.count; ++q) {
    float* out = v.at(run.position + q, 0, c);
    const float* in = scratch.columns + q * 4 * W::points * VL;
#pragma GCC unroll 6
    for (int i = 0; i < W::points; ++i) {
      F32 d[4], t[W::points];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) d[j] = load_vec(in + (j * W::points + i) * VL);
      W::gradient(d, t);
#pragma GCC unroll 6
      for (int j = 0; j < W::points; ++j) store_vec(out + (i * W::points + j) * v.slot, t[j]);
    }
  }
}

// The channels of s that v has room for.
template <typename T>
void transform_input_tiles(const Source& s, const Grid& grid, int64_t begin, int64_t end,
                           const Workspace& v, int64_t first_slot, Scratch& scratch) {
  each_run_and_vector(s.channels_last, grid, begin, end, v.first,
                      min(s.channels, v.first + v.channels), [&](const Run& run, int64_t c) {
                        transform_input_run<T>(s, grid, run, c, v, first_slot, scratch);
                      });
}

template <typename T, typename W = Winograd43>
void transform_gradient_tiles(const Source& s, const Grid& grid, int64_t begin, int64_t end,
                              const Workspace& v, double* sums, Scratch& scratch) {
  each_run_and_vector(s.channels_last, grid, begin, end, v.first,
                      min(s.channels, v.first + v.channels), [&](const Run& run, int64_t c) {
                        transform_gradient_run<T, W>(s, grid, run, c, v, sums, scratch);
                      });
}

// The last group of the last block has fewer than six tiles: the rest are zeros.
inline void clear_rest(const Workspace& v, int64_t tiles, int64_t first_slot, int points = 36) {
  for (int64_t tile = tiles; tile < round_up(tiles, group_tiles); ++tile)
    for (int t = 0; t < points; ++t)
      for (int64_t c = 0; c < v.channels; c += VL)
        store_vec(v.at(tile, first_slot + t, v.first + c), broadcast(0.0f));
}
// The points of one tile, VL channels -> 4 x 4 pixels.
template <typename W>
FASTDA_INLINE void output_tile(const float* m, int64_t slot, F32 (*y)[4], F32& finite) {
  F32 s[4][W::points];
#pragma GCC unroll 6
  for (int j = 0; j < W::points; ++j) {
    F32 d[W::points], t[4];
#pragma GCC unroll 6
    for (int i = 0; i < W::points; ++i) d[i] = load_vec(m + (i * W::points + j) * slot);
    W::output(d, t);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) s[i][j] = t[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) W::output(s[i], y[i]);
  finite = fma((y[0][0] + y[0][3]) + (y[3][0] + y[3][3]), broadcast(0.0f), finite);
}
// out[36 points], `size` floats apart.
FASTDA_INLINE void transform_taps(const Taps& taps, float* out, int64_t size) {
  F32 half[6][3];
  for (int s = 0; s < 3; ++s) {
    F32 d[3], u[6];
    for (int r = 0; r < 3; ++r) d[r] = load_vec(taps[r * 3 + s]);
    Winograd43::filter(d, u);
    for (int i = 0; i < 6; ++i) half[i][s] = u[i];
  }
  for (int i = 0; i < 6; ++i) {
    F32 u[6];
    Winograd43::filter(half[i], u);
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
    Winograd43::filter_gradient(u, w);
    for (int r = 0; r < 3; ++r) half[r][j] = w[r];
  }
  for (int r = 0; r < 3; ++r) {
    F32 w[3];
    Winograd43::filter_gradient(half[r], w);
    for (int s = 0; s < 3; ++s) {
      store_vec(taps[r * 3 + s], w[s]);
      finite = fma(w[s], broadcast(0.0f), finite);
    }
  }
}

#endif

// F(tile x tile, taps x taps) of seven points: interpolation at +-p, for three p, and infinity.
template <int Tile, typename P>
struct Winograd7 {
  static constexpr int tile = Tile, points = 7, taps = points + 1 - tile;
  static constexpr const double (&p)[3] = P::p;
  static constexpr double square(double x) { return x * x; }
  // For the pair i: sum and product of the squares of the other two.
  static constexpr double other_sum(int i) {
    return square(p[(i + 1) % 3]) + square(p[(i + 2) % 3]);
  }
  static constexpr double other_product(int i) {
    return square(p[(i + 1) % 3]) * square(p[(i + 2) % 3]);
  }

  // With s = other_sum, q = other_product, and S, Q, P the elementary symmetric sums of all three
  // squares, rows of B' for +p, -p and infinity:
  //
  //   |  pq   q  -ps  -s   p   1   0 |
  //   | -pq   q   ps  -s  -p   1   0 |
  //   |  -P   0    Q   0  -S   0   1 |
  static inline void input(const F32* d, F32* v) {
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const F32 even = d[4] - float(other_sum(i)) * d[2] + float(other_product(i)) * d[0];
      const F32 odd = d[5] - float(other_sum(i)) * d[3] + float(other_product(i)) * d[1];
      v[2 * i] = odd + float(p[i]) * even;
      v[2 * i + 1] = odd - float(p[i]) * even;
    }
    constexpr double S = square(p[0]) + other_sum(0);
    constexpr double Q = square(p[0]) * other_sum(0) + other_product(0);
    constexpr double R = square(p[0]) * other_product(0);
    v[6] = d[6] - float(S) * d[4] + float(Q) * d[2] - float(R) * d[0];
  }

  // B: 7 points -> 7 pixels.
  static inline void spread(const F32* v, F32* d) {
    constexpr double S = square(p[0]) + other_sum(0);
    constexpr double Q = square(p[0]) * other_sum(0) + other_product(0);
    constexpr double R = square(p[0]) * other_product(0);
    d[0] = float(-R) * v[6];
    d[1] = d[3] = d[5] = F32{};
    d[2] = float(Q) * v[6];
    d[4] = float(-S) * v[6];
    d[6] = v[6];
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const F32 even = float(p[i]) * (v[2 * i] - v[2 * i + 1]), odd = v[2 * i] + v[2 * i + 1];
      d[0] += float(other_product(i)) * even;
      d[1] += float(other_product(i)) * odd;
      d[2] -= float(other_sum(i)) * even;
      d[3] -= float(other_sum(i)) * odd;
      d[4] += even;
      d[5] += odd;
    }
  }

  // Columns of A' for +p, -p and infinity; the last row is that of p^(tile - 1):
  //
  //   |  1     1   0 |
  //   |  p    -p   0 |
  //   |  p^2  p^2  0 |
  //   |  p^3 -p^3  1 |
  static inline void output(const F32* m, F32* y) {
#pragma GCC unroll 4
    for (int t = 0; t < tile; ++t) y[t] = t < tile - 1 ? F32{} : m[6];
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const F32 sum = m[2 * i] + m[2 * i + 1], difference = m[2 * i] - m[2 * i + 1];
      y[0] += sum;
      y[1] += float(p[i]) * difference;
      y[2] += float(square(p[i])) * sum;
      if constexpr (tile == 4) y[3] += float(square(p[i]) * p[i]) * difference;
    }
  }

  // A: the pixels of a tile -> 7 points.
  static inline void gradient(const F32* g, F32* z) {
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const F32 even = g[0] + float(square(p[i])) * g[2];
      F32 odd = g[1];
      if constexpr (tile == 4) odd = g[1] + float(square(p[i])) * g[3];
      z[2 * i] = even + float(p[i]) * odd;
      z[2 * i + 1] = even - float(p[i]) * odd;
    }
    z[6] = g[tile - 1];
  }
};
// The values were searched for the least error.
struct Points44 {
  static constexpr double p[3] = {0.3, 0.9, 1.9};
};
struct Points35 {
  static constexpr double p[3] = {0.3, 0.85, 1.7};
};
using Winograd44 = Winograd7<4, Points44>;
using Winograd35 = Winograd7<3, Points35>;

// F(5x5, 2x2), at the points of Winograd43: 0, +-a, +-b, infinity.
struct Winograd52 {
  static constexpr int tile = 5, taps = 2, points = 6;
  static constexpr double a = 0.70710678118654752440, b = 1.41421356237309504880;

  // B' of Winograd43, for every instruction set.
  static inline void input(const F32* d, F32* v) {
    const F32 even_a = d[4] - 2.0f * d[2], odd_a = d[3] - 2.0f * d[1];
    const F32 even_b = d[4] - 0.5f * d[2], odd_b = d[3] - 0.5f * d[1];
    v[0] = (d[0] + d[4]) - 2.5f * d[2];
    v[1] = even_a + float(a) * odd_a;
    v[2] = even_a - float(a) * odd_a;
    v[3] = even_b + float(b) * odd_b;
    v[4] = even_b - float(b) * odd_b;
    v[5] = (d[1] + d[5]) - 2.5f * d[3];
  }

  //        |  1    1    1    1    1   0 |
  //        |  0    a   -a    b   -b   0 |
  //   A' = |  0   1/2  1/2   2    2   0 |
  //        |  0   a/2 -a/2   2b  -2b  0 |
  //        |  0   1/4  1/4   4    4   1 |
  static inline void output(const F32* m, F32* y) {
    const F32 sum_a = m[1] + m[2], difference_a = float(a) * (m[1] - m[2]);
    const F32 sum_b = m[3] + m[4], difference_b = float(b) * (m[3] - m[4]);
    y[0] = m[0] + sum_a + sum_b;
    y[1] = difference_a + difference_b;
    y[2] = 0.5f * sum_a + 2.0f * sum_b;
    y[3] = 0.5f * difference_a + 2.0f * difference_b;
    y[4] = m[5] + 0.25f * sum_a + 4.0f * sum_b;
  }

  // A: 5 pixels -> 6 points.
  static inline void gradient(const F32* g, F32* z) {
    const F32 even_a = g[0] + 0.5f * g[2] + 0.25f * g[4], odd_a = g[1] + 0.5f * g[3];
    const F32 even_b = g[0] + 2.0f * g[2] + 4.0f * g[4], odd_b = g[1] + 2.0f * g[3];
    z[0] = g[0];
    z[1] = even_a + float(a) * odd_a;
    z[2] = even_a - float(a) * odd_a;
    z[3] = even_b + float(b) * odd_b;
    z[4] = even_b - float(b) * odd_b;
    z[5] = g[4];
  }
};

// G, in double.
template <typename W>
struct FilterMatrix {
  double at[W::points][W::taps];
  constexpr FilterMatrix();
};
// Rows for +p, -p and infinity, n = 2p (p^4 - s p^2 + q):
//
//   |  1/n   p/n   p^2/n   p^3/n  ... |
//   | -1/n   p/n  -p^2/n   p^3/n  ... |
//   |   0     0      0      ...     1 |
template <typename W>
constexpr FilterMatrix<W>::FilterMatrix() : at{} {
  for (int i = 0; i < 3; ++i) {
    const double p2 = W::square(W::p[i]);
    const double norm = 2 * W::p[i] * (p2 * p2 - W::other_sum(i) * p2 + W::other_product(i));
    for (int sign = 0; sign < 2; ++sign) {
      const double p = sign ? -W::p[i] : W::p[i];
      double power = (sign ? -1 : 1) / norm;
      for (int t = 0; t < W::taps; ++t, power *= p) at[2 * i + sign][t] = power;
    }
  }
  at[6][W::taps - 1] = 1;
}
template <>
constexpr FilterMatrix<Winograd52>::FilterMatrix()
    : at{{1, 0},
         {-2.0 / 3, -2.0 / 3 * Winograd52::a},
         {-2.0 / 3, 2.0 / 3 * Winograd52::a},
         {1.0 / 6, 1.0 / 6 * Winograd52::b},
         {1.0 / 6, -1.0 / 6 * Winograd52::b},
         {0, 1}} {}
#if FASTDA_SIMD
template <>
constexpr FilterMatrix<Winograd43>::FilterMatrix()
    : at{{1, 0, 0},
         {-2.0 / 3, -2.0 / 3 * Winograd52::a, -1.0 / 3},
         {-2.0 / 3, 2.0 / 3 * Winograd52::a, -1.0 / 3},
         {1.0 / 6, 1.0 / 6 * Winograd52::b, 1.0 / 3},
         {1.0 / 6, -1.0 / 6 * Winograd52::b, 1.0 / 3},
         {0, 0, 1}} {}
#endif

// A filter larger than `taps` is cut into pieces x pieces of taps x taps; piece i begins at tap i / pieces *
// taps, i % pieces * taps. G piece G' of the channel c and of a vector of outputs from k on, `row` floats
// from row to row of points, `step` from one to the next; zeros past the last output.
template <typename W, typename T>
void filter_points(const ConvArgs& a, int64_t pieces, int64_t i, int64_t c, int64_t k, float* to,
                   int64_t row, int64_t step) {
  constexpr int D = lanes<double>;
  constexpr FilterMatrix<W> G{};
  const int64_t top = i / pieces * W::taps, left = i % pieces * W::taps;
  for (int64_t j0 = 0; j0 < lanes<float>; j0 += D, to += D) {
    const int64_t valid = c < a.in_channels ? max(0, min(D, a.out_channels - k - j0)) : 0;
    Vec<double> half[W::points][W::taps];
    for (int x = 0; x < W::taps; ++x) {
      Vec<double> g[W::taps] = {};
      for (int64_t y = 0; y < (left + x < a.kernel ? min(W::taps, a.kernel - top) : 0); ++y) {
        const T* from = valid > 0 ? at<T>(a.filter, k + j0, c, top + y, left + x) : nullptr;
        for (int64_t j = 0; j < valid; ++j) g[y][j] = double(load(from + j * a.filter.n));
      }
#pragma GCC unroll 7
      for (int p = 0; p < W::points; ++p) {
        half[p][x] = Vec<double>{};
#pragma GCC unroll 5
        for (int y = 0; y < W::taps; ++y) half[p][x] += G.at[p][y] * g[y];
      }
    }
    for (int p = 0; p < W::points; ++p) {
#pragma GCC unroll 7
      for (int q = 0; q < W::points; ++q) {
        Vec<double> u = {};
#pragma GCC unroll 5
        for (int x = 0; x < W::taps; ++x) u += G.at[q][x] * half[p][x];
        float* out = to + p * row + q * step;
        for (int j = 0; j < D; ++j) out[j] = float(u[j]);
      }
    }
  }
}

// What the chunks of a filter's gradient, `bytes` apart, come to together, from element i of each.
inline Vec<double> sum_of_chunks(const char* sums, int64_t count, int64_t bytes, int64_t i) {
  Vec<double> sum = {};
  for (int64_t n = 0; n < count; ++n) {
    const float* from = reinterpret_cast<const float*>(sums + n * bytes) + i;
    for (int j = 0; j < lanes<double>; ++j) sum[j] += double(from[j]);
  }
  return sum;
}

// The transpose: d_filter of that piece; point(p, j) is the gradient of a point, of as many outputs from k + j on
// as a vector of double has. False where something is not finite.
template <typename W, typename T, typename F>
bool store_piece(const FilterGradArgs& a, int64_t pieces, int64_t i, int64_t c, int64_t k,
                 F&& point) {
  constexpr int D = lanes<double>;
  constexpr FilterMatrix<W> G{};
  const int64_t top = i / pieces * W::taps, left = i % pieces * W::taps;
  Vec<double> finite = {};
  for (int64_t j0 = 0; j0 < min(lanes<float>, a.out_channels - k); j0 += D) {
    const int64_t valid = min(D, a.out_channels - k - j0);
    Vec<double> half[W::taps][W::points];
    for (int q = 0; q < W::points; ++q) {
      Vec<double> u[W::points];
#pragma GCC unroll 7
      for (int p = 0; p < W::points; ++p) u[p] = point(p * W::points + q, j0);
#pragma GCC unroll 5
      for (int y = 0; y < W::taps; ++y) {
        half[y][q] = Vec<double>{};
#pragma GCC unroll 7
        for (int p = 0; p < W::points; ++p) half[y][q] += G.at[p][y] * u[p];
      }
    }
    for (int64_t y = 0; y < min(W::taps, a.kernel - top); ++y) {
      for (int64_t x = 0; x < min(W::taps, a.kernel - left); ++x) {
        Vec<double> g = {};
#pragma GCC unroll 7
        for (int q = 0; q < W::points; ++q) g += G.at[q][x] * half[y][q];
        finite += g - g;
        T* to = const_cast<T*>(at<T>(a.d_filter, k + j0, c, top + y, left + x));
        for (int64_t j = 0; j < valid; ++j) store(to + j * a.d_filter.n, float(g[j]));
      }
    }
  }
  double total = 0;
  for (int j = 0; j < D; ++j) total += finite[j];
  return total == 0;
}

}  // namespace
}  // namespace fastda::cpu::FASTDA_ISA
