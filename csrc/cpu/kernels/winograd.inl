// Compiled once per instruction set, with FASTDA_ISA naming it.
//
// A block of groups (six tiles each) goes through three stages, all within the second-level cache:
//
//   input  --B' d B-->  V[group][36][6 tiles][C]  --36 matrix products-->  M[group][36][6][K]  --A' m A-->
//   output
//
// Vectors run over channels throughout: channels_last is read and written as it lies, contiguous tensors are
// turned in registers, VL x VL at a time, on their way in and out. The products keep one 6-tile x (4 or 2
// vectors of output channels) accumulator in registers; point t of every group of the block uses the same C x
// K matrix, which stays in the first-level cache meanwhile. M of point t is written where V of point t - 1
// lay.
#include "cpu/kernels/refiner_conv.h"
#include "cpu/kernels/simd.h"

#if FASTDA_SIMD
#include <unistd.h>
#endif

namespace fastda::cpu::FASTDA_ISA {
#if FASTDA_SIMD
namespace {

constexpr int TILES = 6;                         // per group: rows of the micro-kernel
constexpr int NV = VL == 16 ? 4 : 2;             // vectors of output channels in a micro-kernel
constexpr int RUN = 15;                          // tiles transformed together, neighbours in a row
constexpr int COLUMNS = 4 * RUN + 2 + (VL - 2);  // input columns of a run, room for the last vector's rest

// Interpolation at 0, +-A, +-B, infinity; A B = 1 makes most constants 1, and the error is half that of 0,
// +-1, +-2.
constexpr float A = 0.70710678118654752440f, B = 1.41421356237309504880f;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t padded(int64_t channels) { return round_up(channels, VL); }
// Distance of the C x K matrices of two interpolation points: not a power of two, for the lines of all 36
// would fall into one set of the first-level cache.
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

// [group][slot][tile][channel], one slot per interpolation point. `slot` is an odd number of cache lines, so
// that the 36 lines of one tile fall into different sets.
struct Workspace {
  float* data;
  int64_t channels, slot, group;
  Workspace(float* p, int64_t c, int64_t slots)
      : data(p), channels(c), slot(TILES * c + 16), group(slots * slot) {}
  float* at(int64_t tile, int64_t point) const {
    return data + tile / TILES * group + point * slot + tile % TILES * channels;
  }
};

FASTDA_INLINE void input_1d(const Vec* d, Vec* v) {
  const Vec e1 = fnma(splat(2.0f), d[2], d[4]), o1 = fnma(splat(2.0f), d[1], d[3]);
  const Vec e2 = fnma(splat(0.5f), d[2], d[4]), o2 = fnma(splat(0.5f), d[1], d[3]);
  v[0] = fnma(splat(2.5f), d[2], d[0] + d[4]);
  v[1] = fma(splat(A), o1, e1);
  v[2] = fnma(splat(A), o1, e1);
  v[3] = fma(splat(B), o2, e2);
  v[4] = fnma(splat(B), o2, e2);
  v[5] = fnma(splat(2.5f), d[3], d[1] + d[5]);
}

FASTDA_INLINE void output_1d(const Vec* m, Vec* y) {
  const Vec s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
  y[0] = m[0] + s1 + s2;
  y[1] = splat(A) * fma(splat(2.0f), d2, d1);
  y[2] = fma(splat(0.5f), s1, splat(2.0f) * s2);
  y[3] = fma(splat(A), fma(splat(0.5f), d1, splat(4.0f) * d2), m[5]);
}

// Transpose of output_1d: 4 -> 6.
FASTDA_INLINE void gradient_1d(const Vec* g, Vec* z) {
  const Vec e1 = fma(splat(0.5f), g[2], g[0]), o1 = fma(splat(0.5f), g[3], g[1]);
  const Vec e2 = fma(splat(2.0f), g[2], g[0]), o2 = fma(splat(2.0f), g[3], g[1]);
  z[0] = g[0];
  z[1] = fma(splat(A), o1, e1);
  z[2] = fnma(splat(A), o1, e1);
  z[3] = fma(splat(B), o2, e2);
  z[4] = fnma(splat(B), o2, e2);
  z[5] = g[3];
}

// Filter, 3 -> 6.
FASTDA_INLINE void weight_1d(const Vec* w, Vec* u) {
  const Vec ea = splat(-2.0f / 3) * fma(splat(0.5f), w[2], w[0]), oa = splat(-2.0f / 3 * A) * w[1];
  const Vec eb = splat(1.0f / 6) * fma(splat(2.0f), w[2], w[0]), ob = splat(1.0f / 6 * B) * w[1];
  u[0] = w[0];
  u[1] = ea + oa;
  u[2] = ea - oa;
  u[3] = eb + ob;
  u[4] = eb - ob;
  u[5] = w[2];
}

// Transpose of weight_1d: 6 -> 3.
FASTDA_INLINE void weight_gradient_1d(const Vec* u, Vec* w) {
  const Vec sa = splat(-2.0f / 3) * (u[1] + u[2]), da = splat(-2.0f / 3 * A) * (u[1] - u[2]);
  const Vec sb = splat(1.0f / 6) * (u[3] + u[4]), db = splat(1.0f / 6 * B) * (u[3] - u[4]);
  w[0] = u[0] + sa + sb;
  w[1] = da + db;
  w[2] = u[5] + fma(splat(0.5f), sa, splat(2.0f) * sb);
}

// --- tiles of the input (6 x 6 pixels, overlapping) or of the output's gradient (4 x 4) into the workspace

struct Source {
  View x, gate;
  bool channels_last;
  int64_t channels;
};

// Loads `R` rows from y0 and `columns` columns from x0 of channels [c, c + VL) and hands each column's R
// vectors to `f`. Outside of the image, and past the last channel, zeros. strip: [R][VL][VL] floats.
template <typename T, int R, typename F>
FASTDA_INLINE void each_column(const Source& s, const Grid& grid, int64_t image, int64_t c, int64_t y0,
                               int64_t x0, int64_t columns, float* strip, F&& f) {
  const bool gated = s.gate.data != nullptr;
  const T* x = static_cast<const T*>(s.x.data) + image * s.x.n + c * s.x.c;
  const T* g = static_cast<const T*>(s.gate.data) + (gated ? image * s.gate.n + c * s.gate.c : 0);
  const int64_t sx = s.x.w, sg = s.gate.w;
  const int64_t r0 = y0 < 0 ? -y0 : 0, r1 = min(R, grid.height - y0);
  if (s.channels_last) {
    const int64_t first = max(x0, 0), last = min(x0 + columns, grid.width);
    Vec d[R];
    for (int r = 0; r < R; ++r) d[r] = splat(0.0f);
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
            d[r] = gate(load_vec(x + (y0 + r) * s.x.h + i * sx), load_vec(g + (y0 + r) * s.gate.h + i * sg));
          f(i - x0, d);
        }
      }
    } else {
      const Mask m = lanes(0, s.channels - c);
      for (int64_t i = first; i < last; ++i) {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          d[r] = splat(0.0f);
          if (r < r0 || r >= r1) continue;
          d[r] = load_vec(x + (y0 + r) * s.x.h + i * sx, m);
          if (gated) d[r] = gate(d[r], load_vec(g + (y0 + r) * s.gate.h + i * sg, m));
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
    const Mask m = lanes(first, last);
    for (int r = 0; r < R; ++r) {
      Vec* line = reinterpret_cast<Vec*>(strip + r * VL * VL);
      if (r < r0 || r >= r1) {
        for (int k = 0; k < VL; ++k) line[k] = splat(0.0f);
        continue;
      }
      const T* row = x + (y0 + r) * s.x.h + x0 + i;
      const T* gate_row = gated ? g + (y0 + r) * s.gate.h + x0 + i : nullptr;
      Vec v[VL];
      if (!gated) {
#pragma GCC unroll 16
        for (int k = 0; k < VL; ++k) v[k] = k < channels ? load_vec(row + k * s.x.c, m) : splat(0.0f);
      } else {
#pragma GCC unroll 16
        for (int k = 0; k < VL; ++k)
          v[k] = k < channels ? gate(load_vec(row + k * s.x.c, m), load_vec(gate_row + k * s.gate.c, m))
                              : splat(0.0f);
      }
      transpose(v);
#pragma GCC unroll 16
      for (int k = 0; k < VL; ++k) line[k] = v[k];
    }
    for (int64_t j = 0; j < width; ++j) {
      Vec d[R];
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) d[r] = load_vec(strip + (r * VL + j) * VL);
      f(i + j, d);
    }
  }
}

