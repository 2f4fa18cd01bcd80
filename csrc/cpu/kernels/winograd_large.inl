// Compiled once per instruction set, with FASTDA_ISA naming it.
//
// Filters of 7 x 7 and more by Winograd F(4x4, 4x4) in pieces. The filter is cut into pieces of 4 x
// 4 taps; a piece's offset, a multiple of 4, is also the distance of the output tiles, so the
// transformed input of one tile serves all pieces: for every one of the 49 points,
//
//   M[tile][k] = sum over pieces and channels of V[tile + piece][c] * U[piece][c][k],
//
// which is the direct kernels' product on the grid of tiles, with pieces for taps. A 7 x 7 filter
// costs 12.25 products per output instead of 49. A task is a block of tiles; its V and M stay near
// the second-level cache:
//
//   x block with halo -> packed [pixel][channel] -> V [49][tile][channel] -> M [49][tile][channel]
//   -> sums [pixel][channel] -> epilogue
#include "cpu/kernels/blocks.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

constexpr int TILE = 4, TAPS = 4, POINTS = 7;
using V = Vec<float>;

// Interpolation at +-P[0], +-P[1], +-P[2], infinity; the values were searched for the least error.
constexpr double P[3] = {0.3, 0.9, 1.9};
constexpr double sq(double x) { return x * x; }
// For the pair i: sum and product of the squares of the other two.
constexpr double other_sum(int i) { return sq(P[(i + 1) % 3]) + sq(P[(i + 2) % 3]); }
constexpr double other_product(int i) { return sq(P[(i + 1) % 3]) * sq(P[(i + 2) % 3]); }

inline void input_1d(const V* d, V* v) {
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const V even = d[4] - float(other_sum(i)) * d[2] + float(other_product(i)) * d[0];
    const V odd = d[5] - float(other_sum(i)) * d[3] + float(other_product(i)) * d[1];
    v[2 * i] = odd + float(P[i]) * even;
    v[2 * i + 1] = odd - float(P[i]) * even;
  }
  constexpr double s1 = sq(P[0]) + other_sum(0), s2 = sq(P[0]) * other_sum(0) + other_product(0);
  v[6] = d[6] - float(s1) * d[4] + float(s2) * d[2] - float(sq(P[0]) * other_product(0)) * d[0];
}
inline void output_1d(const V* m, V* y) {
  y[0] = y[1] = y[2] = V{};
  y[3] = m[6];
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const V sum = m[2 * i] + m[2 * i + 1], difference = m[2 * i] - m[2 * i + 1];
    y[0] += sum;
    y[1] += float(P[i]) * difference;
    y[2] += float(sq(P[i])) * sum;
    y[3] += float(sq(P[i]) * P[i]) * difference;
  }
}
// Transpose of output_1d: 4 -> 7.
inline void gradient_1d(const V* g, V* z) {
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const V even = g[0] + float(sq(P[i])) * g[2], odd = g[1] + float(sq(P[i])) * g[3];
    z[2 * i] = even + float(P[i]) * odd;
    z[2 * i + 1] = even - float(P[i]) * odd;
  }
  z[6] = g[3];
}

// 4 taps -> 7 points.
struct FilterMatrix {
  double at[POINTS][TAPS];
  constexpr FilterMatrix() : at{} {
    for (int i = 0; i < 3; ++i) {
      const double p2 = sq(P[i]),
                   norm = 2 * P[i] * (p2 * p2 - other_sum(i) * p2 + other_product(i));
      for (int sign = 0; sign < 2; ++sign) {
        const double p = sign ? -P[i] : P[i];
        double power = (sign ? -1 : 1) / norm;
        for (int t = 0; t < TAPS; ++t, power *= p) at[2 * i + sign][t] = power;
      }
    }
    at[6][3] = 1;
  }
};
constexpr FilterMatrix G;

// A block of output tiles, and the grid of input tiles that it takes: `pieces` - 1 more each way.
// Tile q of the grid has q / columns and q % columns; products run over its first `pixels` tiles,
// those of the output and the few between them.
struct Tiles {
  Block block;
  int64_t pieces, rows, columns, pixels;
};

