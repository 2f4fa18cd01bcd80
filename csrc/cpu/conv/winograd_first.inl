// Compiled once per instruction set, with FASTDA_ISA naming it.
//
// First layers: filters of 5 x 5, 7 x 7, 11 x 11, … from fewer channels than a vector has lanes, by the
// transforms and pieces of winograd_large.inl. There the vectors of input channels would be mostly empty,
// and all of V and M would go through the second-level cache for a product or three. Here the lanes of
// the input's transform are tiles, and M is that of a few tiles and one vector of output channels:
//
//   x block with halo -> packed -> phase [channel][row % TILE][column % TILE][tile of the grid]
//     -> V [L tiles of the grid][row of points][plane][point][tile]      a plane: a piece and a channel
//   a few tiles, row by row of points: V x U [vector of k][row][plane][point][k] -> M [tile][point][k]
//   -> half transformed -> pixels -> epilogue
//
// and, for the filter's gradient, gradient -> half transformed -> row by row: Z [tile][point][k],
// dU, as U, += V x Z.
#include <type_traits>

#include "cpu/conv/epilogue.h"
#include "cpu/conv/strips.h"

namespace fastda::cpu::FASTDA_ISA {

#if FASTDA_SIMD

namespace {

// An address that is not kept as many sums of a register and one each.
FASTDA_INLINE void in_one_register(const float*& p) { asm("" : "+r"(p)); }

template <typename W>
struct FirstLayer {
  static constexpr int TILE = W::tile, TAPS = W::taps, POINTS = W::points, ALL = POINTS * POINTS;
  static constexpr int L = lanes<float>;
  // Tiles that are multiplied together, a row of whose points fills the registers; and in the filter's
  // gradient.
  static constexpr int together = vector_registers == 32 ? 4 : 2, gathered = 16;
  static constexpr int64_t budget = 256 << 10;

  template <typename Args>
  struct Layout {
    int64_t pieces, planes, halo, k, high, wide;
    Blocking blocking;
    explicit Layout(const Args& a)
        : pieces(ceil_div(a.kernel, TAPS)),
          planes(pieces * pieces * a.in_channels),
          halo(pieces - 1 + ceil_div(TAPS - 1, TILE)),
          k(padded(a.out_channels)),
          high(ceil_div(a.out_height(), TILE)),
          wide(ceil_div(a.out_width(), TILE)),
          blocking(block_image(
              a.batch, high, wide,
              (ALL * planes + TILE * TILE * (a.in_channels + k)) * int64_t(sizeof(float)),
              budget)) {}
    int64_t filter() const { return k * ALL * planes; }
    int64_t grid() const { return (blocking.rows + halo) * (blocking.columns + halo); }
    int64_t phase() const { return grid() + L; }
    int64_t packed(int64_t channels) const { return TILE * TILE * grid() * channels; }
    int64_t v() const { return ceil_div(grid(), L) * group(); }
    int64_t group() const { return ALL * planes * L; }        // floats of V of L tiles
    int64_t row_of_v() const { return POINTS * planes * L; }  // and of U
    int64_t pixels() const { return TILE * TILE * blocking.rows * blocking.columns * k; }
    int64_t bytes(const Args& a) const {
      return Arena::bytes<float>(packed(a.in_channels)) +
             Arena::bytes<float>(TILE * TILE * phase() * a.in_channels) + Arena::bytes<float>(v()) +
             Arena::bytes<float>(pixels()) + Arena::bytes<float>(TILE * POINTS * gathered * L) +
             Arena::bytes<float>(k);
    }
  };
  // A block of tiles, its V, and room for the sums or the gradient of its pixels and for M or Z.
  template <typename Args>
  struct Work {
    Block tiles;
    int64_t columns;  // of the grid
    float *v, *pixels, *m, *bias;

