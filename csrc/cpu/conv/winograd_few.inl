// Compiled once per instruction set, with FASTDA_ISA naming it.
//
// Two to four input channels to many output channels, as the first layer of a network: filters of 5 x 5
// by Winograd F(3x3, 5x5) and of 7 x 7 by F(4x4, 4x4) in four pieces, as in winograd_large.inl. With so
// few channels the products of a tile are no more work than its transforms, and storing its 49 points of
// all output channels would cost more than making them. So V is broadcast number by number, and of some
// tiles two rows of points at a time are multiplied, transformed in registers and added to the pixels:
//
//   x block with halo -> [row][channel][column modulo tile][tile] -> V [tile row][tiles][y][channel][x][tile]
//   -> sums [pixel][channel] -> epilogue
//
// The filter's gradient: a row of points of the output's gradient at a time, whose products with V are
// summed in registers over the tiles.
#include <type_traits>

#include "cpu/conv/epilogue.h"
#include "cpu/conv/gemm.h"
#include "cpu/conv/winograd_filter.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

constexpr int most_inputs = 4;
constexpr int L = lanes<float>;

template <typename W>
struct Few {
  static constexpr int TILE = W::tile, TAPS = W::taps, POINTS = W::points;
  // Tiles that are worked on together at least: so often a part of the filter is read from the
  // first-level cache.
  static constexpr int64_t together = 16;
  static constexpr int64_t v_budget = 256 << 10;

  // Blocks of `rows` rows of tiles; V has pieces - 1 more rows and columns of tiles.
  struct Layout {
    int64_t pieces, channels, high, wide, k, vectors, runs, slots, rows, per_image, band;
    template <typename Args>
    explicit Layout(const Args& a)
        : pieces(ceil_div(a.kernel, TAPS)),
          channels(a.in_channels),
          high(ceil_div(a.out_height(), TILE)),
          wide(ceil_div(a.out_width(), TILE)),
          k(padded<float>(a.out_channels)),
          vectors(k / L),
          runs(ceil_div(wide + pieces - 1, L)),
          slots((runs + 1) * L),
          rows(max(1, min(high, v_budget / (v_row() * int64_t(sizeof(float)))))),
          per_image(ceil_div(high, rows)),
          band(min(rows, ceil_div(together, wide))) {}

    int64_t taps() const { return pieces * pieces; }
    int64_t depth() const { return taps() * channels; }
    int64_t v_row() const { return runs * POINTS * POINTS * channels * L; }
    int64_t v() const { return (rows + pieces - 1) * v_row(); }
    int64_t lines() const { return TILE * (rows + pieces - 1) + POINTS - TILE; }
    int64_t columns() const { return TILE * (wide + pieces - 1) + POINTS - TILE; }
    int64_t image() const { return lines() * channels * TILE * slots; }
    int64_t half() const { return lines() * channels * runs * POINTS * L; }
    int64_t filter() const { return POINTS * POINTS * depth() * k; }  // floats of all points
    int64_t at(int point, int64_t vector, int64_t piece, int64_t c) const {
      const int64_t row = (vector * POINTS + point / POINTS) * taps() + piece;
      return ((row * channels + c) * POINTS + point % POINTS) * L;
    }
    int64_t pixels() const { return band * TILE * wide * TILE * k; }  // of a band, floats
    int64_t bytes() const {
      return Arena::bytes<int64_t>(2 * columns()) + Arena::bytes<float>(image()) +
             Arena::bytes<float>(half()) + Arena::bytes<float>(v()) + Arena::bytes<float>(pixels());
    }
    // V of the tile that is piece (i, j) of tile (r, t), of its points' row y.
    const float* tile(const float* v, int64_t r, int64_t t, int64_t i, int64_t j, int y) const {
      return v + (((r + i) * runs + (t + j) / L) * POINTS + y) * channels * POINTS * L +
             (t + j) % L;
    }
  };