// Calls f(image, tile row, first tile column, tiles, position in the block) for each run of neighbouring
// tiles.
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
                         int64_t count, int64_t position, int64_t c, const Workspace& v, int64_t first_slot,
                         Scratch& scratch) {
  each_column<T, 6>(s, grid, image, c, row * 4 - 1, col * 4 - 1, count * 4 + 2, scratch.strip,
                    [&](int64_t i, const Vec* d) __attribute__((always_inline)) {
                      Vec t[6];
                      input_1d(d, t);
#pragma GCC unroll 6
                      for (int r = 0; r < 6; ++r) store_vec(scratch.columns + (i * 6 + r) * VL, t[r]);
                    });
  for (int64_t q = 0; q < count; ++q) {
    float* out = v.at(position + q, first_slot) + c;
    const float* in = scratch.columns + q * 4 * 6 * VL;
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      Vec d[6], t[6];
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) d[j] = load_vec(in + (j * 6 + i) * VL);
      input_1d(d, t);
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) store_vec(out + (i * 6 + j) * v.slot, t[j]);
    }
  }
}

template <typename T>
void transform_gradient_run(const Source& s, const Grid& grid, int64_t image, int64_t row, int64_t col,
                            int64_t count, int64_t position, int64_t c, const Workspace& v, double* sums,
                            Scratch& scratch) {
  Vec sum = splat(0.0f);
  each_column<T, 4>(s, grid, image, c, row * 4, col * 4, count * 4, scratch.strip,
                    [&](int64_t i, const Vec* d) __attribute__((always_inline)) {
                      Vec t[6];
                      sum += (d[0] + d[1]) + (d[2] + d[3]);
                      gradient_1d(d, t);
#pragma GCC unroll 6
                      for (int r = 0; r < 6; ++r) store_vec(scratch.columns + (i * 6 + r) * VL, t[r]);
                    });
  alignas(64) float total[VL];
  store_vec(total, sum);
  for (int k = 0; k < VL; ++k) sums[c + k] += double(total[k]);
  for (int64_t q = 0; q < count; ++q) {
    float* out = v.at(position + q, 0) + c;
    const float* in = scratch.columns + q * 4 * 6 * VL;
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      Vec d[4], t[6];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) d[j] = load_vec(in + (j * 6 + i) * VL);
      gradient_1d(d, t);
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) store_vec(out + (i * 6 + j) * v.slot, t[j]);
    }
  }
}