    template <typename T>
    static Work make(const Args& a, const Layout<Args>& l, int64_t task, void* memory) {
      Arena scratch(memory);
      float* packed = scratch.take<float>(l.packed(a.in_channels));
      float* phases = scratch.take<float>(TILE * TILE * l.phase() * a.in_channels);
      Work w;
      w.tiles = l.blocking.block(task, l.high, l.wide);
      w.columns = w.tiles.columns + l.halo;
      w.v = scratch.take<float>(l.v());
      w.pixels = scratch.take<float>(l.pixels());
      w.m = scratch.take<float>(TILE * POINTS * gathered * L);
      w.bias = scratch.take<float>(l.k);
      w.template read<T>(a, l, packed, phases);
      for (int64_t q = 0; q < (w.tiles.rows - 1) * w.columns + w.tiles.columns; q += L)
        for (int64_t i = 0; i < l.planes; ++i)
          w.transform_input(l, phases, i / a.in_channels, i % a.in_channels, q,
                            w.v + q / L * l.group() + i * POINTS * L);
      return w;
    }

    // The block with its halo, by phases.
    template <typename T>
    void read(const Args& a, const Layout<Args>& l, float* packed, float* phases) const {
      const int64_t grid_rows = tiles.rows + l.halo, channels = a.in_channels;
      const Block block{tiles.n, TILE * tiles.h - a.padding, TILE * tiles.w - a.padding,
                        TILE * grid_rows, TILE * columns};
      const int64_t count = block.rows * block.columns;
      const Source source = source_of(a);
      if (source.channels_last) {
        pack<T, float>(source, block, packed, channels);
      } else {
        for (int64_t c = 0; c < channels; ++c)
          pack<T, float>(channel_of<T>(source, c), block, packed + c * count, 1);
      }
      const int64_t total = count * channels, whole = total / L * L;
      note(source.range, packed, whole, tiles.n);
      if (total > whole) {
        Peak peak;
        peak.add(load_first<float>(packed + whole, int(total - whole)));
        peak.note(source.range, tiles.n);
      }
      const int64_t pixel = source.channels_last ? channels : 1,
                    plane = source.channels_last ? 1 : count;
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t y = 0; y < block.rows; ++y) {
          const float* from = packed + c * plane + y * block.columns * pixel;
          float* to = phases + phase(l, c, y % TILE, 0) + y / TILE * columns;
          for (int64_t q = 0; q < columns; ++q, from += TILE * pixel)
#pragma GCC unroll 4
            for (int64_t x = 0; x < TILE; ++x) to[q + x * l.phase()] = from[x * pixel];
        }
        for (int64_t i = 0; i < TILE * TILE; ++i)  // subnormal numbers would be slow
          store_vec(phases + phase(l, c, 0, i) + grid_rows * columns, F32{});
      }
    }
    static int64_t phase(const Layout<Args>& l, int64_t c, int64_t y, int64_t x) {
      return ((c * TILE + y) * TILE + x) * l.phase();
    }

    void transform_input(const Layout<Args>& l, const float* phases, int64_t piece, int64_t c,
                         int64_t q, float* to) const {
      const float* from =
          phases + phase(l, c, 0, 0) + q + piece / l.pieces * columns + piece % l.pieces;
      F32 half[POINTS][POINTS];
      for (int x = 0; x < POINTS; ++x) {
        F32 d[POINTS], u[POINTS];
#pragma GCC unroll 7
        for (int y = 0; y < POINTS; ++y)
          d[y] = load_vec(from + phase(l, 0, y % TILE, x % TILE) + y / TILE * columns + x / TILE);
        W::input(d, u);
#pragma GCC unroll 7
        for (int y = 0; y < POINTS; ++y) half[y][x] = u[y];
      }
      for (int y = 0; y < POINTS; ++y, to += l.row_of_v()) {
        F32 u[POINTS];
        W::input(half[y], u);
#pragma GCC unroll 7
        for (int x = 0; x < POINTS; ++x) store_vec(to + x * L, u[x]);
      }
    }