template <typename Args>
struct Layout {
  int64_t pieces, high, wide, c, k;
  Cut cuts;
  explicit Layout(const Args& a)
      : pieces(ceil_div(a.kernel, TAPS)),
        high(ceil_div(a.height, TILE)),
        wide(ceil_div(a.width, TILE)),
        c(padded<float>(a.in_channels)),
        k(padded<float>(a.out_channels)),
        cuts(cut(a.batch, high, wide, POINTS * POINTS * (c + k) * int64_t(sizeof(float)),
                 1600 << 10)) {}

  int64_t taps() const { return pieces * pieces; }
  int64_t filter() const { return taps() * c * k; }  // floats of one point
  int64_t grid() const { return (cuts.rows + pieces - 1) * (cuts.columns + pieces - 1); }
  // Rows of V and M of one point; the micro-kernel runs past the end by up to max_rows.
  int64_t v_rows() const { return grid() + max_rows; }
  int64_t m_rows() const { return cuts.rows * (cuts.columns + pieces - 1) + max_rows; }
  int64_t packed() const {
    return (TILE * (cuts.rows + pieces) + TAPS) * (TILE * (cuts.columns + pieces) + TAPS) *
           max(c, k);
  }
  Tiles tiles(int64_t task) const {
    const Block b = cuts.block(task, high, wide);
    const int64_t columns = b.columns + pieces - 1;
    return {b, pieces, b.rows + pieces - 1, columns, (b.rows - 1) * columns + b.columns};
  }
  void offsets(const Tiles& t, int64_t* offset) const {
    for (int64_t i = 0; i < taps(); ++i) offset[i] = (i / pieces * t.columns + i % pieces) * c;
  }
};

// V[point][tile of the grid][c], `step` floats from point to point.
template <typename T, typename Args>
void transform_input(const Args& a, const View& gate, const Layout<Args>& layout, const Tiles& t,
                     float* packed, float* v, int64_t step) {
  const int64_t p = a.kernel / 2, c = layout.c;
  const int64_t rows = TILE * t.rows + TAPS - 1, columns = TILE * t.columns + TAPS - 1;
  pack<T, float>(a.x, gate, a.x_channels_last, a.in_channels, a.height, a.width,
                 {t.block.n, TILE * t.block.h - p, TILE * t.block.w - p, rows, columns}, packed, c);
  for (int64_t q = 0; q < t.rows * t.columns; ++q) {
    const float* from = packed + (q / t.columns * TILE * columns + q % t.columns * TILE) * c;
    for (int64_t i = 0; i < c; i += lanes<float>) {
      V half[POINTS][POINTS];
      for (int x = 0; x < POINTS; ++x) {
        V d[POINTS], u[POINTS];
#pragma GCC unroll 7
        for (int y = 0; y < POINTS; ++y) d[y] = load_vec(from + (y * columns + x) * c + i);
        input_1d(d, u);
#pragma GCC unroll 7
        for (int y = 0; y < POINTS; ++y) half[y][x] = u[y];
      }
      float* to = v + q * c + i;
      for (int y = 0; y < POINTS; ++y, to += POINTS * step) {
        V u[POINTS];
        input_1d(half[y], u);
#pragma GCC unroll 7
        for (int x = 0; x < POINTS; ++x) store_vec(to + x * step, u[x]);
      }
    }
  }
}

// M[point][tile][k] -> sums[pixel][k]. False where some value is not finite: that shows in the
// corners.
bool transform_output(const Tiles& t, const float* m, int64_t step, int64_t k, float* sums) {
  const int64_t columns = TILE * t.block.columns;
  V finite = {};
  for (int64_t row = 0; row < t.block.rows; ++row) {
    for (int64_t column = 0; column < t.block.columns; ++column) {
      const float* from = m + (row * t.columns + column) * k;
      float* to = sums + (row * TILE * columns + column * TILE) * k;
      for (int64_t i = 0; i < k; i += lanes<float>) {
        V half[TILE][POINTS];
        for (int x = 0; x < POINTS; ++x) {
          V d[POINTS], y[TILE];
#pragma GCC unroll 7
          for (int p = 0; p < POINTS; ++p) d[p] = load_vec(from + (p * POINTS + x) * step + i);
          output_1d(d, y);
#pragma GCC unroll 4
          for (int p = 0; p < TILE; ++p) half[p][x] = y[p];
        }
        for (int p = 0; p < TILE; ++p) {
          V y[TILE];
          output_1d(half[p], y);
          finite += (y[0] + y[3]) * 0.0f;
#pragma GCC unroll 4
          for (int x = 0; x < TILE; ++x) store_vec(to + (p * columns + x) * k + i, y[x]);
        }
      }
    }
  }
  float total = 0;
  for (int i = 0; i < lanes<float>; ++i) total += finite[i];
  return total == 0;
}