// Visits all runs and channel vectors of a block, in the order in which the tensor's layout lies in memory.
template <typename F>
FASTDA_INLINE void each_run_and_vector(bool channels_last, const Grid& grid, int64_t begin, int64_t end,
                                       int64_t channels, F&& f) {
  if (channels_last) {
    each_run(grid, begin, end, [&](int64_t image, int64_t row, int64_t col, int64_t count, int64_t position) {
      for (int64_t c = 0; c < channels; c += VL) f(image, row, col, count, position, c);
    });
  } else {
    for (int64_t c = 0; c < channels; c += VL)
      each_run(grid, begin, end,
               [&](int64_t image, int64_t row, int64_t col, int64_t count, int64_t position) {
                 f(image, row, col, count, position, c);
               });
  }
}

template <typename T>
void transform_input(const Source& s, const Grid& grid, int64_t begin, int64_t end, const Workspace& v,
                     int64_t first_slot, Scratch& scratch) {
  each_run_and_vector(
      s.channels_last, grid, begin, end, s.channels,
      [&](int64_t image, int64_t row, int64_t col, int64_t count, int64_t position, int64_t c) {
        transform_input_run<T>(s, grid, image, row, col, count, position, c, v, first_slot, scratch);
      });
}

template <typename T>
void transform_gradient(const Source& s, const Grid& grid, int64_t begin, int64_t end, const Workspace& v,
                        double* sums, Scratch& scratch) {
  each_run_and_vector(
      s.channels_last, grid, begin, end, s.channels,
      [&](int64_t image, int64_t row, int64_t col, int64_t count, int64_t position, int64_t c) {
        transform_gradient_run<T>(s, grid, image, row, col, count, position, c, v, sums, scratch);
      });
}

// The last group of the last block has fewer than six tiles: the rest are zeros.
void clear_rest(const Workspace& v, int64_t tiles, int64_t first_slot) {
  for (int64_t tile = tiles; tile < round_up(tiles, TILES); ++tile)
    for (int t = 0; t < 36; ++t)
      for (int64_t c = 0; c < v.channels; c += VL) store_vec(v.at(tile, first_slot + t) + c, splat(0.0f));
}

// Fetches, bit by bit while the products run, what the block's output stage and the next block's input stage
// will touch: they would wait for memory otherwise, and the products leave it idle.
struct Prefetch {
  struct Piece {
    const char* base;
    int64_t rows, row_stride, count, stride, bytes;  // `count` x `rows` segments of `bytes`
  };
  Piece pieces[64];
  int size = 0, piece = 0;
  int64_t row = 0, index = 0, segments = 0;