  // out[row][channel][phase][slot]: the pixel at `phase` + TILE * `slot` from column w on; zeros outside
  // the image.
  template <typename T>
  static void split(const Source& s, const Layout& l, int64_t n, int64_t h, int64_t w,
                    int64_t* columns, float* out) {
    int64_t* const places = columns + l.columns();
    int64_t count = 0;
    for (int64_t q = 0; q < l.columns(); ++q) {
      const int64_t from = standing_at(w + q, s.width, s.reflected);
      if (from < 0) continue;
      columns[count] = from;
      places[count++] = q % TILE * l.slots + q / TILE;
    }
    const float slope = float(s.negative_slope);
    for (int64_t i = 0; i < l.image(); i += L) store_vec(out + i, F32{});
    for (int64_t r = 0; r < l.lines(); ++r) {
      const int64_t from = standing_at(h + r, s.height, s.reflected);
      for (int64_t c = 0; c < l.channels; ++c, out += TILE * l.slots) {
        if (from < 0) continue;
        const T* x = at<T>(s.x, n, c, from, 0);
        if (s.mask.data == nullptr) {
          for (int64_t i = 0; i < count; ++i) out[places[i]] = load(x + columns[i] * s.x.w);
          continue;
        }
        const T* mask = at<T>(s.mask, n, c, from, 0);
        for (int64_t i = 0; i < count; ++i) {
          const float value = load(x + columns[i] * s.x.w), g = load(mask + columns[i] * s.mask.w);
          out[places[i]] = slope == 0 ? relu_mask(value, g) : leaky_relu_mask(value, g, slope);
        }
      }
    }
  }

  // V of a block whose first tile row is `row` of image n.
  template <typename T, typename Args>
  static const float* transform_input(const Args& a, const Layout& l, int64_t n, int64_t row,
                                      Arena& scratch) {
    int64_t* columns = scratch.take<int64_t>(2 * l.columns());
    float* image = scratch.take<float>(l.image());
    float* half = scratch.take<float>(l.half());
    float* v = scratch.take<float>(l.v());
    const Source source = source_of(a);
    split<T>(source, l, n, TILE * row - a.padding, -a.padding, columns, image);
    note(source.range, image, l.image(), n);
    float* to = half;
    for (int64_t line = 0; line < l.lines() * l.channels; ++line) {
      for (int64_t run = 0; run < l.runs; ++run, to += POINTS * L) {
        const float* from = image + line * TILE * l.slots + run * L;
        F32 d[POINTS], u[POINTS];
#pragma GCC unroll 7
        for (int x = 0; x < POINTS; ++x) d[x] = load_vec(from + x % TILE * l.slots + x / TILE);
        W::input(d, u);
#pragma GCC unroll 7
        for (int x = 0; x < POINTS; ++x) store_vec(to + x * L, u[x]);
      }
    }
    const int64_t line = l.channels * l.runs * POINTS * L, step = l.channels * POINTS * L;
    for (int64_t r = 0; r < l.rows + l.pieces - 1; ++r) {
      for (int64_t run = 0; run < l.runs; ++run) {
        float* block = v + r * l.v_row() + run * POINTS * step;
        for (int64_t c = 0; c < l.channels; ++c) {
          for (int x = 0; x < POINTS; ++x) {
            const float* from = half + r * TILE * line + ((c * l.runs + run) * POINTS + x) * L;
            F32 d[POINTS], u[POINTS];
#pragma GCC unroll 7
            for (int y = 0; y < POINTS; ++y) d[y] = load_vec(from + y * line);
            W::input(d, u);
#pragma GCC unroll 7
            for (int y = 0; y < POINTS; ++y)
              store_vec(block + y * step + (c * POINTS + x) * L, u[y]);
          }
        }
      }
    }
    return v;
  }

  // Calls f(integral constants: the channels, the pieces each way).
  template <typename F>
  static void with_depth(const Layout& l, F&& f) {
    constexpr std::integral_constant<int, TAPS == 4 ? 2 : 1> pieces;
    switch (l.channels) {
      case 2: f(std::integral_constant<int, 2>{}, pieces); break;
      case 3: f(std::integral_constant<int, 3>{}, pieces); break;
      default: f(std::integral_constant<int, 4>{}, pieces); break;
    }
  }

  // Tiles side by side that read a part of the filter together.
  static constexpr int side = vector_registers == 32 ? 2 : 1;