// Where the last pieces are nearly full: 7 x 7, 11 x 11, … Others save less, at the same error of a
// piece. And where products are fused with sums, without which the error is near its
// bound.
bool serves(DType dtype, int64_t, int64_t in_channels, int64_t out_channels, int64_t height,
            int64_t width, int64_t kernel) {
  return fused_multiply_add && kernel >= 7 && kernel % TAPS == TAPS - 1 && dtype != DType::f64 &&
         in_channels >= 16 && out_channels >= 16 && min(height, width) >= 2 * TILE;
}

// Calls f.operator()<T>() with the element type: anything but double.
template <typename F>
decltype(auto) with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16: return f.template operator()<bf16>();
    case DType::f16: return f.template operator()<f16>();
    default: return f.template operator()<float>();
  }
}

int64_t prepared_bytes(const ConvArgs& a) {
  return POINTS * POINTS * Layout(a).filter() * int64_t(sizeof(float));
}
// [point][panel][piece][c][k in panel]
template <typename T>
void transform_filter(const ConvArgs& a, float* out) {
  constexpr int L = lanes<float>;
  const Layout layout(a);
  for (int64_t k0 = 0; k0 < layout.k;) {
    const int64_t width = panel_width<float>(k0, layout.k) * L;
    for (int64_t i = 0; i < layout.taps(); ++i) {
      for (int64_t c = 0; c < layout.c; ++c) {
        float* to = out + k0 * layout.taps() * layout.c + (i * layout.c + c) * width;
        for (int64_t k = 0; k < width; k += L) {
          double half[POINTS][TAPS][L] = {};
          for (int y = 0; y < TAPS; ++y) {
            for (int x = 0; x < TAPS; ++x) {
              const int64_t h = i / layout.pieces * TAPS + y, w = i % layout.pieces * TAPS + x;
              double g[L] = {};
              for (int64_t j = 0; j < min(L, a.out_channels - k0 - k); ++j)
                if (h < a.kernel && w < a.kernel && c < a.in_channels)
                  g[j] = double(load(at<T>(a.filter, k0 + k + j, c, h, w)));
              for (int p = 0; p < POINTS; ++p)
                for (int j = 0; j < L; ++j) half[p][x][j] += G.at[p][y] * g[j];
            }
          }
          for (int p = 0; p < POINTS * POINTS; ++p) {
            for (int j = 0; j < L; ++j) {
              double u = 0;
              for (int x = 0; x < TAPS; ++x) u += G.at[p % POINTS][x] * half[p / POINTS][x][j];
              to[p * layout.filter() + k + j] = float(u);
            }
          }
        }
      }
    }
    k0 += width;
  }
}
void prepare(const ConvArgs& a, void* prepared) {
  with_type(a.dtype, [&]<typename T>() { transform_filter<T>(a, static_cast<float*>(prepared)); });
}

int64_t conv_scratch_bytes(const ConvArgs& a) {
  const Layout l(a);
  return carved<float>(l.packed()) + carved<float>(POINTS * POINTS * l.v_rows() * l.c) +
         carved<float>(POINTS * POINTS * l.m_rows() * l.k) + carved<int64_t>(l.taps());
}
int64_t conv_tasks(const ConvArgs& a) { return Layout(a).cuts.tasks; }