  void add(const View& x, int64_t size_of, bool channels_last, const Grid& grid, int64_t channels,
           int64_t begin, int64_t end, int64_t below) {
    if (x.data == nullptr) return;
    for (int64_t tile = begin; tile < end && size < 64;) {
      const int64_t tile_row = tile / grid.cols, col = tile % grid.cols,
                    count = min(end - tile, grid.cols - col);
      tile += count;
      const int64_t y = tile_row % grid.rows * 4 + below, width = min(count * 4, grid.width - col * 4);
      Piece& p = pieces[size];
      p.base =
          static_cast<const char*>(x.data) + (tile_row / grid.rows * x.n + y * x.h + col * 4 * x.w) * size_of;
      p.rows = min(4, grid.height - y);
      p.row_stride = x.h * size_of;
      if (channels_last) {
        p.count = count, p.stride = 4 * x.w * size_of, p.bytes = (3 * x.w + channels) * size_of;
        if (width < count * 4) --p.count;  // not past the row's end
      } else {
        p.count = channels, p.stride = x.c * size_of, p.bytes = width * size_of;
        if (x.h == width && p.rows > 0) p.bytes *= p.rows, p.rows = 1;  // the rows touch
      }
      if (p.rows <= 0 || p.count <= 0) continue;
      segments += p.rows * p.count;
      ++size;
    }
  }

  void issue(int64_t wanted) {
    for (; wanted > 0 && piece < size; --wanted) {
      const Piece& p = pieces[piece];
      const char* from = p.base + index * p.stride + row * p.row_stride;
      for (int64_t i = 0; i < p.bytes; i += 64) _mm_prefetch(from + i, _MM_HINT_T1);
      if (++row == p.rows) {
        row = 0;
        if (++index == p.count) index = 0, ++piece;
      }
    }
  }
};

// --- 36 matrix products