    // Calls f(V of each, number of each in the block, how many) for N tiles at a time; the last ones
    // repeat.
    template <int N, typename F>
    void each(const Layout<Args>& l, F&& f) const {
      const int64_t count = tiles.rows * tiles.columns;
      for (int64_t i = 0; i < count; i += N) {
        const float* of[N];
        int64_t number[N];
        for (int t = 0; t < N; ++t) {
          number[t] = min(i + t, count - 1);
          const int64_t q = number[t] / tiles.columns * columns + number[t] % tiles.columns;
          of[t] = v + q / L * l.group() + q % L;
        }
        f(of, number, int(min(N, count - i)));
      }
    }
    // Where a tile's pixels of the channel k begin, `row(l)` floats from row to row.
    float* pixels_of(const Layout<Args>& l, int64_t number, int64_t k) const {
      return pixels + number / tiles.columns * TILE * row(l) + number % tiles.columns * TILE * l.k +
             k;
    }
    int64_t row(const Layout<Args>& l) const { return TILE * tiles.columns * l.k; }
  };

  static bool serves(const ConvProblem& p) {
    const bool full = TAPS == 4 ? p.kernel >= 7 && p.kernel % TAPS == TAPS - 1 : p.kernel == TAPS;
    // Of one channel there are so few products that the transforms outweigh what they save.
    return full && p.dtype != DType::f64 && p.in_channels >= (TAPS == 4 ? 1 : 2) && few_inputs(p) &&
           p.out_channels >= 16 && min(p.out_height(), p.out_width()) >= 2 * TILE;
  }
  static Tile tile(const ConvProblem& p) {
    return {TILE, TILE * ceil_div(p.kernel, TAPS) + TAPS - 1};
  }

  static int64_t prepared_bytes(const ConvArgs& a) {
    const Layout<ConvArgs> l(a);
    return l.k * ALL * l.planes * int64_t(sizeof(float));
  }
  static void prepare(const ConvArgs& a, void* prepared) {
    const Layout<ConvArgs> l(a);
    with_float_type(a.dtype, [&]<typename T>() {
      for (int64_t k = 0; k < l.k; k += L)
        for (int64_t i = 0; i < l.planes; ++i)
          filter_points<W, T>(a, l.pieces, i / a.in_channels, i % a.in_channels, k,
                              static_cast<float*>(prepared) + k * ALL * l.planes + i * POINTS * L,
                              l.row_of_v(), L);
    });
  }
  static int64_t conv_scratch_bytes(const ConvArgs& a) { return Layout<ConvArgs>(a).bytes(a); }
  static int64_t conv_tasks(const ConvArgs& a) { return Layout<ConvArgs>(a).blocking.tasks; }