template <typename T>
bool conv_block(const ConvArgs& a, int64_t task, char* scratch) {
  const Layout layout(a);
  const Tiles t = layout.tiles(task);
  float* packed = carve<float>(scratch, layout.packed());
  const int64_t v_step = layout.v_rows() * layout.c, m_step = layout.m_rows() * layout.k;
  float* v = carve<float>(scratch, POINTS * POINTS * v_step);
  float* m = carve<float>(scratch, POINTS * POINTS * m_step);
  int64_t* offset = carve<int64_t>(scratch, layout.taps());
  layout.offsets(t, offset);
  transform_input<T>(a, a.x_gate, layout, t, packed, v, v_step);
  // The products run on into rows that nobody asked for. What lay there may be subnormal: very slow
  // on Intel.
  const int64_t rows = t.rows * t.columns;
  for (int p = 0; p < POINTS * POINTS; ++p)
    for (int64_t i = 0; i < max_rows * layout.c; ++i) v[p * v_step + rows * layout.c + i] = 0;
  for (int p = 0; p < POINTS * POINTS; ++p)
    multiply<float>(v + p * v_step, layout.c, t.pixels, offset, layout.taps(), layout.c,
                    static_cast<const float*>(a.prepared) + p * layout.filter(), layout.k,
                    m + p * m_step);
  float* sums = packed;  // which nobody needs any more
  const bool finite = transform_output(t, m, m_step, layout.k, sums);
  const int64_t h = TILE * t.block.h, w = TILE * t.block.w;
  epilogue<T, float>(a, sums, TILE * t.block.columns, layout.k,
                     {t.block.n, h, w, min(TILE * t.block.rows, a.height - h),
                      min(TILE * t.block.columns, a.width - w)});
  return finite;
}
bool conv(const ConvArgs& a, int64_t task, void* scratch) {
  return with_type(
      a.dtype, [&]<typename T>() { return conv_block<T>(a, task, static_cast<char*>(scratch)); });
}

// Filter gradient: for every point, dU[piece][c][k] = sum over tiles of V[tile + piece][c] *
// Z[tile][k].

int64_t sum_bytes(const FilterGradArgs& a) {
  const Layout l(a);
  return carved<float>(POINTS * POINTS * l.filter()) + carved<double>(l.k);
}
int64_t chunks(const FilterGradArgs& a) {
  return min(Layout(a).cuts.tasks, max(4, min(16, (8 << 20) / sum_bytes(a))));
}
int64_t filter_grad_scratch_bytes(const FilterGradArgs& a) {
  const Layout l(a);
  return carved<float>(l.packed()) + carved<float>(POINTS * POINTS * l.v_rows() * l.c) +
         carved<float>(POINTS * POINTS * l.m_rows() * l.k) + carved<int64_t>(l.taps());
}

// Z[point][tile of the grid][k], zero in the tiles between those of the output.
template <typename T>
void transform_gradient(const FilterGradArgs& a, const Tiles& t, int64_t k, float* packed, float* z,
                        int64_t step, double* bias) {
  const int64_t rows = TILE * t.block.rows, columns = TILE * t.block.columns;
  pack<T, float>(a.grad, a.grad_gate, a.grad_channels_last, a.out_channels, a.height, a.width,
                 {t.block.n, TILE * t.block.h, TILE * t.block.w, rows, columns}, packed, k);
  add_rows<float>(packed, rows * columns, k, bias);
  for (int64_t q = 0; q < t.pixels; ++q) {
    const int64_t row = q / t.columns, column = q % t.columns;
    const float* from = packed + (row * TILE * columns + column * TILE) * k;
    for (int64_t i = 0; i < k; i += lanes<float>) {
      float* to = z + q * k + i;
      if (column >= t.block.columns) {
        for (int p = 0; p < POINTS * POINTS; ++p) store_vec(to + p * step, V{});
        continue;
      }
      V half[POINTS][TILE];
      for (int x = 0; x < TILE; ++x) {
        V g[TILE], u[POINTS];
#pragma GCC unroll 4
        for (int y = 0; y < TILE; ++y) g[y] = load_vec(from + (y * columns + x) * k + i);
        gradient_1d(g, u);
#pragma GCC unroll 7
        for (int y = 0; y < POINTS; ++y) half[y][x] = u[y];
      }
      for (int y = 0; y < POINTS; ++y, to += POINTS * step) {
        V u[POINTS];
        gradient_1d(half[y], u);
#pragma GCC unroll 7
        for (int x = 0; x < POINTS; ++x) store_vec(to + x * step, u[x]);
      }
    }
  }
}