// m[6][N vectors] = v[6][C] u[C][N vectors]. Meanwhile `ahead` floats from `next` are fetched for each input
// channel: the next group's panel, or a piece of the next point's matrix.
template <int N>
[[gnu::noinline]] void multiply(const float* v, int64_t v_stride, const float* u, int64_t C, float* m,
                                int64_t m_stride, const float* next, int64_t ahead) {
  Vec acc[TILES][N];
#pragma GCC unroll 6
  for (int r = 0; r < TILES; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[r][n] = splat(0.0f);
  const float* w = v + 3 * v_stride;
  for (int64_t c = 0; c < C; ++c) {
    Vec b[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) b[n] = load_vec(u + n * VL);
    for (int64_t i = 0; i < ahead; i += 16)
      _mm_prefetch(reinterpret_cast<const char*>(next + i), _MM_HINT_T0);
#pragma GCC unroll 6
    for (int r = 0; r < TILES; ++r) {
      Vec a = splat(r < 3 ? v[r * v_stride] : w[(r - 3) * v_stride]);
      asm("" : "+v"(a));  // one broadcast for N products, not N products that each load it
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = fma(a, b[n], acc[r][n]);
    }
    ++v, ++w;
    u += N * VL;
    next += ahead;
  }
#pragma GCC unroll 6
  for (int r = 0; r < TILES; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store_vec(m + r * m_stride + n * VL, acc[r][n]);
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

void multiply_all(const Workspace& v, const Workspace& m, int64_t groups, const float* weights, int64_t C,
                  int64_t K, Prefetch& prefetch) {
  const int64_t vectors = ceil_div(K, VL);
  const int64_t share = ceil_div(prefetch.segments, 36 * groups * ceil_div(vectors, NV));
  for (int t = 0; t < 36; ++t) {
    const float* u = weights + t * matrix_floats(C, K);
    each_panel(vectors, [&]<int N>(Width<N>, int64_t first) {
      const float* panel = u + first * VL * C;
      for (int64_t g = 0; g < groups; ++g) {
        const float* from = v.data + g * v.group + (t + 1) * v.slot;
        const bool last = g + 1 == groups;
        multiply<N>(from, v.channels, panel, C, m.data + g * m.group + t * m.slot + first * VL, m.channels,
                    last ? panel + C * N * VL : from + v.group, last ? N * VL : TILES);
        prefetch.issue(share);
      }
    });
  }
}

// --- output

// The epilogue's operands at one pixel (channels_last) or one channel's row (contiguous): `in` elements from
// p.
template <typename T>
struct Epilogue {
  const T *residual, *residual_gate, *output_gate;
  T* output;
  Vec low;

  template <typename... M>
  [[gnu::always_inline]] inline Vec apply(Vec x, int64_t at_residual, int64_t at_residual_gate,
                                          int64_t at_output_gate, M... m) const {
    if (residual) {
      Vec r = load_vec(residual + at_residual, m...);
      if (residual_gate) r = gate(r, load_vec(residual_gate + at_residual_gate, m...));
      x = x + r;
    }
    x = clamp_min(x, low);
    if (output_gate) x = gate(x, load_vec(output_gate + at_output_gate, m...));
    return x;
  }
};

// 36 points of one tile, VL channels -> 4 x 4 pixels.
FASTDA_INLINE void output_tile(const float* m, int64_t slot, Vec (*y)[4], Vec& finite) {
  Vec s[4][6];
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) {
    Vec d[6], t[4];
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) d[i] = load_vec(m + (i * 6 + j) * slot);
    output_1d(d, t);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) s[i][j] = t[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) output_1d(s[i], y[i]);
  finite = fma((y[0][0] + y[0][3]) + (y[3][0] + y[3][3]), splat(0.0f), finite);
}

// `finite` stays zero where every value of the block is finite, and becomes NaN otherwise: what is not finite
// in the 36 points shows in the corners of the 4 x 4 pixels.
template <typename T>
void output_run(const ConvArgs& p, const Grid& grid, int64_t image, int64_t row, int64_t col, int64_t count,
                int64_t position, int64_t k, const Workspace& m, Scratch& scratch, Vec& finite) {
  const auto base = [&](const View& v) {
    return v.data ? static_cast<T*>(v.data) + image * v.n + k * v.c + row * 4 * v.h + col * 4 * v.w : nullptr;
  };
  const View &vr = p.residual, &vq = p.residual_gate, &vg = p.out_gate, &vo = p.out;
  const Epilogue<T> e{base(vr), base(vq), base(vg), base(vo), splat(p.relu ? 0.0f : -__builtin_inff())};
  const T* bias = static_cast<const T*>(p.bias);
  const int64_t channels = min(VL, p.out_channels - k), rows = min(4, grid.height - row * 4);
  const int64_t width = min(count * 4, grid.width - col * 4);

  if (p.channels_last) {
    const Mask mask = lanes(0, channels);
    const Vec b = bias ? load_vec(bias + k, mask) : splat(0.0f);
    for (int64_t q = 0; q < count; ++q) {
      Vec y[4][4];
      output_tile(m.at(position + q, 0) + k, m.slot, y, finite);
      if (channels == VL && rows == 4 && width >= q * 4 + 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {
            const int64_t x = q * 4 + j;
            store_vec(e.output + i * vo.h + x * vo.w,
                      e.apply(y[i][j] + b, i * vr.h + x * vr.w, i * vq.h + x * vq.w, i * vg.h + x * vg.w));
          }
      } else {
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < min(4, width - q * 4); ++j) {
            const int64_t x = q * 4 + j;
            store_vec(
                e.output + i * vo.h + x * vo.w,
                e.apply(y[i][j] + b, i * vr.h + x * vr.w, i * vq.h + x * vq.w, i * vg.h + x * vg.w, mask),
                mask);
          }
      }
    }
    return;
  }

  for (int64_t q = 0; q < count; q += VL / 4) {
    float* pixels = scratch.columns;  // [4 rows][VL pixels][VL channels]
    for (int64_t a = 0; a < min(VL / 4, count - q); ++a) {
      Vec y[4][4];
      output_tile(m.at(position + q + a, 0) + k, m.slot, y, finite);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) store_vec(pixels + ((i * VL) + a * 4 + j) * VL, y[i][j]);
    }
    const Mask mask = lanes(0, width - q * 4);
    for (int64_t i = 0; i < rows; ++i) {
      Vec v[VL];
#pragma GCC unroll 16
      for (int j = 0; j < VL; ++j) v[j] = load_vec(pixels + (i * VL + j) * VL);
      transpose(v);
      const int64_t x = q * 4;
#pragma GCC unroll 16
      for (int c = 0; c < VL; ++c) {
        if (c >= channels) break;
        const Vec b = bias ? splat(load(bias + k + c)) : splat(0.0f);
        store_vec(e.output + i * vo.h + x + c * vo.c,
                  e.apply(v[c] + b, i * vr.h + x + c * vr.c, i * vq.h + x + c * vq.c, i * vg.h + x + c * vg.c,
                          mask),
                  mask);
      }
    }
  }
}

template <typename T>
bool transform_output(const ConvArgs& p, const Grid& grid, int64_t begin, int64_t end, const Workspace& m,
                      Scratch& scratch) {
  Vec finite = splat(0.0f);
  each_run_and_vector(
      p.channels_last, grid, begin, end, p.out_channels,
      [&](int64_t image, int64_t row, int64_t col, int64_t count, int64_t position, int64_t k) {
        output_run<T>(p, grid, image, row, col, count, position, k, m, scratch, finite);
      });
  return all_zero(finite);
}

// --- the table's functions

int64_t cache_floats() {
  static const int64_t floats = [] {
#ifdef _SC_LEVEL2_CACHE_SIZE
    const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
    const long bytes = 0;
#endif
    return int64_t(bytes > 0 ? bytes : 1 << 20) / 4;
  }();
  return floats;
}