  // One row of points of M, in registers, and what its transform leaves of it: half[tile][column of the
  // output][row].
  FASTDA_INLINE void multiply_row(const float* const* of, int64_t offset, const float* u,
                                  int64_t planes, float* half) {
    F32 m[together][POINTS] = {};
    const float* v[together];
#pragma GCC unroll 4
    for (int t = 0; t < together; ++t) v[t] = of[t] + offset;
    for (int64_t i = 0; i < planes; ++i, u += POINTS * L) {
#pragma GCC unroll 7
      for (int x = 0; x < POINTS; ++x) {
        const F32 w = load_vec(u + x * L);
#pragma GCC unroll 4
        for (int t = 0; t < together; ++t) m[t][x] += broadcast(v[t][x * L]) * w;
      }
#pragma GCC unroll 4
      for (int t = 0; t < together; ++t) {
        v[t] += POINTS * L;
        in_one_register(v[t]);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < together; ++t) {
      F32 y[TILE];
      W::output(m[t], y);
#pragma GCC unroll 4
      for (int x = 0; x < TILE; ++x) store_vec(half + (t * TILE + x) * POINTS * L, y[x]);
    }
  }
  // The pixels of a tile: put(row, column, value).
  template <typename F>
  FASTDA_INLINE void each_pixel(const float* half, F32& finite, F&& put) {
#pragma GCC unroll 4
    for (int x = 0; x < TILE; ++x, half += POINTS * L) {
      F32 d[POINTS], y[TILE];
#pragma GCC unroll 7
      for (int p = 0; p < POINTS; ++p) d[p] = load_vec(half + p * L);
      W::output(d, y);
      finite = fma(y[0] + y[TILE - 1], broadcast(0.0f), finite);
#pragma GCC unroll 4
      for (int p = 0; p < TILE; ++p) put(p, x, y[p]);
    }
  }

  // A tile of one vector of output channels from k on, of a channels_last output.
  template <typename T>
  static void store_tile(const ConvArgs& a, const Epilogue<T, float>& e, const float* half,
                         int64_t k, int64_t rows, int64_t columns, F32& finite) {
    const T* bias = static_cast<const T*>(a.bias);
    const int64_t valid = min(L, a.out_channels - k);
    const Mask mask = mask_of(0, valid);
    const F32 b = bias ? load_vec(bias + k, mask) : broadcast(0.0f);
    if (e.plain && rows >= TILE && columns >= TILE && valid == L) {
      T* to = e.out + k;
      const int64_t row = a.out.h, column = a.out.w;
      const F32 low = e.low;
      if constexpr (std::is_same_v<T, float>) {
        if (e.past_the_cache) {
          each_pixel(half, finite, [&](int y, int x, F32 sum) __attribute__((always_inline)) {
            stream_vec(to + y * row + x * column, clamp_min(sum + b, low));
          });
          return;
        }
      }
      each_pixel(half, finite, [&](int y, int x, F32 sum) __attribute__((always_inline)) {
        store_vec(to + y * row + x * column, clamp_min(sum + b, low));
      });
      return;
    }
    F32 sums[TILE][TILE];
    each_pixel(half, finite, [&](int y, int x, F32 sum) { sums[y][x] = sum + b; });
    const auto load_operand = [=](const T* p) { return load_vec(p, mask); };
    for (int64_t y = 0; y < min(TILE, rows); ++y)
      for (int64_t x = 0; x < min(TILE, columns); ++x) {
        const auto offset = [=](const View& v) { return k * v.c + y * v.h + x * v.w; };
        const F32 result = e.apply(sums[y][x], offset(a.residual), offset(a.residual_mask),
                                   offset(a.out_mask), load_operand);
        store_vec(e.out + offset(a.out), result, mask);
      }
  }

  static bool conv(const ConvArgs& a, int64_t task, void* memory) {
    return with_float_type(a.dtype, [&]<typename T>() {
      const Layout<ConvArgs> l(a);
      const auto work = Work<ConvArgs>::template make<T>(a, l, task, memory);
      const Block& tiles = work.tiles;
      F32 finite = broadcast(0.0f);
      for (int64_t k = 0; k < l.k; k += L) {
        const float* filter = static_cast<const float*>(a.prepared) + k * ALL * l.planes;
        work.template each<together>(l, [&](const float* const* of, const int64_t* number,
                                            int count) {
          for (int y = 0; y < POINTS; ++y)
            multiply_row(of, y * l.row_of_v(), filter + y * l.row_of_v(), l.planes, work.m + y * L);
          for (int t = 0; t < count; ++t) {
            const int64_t h = TILE * (tiles.h + number[t] / tiles.columns),
                          w = TILE * (tiles.w + number[t] % tiles.columns);
            const Epilogue<T, float> e(a, tiles.n, 0, h, w);
            const float* half = work.m + t * TILE * POINTS * L;
            if (a.out_channels_last) {
              store_tile<T>(a, e, half, k, a.out_height() - h, a.out_width() - w, finite);
              continue;
            }
            float* to = work.pixels_of(l, number[t], k);
            const int64_t row = work.row(l);
            each_pixel(half, finite, [&](int y, int x, F32 sum) __attribute__((always_inline)) {
              store_vec(to + y * row + x * l.k, sum);
            });
          }
        });
      }
      const int64_t h = TILE * tiles.h, w = TILE * tiles.w, columns = TILE * tiles.columns;
      if (!a.out_channels_last)
        epilogue<T, float>(a, work.pixels, columns, l.k,
                           {tiles.n, h, w, min(TILE * tiles.rows, a.out_height() - h),
                            min(columns, a.out_width() - w)});
      stream_fence();
      float total = 0;
      for (int i = 0; i < L; ++i) total += finite[i];
      return total == 0;
    });
  }

  // Filter gradient.

  static int64_t sum_bytes(const FilterGradArgs& a) {
    const Layout<FilterGradArgs> l(a);
    return Arena::bytes<float>(l.k * ALL * l.planes) + Arena::bytes<double>(l.k);
  }
  static int64_t chunks(const FilterGradArgs& a) {
    return chunk_count(Layout<FilterGradArgs>(a).blocking.tasks, sum_bytes(a));
  }
  static int64_t filter_grad_scratch_bytes(const FilterGradArgs& a) {
    return Layout<FilterGradArgs>(a).bytes(a);
  }

  // Of a tile's pixels of one vector of channels, half[row of points][column]; their sum.
  static F32 transform_gradient(const Strips<float>& grad, float* half, Peak& peak) {
    F32 total = broadcast(0.0f);
#pragma GCC unroll 4
    for (int x = 0; x < TILE; ++x) {
      F32 g[TILE], u[POINTS];
#pragma GCC unroll 4
      for (int y = 0; y < TILE; ++y) {
        g[y] = load_vec(grad.at + y * grad.row + x * grad.pixel);
        peak.add(g[y]);
        total += g[y];
      }
      W::gradient(g, u);
#pragma GCC unroll 7
      for (int y = 0; y < POINTS; ++y) store_vec(half + (y * TILE + x) * L, u[y]);
    }
    return total;
  }

  // dU += V x Z of the points [X0, X1) of row y and R planes, added up in registers over `count` tiles.
  template <int R, int X0, int X1>
  static void accumulate_row(const float* const* v, int64_t offset, const float* half,
                             int64_t count, float* u) {
    F32 sum[R][POINTS] = {};
    for (int64_t t = 0; t < count; ++t, half += POINTS * TILE * L) {
      F32 g[TILE], z[POINTS];
#pragma GCC unroll 4
      for (int x = 0; x < TILE; ++x) g[x] = load_vec(half + x * L);
      W::gradient(g, z);
      const float* of = v[t] + offset;
      in_one_register(of);
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 7
        for (int x = X0; x < X1; ++x) sum[r][x] += broadcast(of[(r * POINTS + x) * L]) * z[x];
    }
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 7
      for (int x = X0; x < X1; ++x) {
        float* to = u + (r * POINTS + x) * L;
        store_vec(to, load_vec(to) + sum[r][x]);
      }
  }
  // As many points at a time as the registers hold.
  template <int R>
  static void accumulate_planes(const float* const* v, int64_t offset, const float* half,
                                int64_t count, float* u) {
    if constexpr (vector_registers == 32 || R == 1) {
      accumulate_row<R, 0, POINTS>(v, offset, half, count, u);
    } else {
      accumulate_row<R, 0, 2>(v, offset, half, count, u);
      accumulate_row<R, 2, 4>(v, offset, half, count, u);
      accumulate_row<R, 4, POINTS>(v, offset, half, count, u);
    }
  }
  static void accumulate(const float* const* v, int64_t planes, const float* half, int64_t count,
                         float* u) {
    for (int y = 0; y < POINTS; ++y, half += TILE * L)
      for (int64_t i = 0; i < planes;) {
        const int64_t offset = (y * planes + i) * POINTS * L, left = planes - i;
        if (left == 1) {
          accumulate_planes<1>(v, offset, half, count, u + offset);
          i += 1;
        } else if (left == 2 || left == 4) {
          accumulate_planes<2>(v, offset, half, count, u + offset);
          i += 2;
        } else {
          accumulate_planes<3>(v, offset, half, count, u + offset);
          i += 3;
        }
      }
  }

  static void filter_grad(const FilterGradArgs& a, int64_t chunk, void* sums_memory, void* memory) {
    with_float_type(a.dtype, [&]<typename T>() {
      const Layout<FilterGradArgs> l(a);
      Arena sums(sums_memory);
      float* filter = sums.take<float>(l.k * ALL * l.planes);
      double* bias = sums.take<double>(l.k);
      for (int64_t i = 0; i < l.k * ALL * l.planes; ++i) filter[i] = 0;
      for (int64_t i = 0; i < l.k; ++i) bias[i] = 0;
      const Source source = grad_source_of(a);
      // Read where it lies, but for the tiles that it does not fill.
      const bool in_place = std::is_same_v<T, float> && source.channels_last && !source.mask.data &&
                            !source.winners.places && a.out_channels == l.k;
      const int64_t tasks = l.blocking.tasks, parts = chunks(a);
      for (int64_t task = tasks * chunk / parts; task < tasks * (chunk + 1) / parts; ++task) {
        const auto work = Work<FilterGradArgs>::template make<T>(a, l, task, memory);
        const Block& tiles = work.tiles;
        if (!in_place)
          pack<T, float>(
              source,
              {tiles.n, TILE * tiles.h, TILE * tiles.w, TILE * tiles.rows, TILE * tiles.columns},
              work.pixels, l.k);
        for (int64_t k = 0; k < l.k; ++k) work.bias[k] = 0;
        Peak peak;
        for (int64_t k = 0; k < l.k; k += L) {
          work.template each<gathered>(
              l, [&](const float* const* of, const int64_t* number, int count) {
                F32 sum = load_vec(work.bias + k);
                for (int t = 0; t < count; ++t) {
                  const int64_t h = TILE * (tiles.h + number[t] / tiles.columns),
                                w = TILE * (tiles.w + number[t] % tiles.columns);
                  Strips<float> grad{work.pixels_of(l, number[t], 0), work.row(l), l.k};
                  if (in_place && h + TILE <= a.out_height() && w + TILE <= a.out_width()) {
                    grad = {at<float>(a.grad, tiles.n, 0, h, w), a.grad.h, a.grad.w};
                  } else if (in_place) {
                    grad = {work.pixels, TILE * l.k, l.k};
                    pack<T, float>(source, {tiles.n, h, w, TILE, TILE}, work.pixels, l.k);
                  }
                  grad.at += k;
                  sum += transform_gradient(grad, work.m + t * POINTS * TILE * L, peak);
                }
                store_vec(work.bias + k, sum);
                accumulate(of, l.planes, work.m, count, filter + k * ALL * l.planes);
              });
        }
        peak.note(source.range, tiles.n);
        for (int64_t k = 0; k < l.k; ++k) bias[k] += double(work.bias[k]);
      }
    });
  }

  static bool combine(const FilterGradArgs& a, const void* sums, void* d_bias) {
    const Layout<FilterGradArgs> l(a);
    const int64_t count = chunks(a), bytes = sum_bytes(a);
    const char* parts = static_cast<const char*>(sums);
    bool finite = true;
    with_float_type(a.dtype, [&]<typename T>() {
      for (int64_t i = 0; i < l.planes; ++i)
        for (int64_t k = 0; k < a.out_channels; k += L)
          finite &= store_piece<W, T>(
              a, l.pieces, i / a.in_channels, i % a.in_channels, k, [&](int p, int64_t j) {
                const int64_t offset =
                    k * ALL * l.planes + p / POINTS * l.row_of_v() + (i * POINTS + p % POINTS) * L;
                return sum_of_chunks(parts, count, bytes, offset + j);
              });
      if (d_bias == nullptr) return;
      const int64_t offset = Arena::bytes<float>(l.k * ALL * l.planes);
      for (int64_t k = 0; k < a.out_channels; ++k) {
        double sum = 0;
        for (int64_t n = 0; n < count; ++n)
          sum += reinterpret_cast<const double*>(parts + n * bytes + offset)[k];
        store(static_cast<T*>(d_bias) + k, float(sum));
      }
    });
    return finite;
  }

  static constexpr ConvKernels kernels = {
      .serves = serves,
      .tile = tile,
      .reads_winners = true,
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

extern const ConvKernels first_3x3, first_5x5, first_large;
const ConvKernels first_3x3 = FirstLayer<Winograd43>::kernels;
const ConvKernels first_5x5 = FirstLayer<Winograd35>::kernels;
const ConvKernels first_large = FirstLayer<Winograd44>::kernels;

#else

extern const ConvKernels first_3x3, first_5x5, first_large;
const ConvKernels first_3x3 = {}, first_5x5 = {}, first_large = {};

#endif

}  // namespace fastda::cpu::FASTDA_ISA