template <typename T>
void grad_chunk(const FilterGradArgs& a, int64_t chunk, char* sums, char* scratch) {
  const Layout layout(a);
  float* filter = carve<float>(sums, POINTS * POINTS * layout.filter());
  double* bias = carve<double>(sums, layout.k);
  float* packed = carve<float>(scratch, layout.packed());
  const int64_t v_step = layout.v_rows() * layout.c, z_step = layout.m_rows() * layout.k;
  float* v = carve<float>(scratch, POINTS * POINTS * v_step);
  float* z = carve<float>(scratch, POINTS * POINTS * z_step);
  int64_t* offset = carve<int64_t>(scratch, layout.taps());
  for (int64_t i = 0; i < POINTS * POINTS * layout.filter(); ++i) filter[i] = 0;
  for (int64_t i = 0; i < layout.k; ++i) bias[i] = 0;
  const int64_t tasks = layout.cuts.tasks, count = chunks(a);
  for (int64_t task = tasks * chunk / count; task < tasks * (chunk + 1) / count; ++task) {
    const Tiles t = layout.tiles(task);
    layout.offsets(t, offset);
    transform_input<T>(a, View{}, layout, t, packed, v, v_step);
    transform_gradient<T>(a, t, layout.k, packed, z, z_step, bias);
    for (int p = 0; p < POINTS * POINTS; ++p)
      multiply_transposed<float>(v + p * v_step, layout.c, t.pixels, offset, layout.taps(),
                                 layout.c, z + p * z_step, layout.k, filter + p * layout.filter());
  }
}
void filter_grad(const FilterGradArgs& a, int64_t chunk, void* sums, void* scratch) {
  with_type(a.dtype, [&]<typename T>() {
    grad_chunk<T>(a, chunk, static_cast<char*>(sums), static_cast<char*>(scratch));
  });
}

template <typename T>
bool combine_chunks(const FilterGradArgs& a, const char* sums, T* d_bias) {
  constexpr int L = lanes<float>;
  const Layout layout(a);
  const int64_t count = chunks(a), bytes = sum_bytes(a);
  bool finite = true;
  for (int64_t i = 0; i < layout.taps(); ++i) {
    for (int64_t c = 0; c < a.in_channels; ++c) {
      for (int64_t k = 0; k < a.out_channels; k += L) {
        double half[TAPS][POINTS][L] = {};
        for (int p = 0; p < POINTS * POINTS; ++p) {
          double u[L] = {};
          for (int64_t n = 0; n < count; ++n) {
            const float* part = reinterpret_cast<const float*>(sums + n * bytes) +
                                p * layout.filter() + (i * layout.c + c) * layout.k + k;
            for (int j = 0; j < L; ++j) u[j] += double(part[j]);
          }
          for (int y = 0; y < TAPS; ++y)
            for (int j = 0; j < L; ++j) half[y][p % POINTS][j] += G.at[p / POINTS][y] * u[j];
        }
        for (int y = 0; y < TAPS; ++y) {
          for (int x = 0; x < TAPS; ++x) {
            const int64_t h = i / layout.pieces * TAPS + y, w = i % layout.pieces * TAPS + x;
            if (h >= a.kernel || w >= a.kernel) continue;
            for (int64_t j = 0; j < min(L, a.out_channels - k); ++j) {
              double g = 0;
              for (int p = 0; p < POINTS; ++p) g += G.at[p][x] * half[y][p][j];
              finite &= g - g == 0;
              store(const_cast<T*>(at<T>(a.d_filter, k + j, c, h, w)), float(g));
            }
          }
        }
      }
    }
  }
  if (d_bias) {
    const int64_t offset = carved<float>(POINTS * POINTS * layout.filter());
    for (int64_t k = 0; k < a.out_channels; ++k) {
      double sum = 0;
      for (int64_t n = 0; n < count; ++n)
        sum += reinterpret_cast<const double*>(sums + n * bytes + offset)[k];
      store(d_bias + k, float(sum));
    }
  }
  return finite;
}
bool combine(const FilterGradArgs& a, const void* sums, void* d_bias) {
  return with_type(a.dtype, [&]<typename T>() {
    return combine_chunks<T>(a, static_cast<const char*>(sums), static_cast<T*>(d_bias));
  });
}

}  // namespace

extern const ConvKernels winograd_large;
const ConvKernels winograd_large = {
    serves,  prepared_bytes, prepare,   conv_scratch_bytes,        conv_tasks,  conv,    nullptr,
    nullptr, chunks,         sum_bytes, filter_grad_scratch_bytes, filter_grad, combine, nullptr,
    nullptr,
};

}  // namespace fastda::cpu::FASTDA_ISA