  // A row of the points of N tiles from t on, each transformed to TILE pixels. u: this row's part of the
  // filter.
  template <int C, int P, int N>
  FASTDA_INLINE void row_of_points(const Layout& l, const float* v, int64_t r, int64_t t, int y,
                                   const float* u, F32 (*pixels)[TILE]) {
    F32 m[N][POINTS] = {};
    for (int i = 0; i < P; ++i) {
      for (int j = 0; j < P; ++j) {
        const float* x[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) x[n] = l.tile(v, r, t + n, i, j, y);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c)
#pragma GCC unroll 7
          for (int p = 0; p < POINTS; ++p) {
            const F32 w = load_vec(u + (c * POINTS + p) * L);
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) m[n][p] += broadcast(x[n][(c * POINTS + p) * L]) * w;
          }
        u += C * POINTS * L;
      }
    }
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) W::output(m[n], pixels[n]);
  }

  // sums[pixel][channel] of a vector of channels of N tiles from (r, t) on: the rows 2 `pair` and
  // 2 `pair` + 1 of their points, or the last alone.
  template <int C, int P, int N>
  FASTDA_INLINE void add_pair(const Layout& l, const float* v, int64_t r, int64_t t, int pair,
                              const float* u, float* sums, int64_t line, F32& finite) {
    constexpr int64_t row = C * P * P * POINTS * L;
    F32 first[N][TILE], second[N][TILE];
    row_of_points<C, P, N>(l, v, r, t, 2 * pair, u, first);
    if (pair == POINTS / 2) {
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n, sums += TILE * l.k) {
        float* to = sums + (TILE - 1) * line;
#pragma GCC unroll 4
        for (int x = 0; x < TILE; ++x) {
          const F32 y = load_vec(to + x * l.k) + first[n][x];
          store_vec(to + x * l.k, y);
          if (x == 0 || x == TILE - 1) finite += (load_vec(sums + x * l.k) + y) * 0.0f;
        }
      }
      return;
    }
    row_of_points<C, P, N>(l, v, r, t, 2 * pair + 1, u + row, second);
    const float p = float(W::p[pair]);
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n, sums += TILE * l.k) {
      float power = 1;
#pragma GCC unroll 4
      for (int y = 0; y < TILE; ++y, power *= p) {
        float* to = sums + y * line;
#pragma GCC unroll 4
        for (int x = 0; x < TILE; ++x) {
          const F32 both = y % 2 ? first[n][x] - second[n][x] : first[n][x] + second[n][x];
          store_vec(to + x * l.k, pair == 0 ? power * both : load_vec(to + x * l.k) + power * both);
        }
      }
    }
  }

  static bool serves(const ConvProblem& p) {
    return fused_multiply_add && p.kernel == (TAPS == 4 ? 7 : TAPS) && p.dtype != DType::f64 &&
           p.in_channels >= 2 && p.in_channels <= most_inputs && p.out_channels >= 16 &&
           min(p.out_height(), p.out_width()) >= 2 * TILE;
  }
  static Tile tile(const ConvProblem& p) {
    return {TILE, TILE * ceil_div(p.kernel, TAPS) + TAPS - 1};
  }

  static int64_t prepared_bytes(const ConvArgs& a) {
    return Layout(a).filter() * int64_t(sizeof(float));
  }
  static void prepare(const ConvArgs& a, void* prepared) {
    const Layout l(a);
    with_float_type(a.dtype, [&]<typename T>() {
      transform_filter<W, T>(a, l.pieces, l.channels,
                             [&](int point, int64_t vector, int64_t piece, int64_t c) {
                               return static_cast<float*>(prepared) + l.at(point, vector, piece, c);
                             });
    });
  }
  static int64_t conv_scratch_bytes(const ConvArgs& a) { return Layout(a).bytes(); }
  static int64_t conv_tasks(const ConvArgs& a) { return a.batch * Layout(a).per_image; }

  template <typename T>
  static bool conv_block(const ConvArgs& a, int64_t task, void* memory) {
    const Layout l(a);
    Arena scratch(memory);
    const int64_t n = task / l.per_image, begin = task % l.per_image * l.rows;
    const float* v = transform_input<T>(a, l, n, begin, scratch);
    float* sums = scratch.take<float>(l.pixels());
    const int64_t columns = TILE * l.wide, line = columns * l.k, end = min(l.high, begin + l.rows);
    F32 finite = {};
    for (int64_t row = begin; row < end; row += l.band) {
      const int64_t rows = min(l.band, end - row);
      with_depth(
          l, [&]<int C, int P>(std::integral_constant<int, C>, std::integral_constant<int, P>) {
            for (int64_t vector = 0; vector < l.vectors; ++vector)
              for (int pair = 0; pair <= POINTS / 2; ++pair) {
                const float* u =
                    static_cast<const float*>(a.prepared) + l.at(2 * pair * POINTS, vector, 0, 0);
                for (int64_t r = 0; r < rows; ++r) {
                  const int64_t from = row - begin + r;
                  float* to = sums + r * TILE * line + vector * L;
                  int64_t t = 0;
                  for (; t + side <= l.wide; t += side)
                    add_pair<C, P, side>(l, v, from, t, pair, u, to + t * TILE * l.k, line, finite);
                  if (t < l.wide)
                    add_pair<C, P, 1>(l, v, from, t, pair, u, to + t * TILE * l.k, line, finite);
                }
              }
          });
      epilogue<T, float>(
          a, sums, columns, l.k,
          {n, TILE * row, 0, min(TILE * rows, a.out_height() - TILE * row), a.out_width()});
    }
    float total = 0;
    for (int i = 0; i < L; ++i) total += finite[i];
    return total == 0;
  }
  static bool conv(const ConvArgs& a, int64_t task, void* scratch) {
    return with_float_type(a.dtype, [&]<typename T>() { return conv_block<T>(a, task, scratch); });
  }

  static int64_t sum_bytes(const FilterGradArgs& a) {
    const Layout l(a);
    return Arena::bytes<float>(l.filter()) + Arena::bytes<double>(l.k);
  }
  static int64_t chunks(const FilterGradArgs& a) {
    return chunk_count(a.batch * Layout(a).per_image, sum_bytes(a));
  }
  static int64_t filter_grad_scratch_bytes(const FilterGradArgs& a) {
    const Layout l(a);
    return l.bytes() + Arena::bytes<float>(l.band * l.wide * POINTS * L);
  }

  // Factors of the rows of a tile's gradient in row y of its points.
  static void factors(int y, float* power) {
    const float p = y == POINTS - 1 ? 0 : float(y % 2 ? -W::p[y / 2] : W::p[y / 2]);
    for (int t = 0; t < TILE; ++t)
      power[t] = y == POINTS - 1 ? t == TILE - 1 : t == 0 ? 1 : power[t - 1] * p;
  }
  // That row of a tile's points, a vector of channels, from the tile's pixels.
  FASTDA_INLINE void row_of_gradient(const float* pixel, int64_t line, int64_t k,
                                     const float* power, F32* u) {
    F32 g[TILE];
#pragma GCC unroll 4
    for (int x = 0; x < TILE; ++x) {
      g[x] = power[0] * load_vec(pixel + x * k);
#pragma GCC unroll 4
      for (int i = 1; i < TILE; ++i) g[x] += power[i] * load_vec(pixel + i * line + x * k);
    }
    W::gradient(g, u);
  }

  // sums[channel][point] += sum over the tiles of a band of V[tile][channel][point] * row(tile)[point], of
  // N points from X on.
  template <int C, int X, int N, typename F>
  FASTDA_INLINE void accumulate(const Layout& l, const float* v, int64_t row, int64_t rows,
                                int64_t i, int64_t j, int y, float* sums, F&& points) {
    F32 sum[C][N];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 7
      for (int x = 0; x < N; ++x) sum[c][x] = load_vec(sums + (c * POINTS + X + x) * L);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t t = 0; t < l.wide; ++t) {
        const float* of = l.tile(v, row + r, t, i, j, y) + X * L;
        F32 g[POINTS];
        points(r, t, g);
#pragma GCC unroll 7
        for (int x = 0; x < N; ++x)
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) sum[c][x] += broadcast(of[(c * POINTS + x) * L]) * g[X + x];
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 7
      for (int x = 0; x < N; ++x) store_vec(sums + (c * POINTS + X + x) * L, sum[c][x]);
  }

  // What a band of `rows` rows of tiles adds to the sums of a vector of output channels. z: room for a row
  // of the points of its tiles.
  template <int C, int P>
  static void accumulate_band(const Layout& l, const float* v, int64_t row, int64_t rows,
                              int64_t vector, const float* pixels, float* z, float* filter) {
    // Whether a row's sums leave room to make the points where they are used.
    constexpr bool whole = C * POINTS <= vector_registers - 8;
    const int64_t line = l.wide * TILE * l.k;
    for (int y = 0; y < POINTS; ++y) {
      float power[TILE];
      factors(y, power);
      const auto make = [&](int64_t r, int64_t t, F32* g) __attribute__((always_inline)) {
        row_of_gradient(pixels + r * TILE * line + t * TILE * l.k + vector * L, line, l.k, power,
                        g);
      };
      const auto read = [&](int64_t r, int64_t t, F32* g) __attribute__((always_inline)) {
#pragma GCC unroll 7
        for (int x = 0; x < POINTS; ++x) g[x] = load_vec(z + ((r * l.wide + t) * POINTS + x) * L);
      };
      if constexpr (whole && P == 1) {
        accumulate<C, 0, POINTS>(l, v, row, rows, 0, 0, y, filter + l.at(y * POINTS, vector, 0, 0),
                                 make);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t t = 0; t < l.wide; ++t) {
          F32 g[POINTS];
          make(r, t, g);
#pragma GCC unroll 7
          for (int x = 0; x < POINTS; ++x) store_vec(z + ((r * l.wide + t) * POINTS + x) * L, g[x]);
        }
      for (int piece = 0; piece < P * P; ++piece) {
        float* to = filter + l.at(y * POINTS, vector, piece, 0);
        if constexpr (whole) {
          accumulate<C, 0, POINTS>(l, v, row, rows, piece / P, piece % P, y, to, read);
        } else {
          accumulate<C, 0, 4>(l, v, row, rows, piece / P, piece % P, y, to, read);
          accumulate<C, 4, 3>(l, v, row, rows, piece / P, piece % P, y, to, read);
        }
      }
    }
  }

  template <typename T>
  static void grad_chunk(const FilterGradArgs& a, int64_t chunk, void* sums_memory, void* memory) {
    const Layout l(a);
    Arena sums(sums_memory);
    float* filter = sums.take<float>(l.filter());
    double* bias = sums.take<double>(l.k);
    for (int64_t i = 0; i < l.filter(); ++i) filter[i] = 0;
    for (int64_t i = 0; i < l.k; ++i) bias[i] = 0;
    const int64_t tasks = a.batch * l.per_image, count = chunks(a);
    const Source source = grad_source_of(a);
    const int64_t columns = TILE * l.wide;
    for (int64_t task = tasks * chunk / count; task < tasks * (chunk + 1) / count; ++task) {
      Arena scratch(memory);
      const int64_t n = task / l.per_image, begin = task % l.per_image * l.rows;
      const float* v = transform_input<T>(a, l, n, begin, scratch);
      float* packed = scratch.take<float>(l.pixels());
      float* z = scratch.take<float>(l.band * l.wide * POINTS * L);
      const int64_t end = min(l.high, begin + l.rows);
      for (int64_t row = begin; row < end; row += l.band) {
        const int64_t rows = min(l.band, end - row), pixels = TILE * rows * columns;
        pack<T, float>(source, {n, TILE * row, 0, TILE * rows, columns}, packed, l.k);
        note(source.range, packed, pixels * l.k, n);
        add_rows<float>(packed, pixels, l.k, bias);
        with_depth(
            l, [&]<int C, int P>(std::integral_constant<int, C>, std::integral_constant<int, P>) {
              for (int64_t vector = 0; vector < l.vectors; ++vector)
                accumulate_band<C, P>(l, v, row - begin, rows, vector, packed, z, filter);
            });
      }
    }
  }
  static void filter_grad(const FilterGradArgs& a, int64_t chunk, void* sums, void* scratch) {
    with_float_type(a.dtype, [&]<typename T>() { grad_chunk<T>(a, chunk, sums, scratch); });
  }
  static bool combine(const FilterGradArgs& a, const void* sums, void* d_bias) {
    const Layout l(a);
    const int64_t count = chunks(a), bytes = sum_bytes(a);
    const char* parts = static_cast<const char*>(sums);
    return with_float_type(a.dtype, [&]<typename T>() {
      const bool finite = combine_filter<W, T>(
          a, l.pieces, count, [&](int64_t n, int p, int64_t vector, int64_t piece, int64_t c) {
            return reinterpret_cast<const float*>(parts + n * bytes) + l.at(p, vector, piece, c);
          });
      const int64_t offset = Arena::bytes<float>(l.filter());
      if (d_bias)
        combine_bias(a.out_channels, count, static_cast<T*>(d_bias), [&](int64_t n) {
          return reinterpret_cast<const double*>(parts + n * bytes + offset);
        });
      return finite;
    });
  }

  static constexpr ConvKernels kernels = {
      .serves = serves,
      .tile = tile,
      .prepared_bytes = prepared_bytes,
      .prepare = prepare,
      .conv_scratch_bytes = conv_scratch_bytes,
      .conv_tasks = conv_tasks,
      .conv = conv,
      .chunks = chunks,
      .sum_bytes = sum_bytes,
      .filter_grad_scratch_bytes = filter_grad_scratch_bytes,
      .filter_grad = filter_grad,
      .combine = combine,
  };
};

}  // namespace

extern const ConvKernels winograd_few_5x5, winograd_few_7x7;
const ConvKernels winograd_few_5x5 = Few<Winograd35>::kernels;
const ConvKernels winograd_few_7x7 = Few<Winograd44>::kernels;

}  // namespace fastda::cpu::FASTDA_ISA