// Groups per block: enough to use each point's matrix several times, few enough for the workspace to take a
// fifth of the second-level cache. The weights take more than a quarter, and the tensors stream through the
// rest.
int64_t block_groups(int64_t group_floats) {
  return max(4, min(21, cache_floats() * 22 / 100 / group_floats));
}

// Few channels leave the transforms alone at work, and a map of less than a tile is mostly padding.
bool serves(DType dtype, int64_t in_channels, int64_t out_channels, int64_t height, int64_t width,
            int64_t kernel) {
  return kernel == 3 && dtype != DType::f64 && in_channels >= 16 && out_channels >= 16 && height >= 4 &&
         width >= 4;
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

// Offset of the vector's column within one point's matrix, and the distance of its rows.
void panel_of(int64_t vector, int64_t vectors, int64_t C, int64_t& offset, int64_t& stride) {
  const int64_t first = vector / NV * NV;
  stride = min(NV, vectors - first) * VL;
  offset = first * VL * C + (vector - first) * VL;
}

// Blocks of a convolution, near `step` groups each.
struct Blocks {
  Grid grid;
  int64_t group_floats, step, count;
  explicit Blocks(const ConvArgs& p) : grid(p.batch, p.height, p.width) {
    group_floats = Workspace(nullptr, max(padded(p.in_channels), padded(p.out_channels)), 37).group;
    step = block_groups(group_floats);
    count = ceil_div(grid.groups, step);
  }
  int64_t begin(int64_t block) const { return min(grid.groups * block / count * TILES, grid.tiles); }
};

int64_t prepared_bytes(const ConvArgs& p) { return 4 * 36 * matrix_floats(p.in_channels, p.out_channels); }

template <typename T>
void transform_filter(const ConvArgs& p, const View& filter, float* prepared) {
  const int64_t inputs = p.in_channels, outputs = p.out_channels, vectors = ceil_div(outputs, VL);
  const int64_t size = matrix_floats(inputs, outputs);
  for (int64_t v = 0; v < vectors; ++v) {
    int64_t offset, stride;
    panel_of(v, vectors, inputs, offset, stride);
    for (int64_t c = 0; c < inputs; ++c) {
      alignas(64) float taps[9][VL] = {};
      for (int64_t k = 0; k < min(VL, outputs - v * VL); ++k) {
        const T* from = static_cast<const T*>(filter.data) + (v * VL + k) * filter.n + c * filter.c;
        for (int r = 0; r < 3; ++r)
          for (int s = 0; s < 3; ++s) taps[r * 3 + s][k] = load(from + r * filter.h + s * filter.w);
      }
      Vec half[6][3];
      for (int s = 0; s < 3; ++s) {
        Vec d[3], u[6];
        for (int r = 0; r < 3; ++r) d[r] = load_vec(taps[r * 3 + s]);
        weight_1d(d, u);
        for (int i = 0; i < 6; ++i) half[i][s] = u[i];
      }
      for (int i = 0; i < 6; ++i) {
        Vec u[6];
        weight_1d(half[i], u);
        for (int j = 0; j < 6; ++j) store_vec(prepared + (i * 6 + j) * size + offset + c * stride, u[j]);
      }
    }
  }
}
void prepare_filter(const ConvArgs& p, const View& filter, void* prepared) {
  with_type(p.dtype, [&]<typename T>() { transform_filter<T>(p, filter, static_cast<float*>(prepared)); });
}

int64_t conv_scratch_bytes(const ConvArgs& p) {
  const Blocks blocks(p);
  return int64_t(sizeof(Scratch)) + 4 * min(blocks.grid.groups, blocks.step) * blocks.group_floats;
}
int64_t conv_tasks(const ConvArgs& p) { return Blocks(p).count; }

template <typename T>
bool conv_block(const ConvArgs& p, int64_t task, void* workspace) {
  const Blocks blocks(p);
  const Grid& grid = blocks.grid;
  Scratch& scratch = *static_cast<Scratch*>(workspace);
  float* data = reinterpret_cast<float*>(&scratch + 1);
  // Both lie in the same slots; their own numbers of channels set the distance of the tiles alone.
  Workspace v(data, max(padded(p.in_channels), padded(p.out_channels)), 37), m = v;
  v.channels = padded(p.in_channels);
  m.channels = padded(p.out_channels);
  const Source source{p.x, p.x_gate, p.channels_last, p.in_channels};
  const int64_t begin = blocks.begin(task), end = blocks.begin(task + 1);
  transform_input<T>(source, grid, begin, end, v, 1, scratch);
  clear_rest(v, end - begin, 1);
  Prefetch prefetch;
  const View* const outputs[] = {&p.residual, &p.residual_gate, &p.out_gate, &p.out};
  for (const View* x : outputs)
    prefetch.add(*x, sizeof(T), p.channels_last, grid, p.out_channels, begin, end, 0);
  const int64_t next = task + 1 < blocks.count ? blocks.begin(task + 2) : end;
  const View* const inputs[] = {&p.x, &p.x_gate};
  for (const View* x : inputs)
    prefetch.add(*x, sizeof(T), p.channels_last, grid, p.in_channels, end, next, 1);
  multiply_all(v, m, ceil_div(end - begin, TILES), static_cast<const float*>(p.prepared), p.in_channels,
               p.out_channels, prefetch);
  return transform_output<T>(p, grid, begin, end, m, scratch);
}
bool conv(const ConvArgs& p, int64_t task, void* scratch) {
  bool finite = false;
  with_type(p.dtype, [&]<typename T>() { finite = conv_block<T>(p, task, scratch); });
  return finite;
}

// --- weight gradient

// u[R][N vectors] += sum over groups and tiles of v[tile][R] z[tile][N vectors]. On the way, the accumulators
// of the next R rows are fetched, and this call's share of the next point's v and z (`line` of z's N lines).
template <int R, int N>
[[gnu::noinline]] void accumulate(const float* v, const Workspace& vs, const float* z, const Workspace& zs,
                                  int64_t groups, int64_t line, float* u, bool first) {
  Vec acc[R][N];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[r][n] = first ? splat(0.0f) : load_vec(u + (r * N + n) * VL);
  const char* next = reinterpret_cast<const char*>(u + R * N * VL);
  const int64_t v_stride = vs.channels, z_stride = zs.channels;
  for (int64_t g = 0; g < groups; ++g) {
    const float *vq = v + g * vs.group, *zq = z + g * zs.group;
    for (int q = 0; q < TILES; ++q) {
      Vec b[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) b[n] = load_vec(zq + n * VL);
      _mm_prefetch(next, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(vq + vs.slot), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(zq + zs.slot + line * 16), _MM_HINT_T0);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        Vec a = splat(vq[r]);
        asm("" : "+v"(a));
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

void accumulate_all(const Workspace& v, const Workspace& z, int64_t groups, float* partial, int64_t C,
                    int64_t K, bool first, Prefetch& prefetch) {
  const int64_t vectors = ceil_div(K, VL);
  const int64_t share = ceil_div(prefetch.segments, 36 * ceil_div(C, 6) * ceil_div(vectors, NV));
  for (int t = 0; t < 36; ++t) {
    each_panel(vectors, [&]<int N>(Width<N>, int64_t vector) {
      float* u = partial + t * matrix_floats(C, K) + vector * VL * C;
      const float *vt = v.data + t * v.slot, *zt = z.data + t * z.slot + vector * VL;
      const auto rows = [&]<int R>(Width<R>, int64_t c) {
        accumulate<R, N>(vt + c, v, zt, z, groups, c / 6 % N * VL / 16, u + c * N * VL, first);
        prefetch.issue(share);
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
    });
  }
}

int64_t chunks(const FilterGradArgs& p) {
  return max(1, min(8, Grid(p.batch, p.height, p.width).groups / 32));
}
// The bias' sums are doubles, behind the filter's.
int64_t sum_floats(const FilterGradArgs& p) {
  return 36 * matrix_floats(p.in_channels, p.out_channels) + 2 * padded(p.out_channels);
}
int64_t sum_bytes(const FilterGradArgs& p) { return 4 * sum_floats(p); }

int64_t grad_group_floats(const FilterGradArgs& p) {
  return Workspace(nullptr, padded(p.in_channels), 36).group +
         Workspace(nullptr, padded(p.out_channels), 36).group;
}
int64_t filter_grad_scratch_bytes(const FilterGradArgs& p) {
  const int64_t group = grad_group_floats(p);
  return int64_t(sizeof(Scratch)) + 4 * block_groups(group) * group;
}

template <typename T>
void grad_chunk(const FilterGradArgs& p, int64_t chunk, float* partial, void* workspace) {
  const Grid grid(p.batch, p.height, p.width);
  const int64_t count = chunks(p), step = block_groups(grad_group_floats(p));
  const int64_t group_begin = grid.groups * chunk / count, group_end = grid.groups * (chunk + 1) / count;
  Scratch& scratch = *static_cast<Scratch*>(workspace);
  const Workspace v(reinterpret_cast<float*>(&scratch + 1), padded(p.in_channels), 36);
  const Workspace z(v.data + step * v.group, padded(p.out_channels), 36);
  double* sums = reinterpret_cast<double*>(partial + 36 * matrix_floats(p.in_channels, p.out_channels));
  for (int64_t k = 0; k < padded(p.out_channels); ++k) sums[k] = 0;
  const Source input{p.x, {}, p.channels_last, p.in_channels};
  const Source grad{p.grad, p.grad_gate, p.channels_last, p.out_channels};
  const int64_t blocks = ceil_div(group_end - group_begin, step);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = group_begin + (group_end - group_begin) * b / blocks;
    const int64_t last = group_begin + (group_end - group_begin) * (b + 1) / blocks;
    const int64_t begin = first * TILES, end = min(last * TILES, grid.tiles);
    transform_input<T>(input, grid, begin, end, v, 0, scratch);
    transform_gradient<T>(grad, grid, begin, end, z, sums, scratch);
    clear_rest(v, end - begin, 0);
    clear_rest(z, end - begin, 0);
    Prefetch prefetch;
    const int64_t next = min(end + (end - begin), min(group_end * TILES, grid.tiles));
    prefetch.add(p.x, sizeof(T), p.channels_last, grid, p.in_channels, end, next, 1);
    const View* const grads[] = {&p.grad, &p.grad_gate};
    for (const View* x : grads)
      prefetch.add(*x, sizeof(T), p.channels_last, grid, p.out_channels, end, next, 0);
    accumulate_all(v, z, last - first, partial, p.in_channels, p.out_channels, b == 0, prefetch);
  }
}
void filter_grad(const FilterGradArgs& p, int64_t chunk, void* sums, void* scratch) {
  with_type(p.dtype, [&]<typename T>() { grad_chunk<T>(p, chunk, static_cast<float*>(sums), scratch); });
}

template <typename T>
bool combine_chunks(const FilterGradArgs& p, const float* partials, const View& d_filter, T* d_bias) {
  const int64_t C = p.in_channels, K = p.out_channels, vectors = ceil_div(K, VL), size = matrix_floats(C, K);
  const int64_t distance = sum_floats(p), count = chunks(p);
  if (d_bias) {
    for (int64_t k = 0; k < K; ++k) {
      double sum = 0;
      for (int64_t i = 0; i < count; ++i)
        sum += reinterpret_cast<const double*>(partials + i * distance + 36 * size)[k];
      store(d_bias + k, float(sum));
    }
  }
  Vec finite = splat(0.0f);
  for (int64_t vector = 0; vector < vectors; ++vector) {
    int64_t offset, stride;
    panel_of(vector, vectors, C, offset, stride);
    for (int64_t c = 0; c < C; ++c) {
      Vec half[3][6];
      for (int j = 0; j < 6; ++j) {
        Vec u[6], w[3];
        for (int i = 0; i < 6; ++i) {
          const float* from = partials + (i * 6 + j) * size + offset + c * stride;
          u[i] = load_vec(from);
          for (int64_t n = 1; n < count; ++n) u[i] = u[i] + load_vec(from + n * distance);
        }
        weight_gradient_1d(u, w);
        for (int r = 0; r < 3; ++r) half[r][j] = w[r];
      }
      alignas(64) float taps[9][VL];
      for (int r = 0; r < 3; ++r) {
        Vec w[3];
        weight_gradient_1d(half[r], w);
        for (int s = 0; s < 3; ++s) {
          store_vec(taps[r * 3 + s], w[s]);
          finite = fma(w[s], splat(0.0f), finite);
        }
      }
      for (int64_t k = 0; k < min(VL, K - vector * VL); ++k) {
        T* to = static_cast<T*>(d_filter.data) + (vector * VL + k) * d_filter.n + c * d_filter.c;
        for (int r = 0; r < 3; ++r)
          for (int s = 0; s < 3; ++s) store(to + r * d_filter.h + s * d_filter.w, taps[r * 3 + s][k]);
      }
    }
  }
  return all_zero(finite);
}
bool combine(const FilterGradArgs& p, const void* sums, const View& d_filter, void* d_bias) {
  bool finite = false;
  with_type(p.dtype, [&]<typename T>() {
    finite = combine_chunks<T>(p, static_cast<const float*>(sums), d_filter, static_cast<T*>(d_bias));
  });
  return finite;
}

}  // namespace

extern const ConvKernels winograd;
const ConvKernels winograd = {
    serves,  prepared_bytes, prepare_filter, conv_scratch_bytes,        conv_tasks,
    conv,    chunks,         sum_bytes,      filter_grad_scratch_bytes, filter_grad,
    combine,
};

#else

extern const ConvKernels winograd;
const ConvKernels winograd = {};

#endif
}  // namespace fastda::cpu::FASTDA_ISA
