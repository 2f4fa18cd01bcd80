// Compiled once per instruction set, with FASTDA_ISA naming it.
//
// Filters of 7 x 7 and more by Winograd F(4x4, 4x4) in pieces, and of 5 x 5 by F(3x3, 5x5) and
// of 2 x 2 by F(5x5, 2x2) in one piece; 5 x 5 with much padding by the transpose of F(3x3, 5x5).
// A large filter is cut into pieces of 4 x 4 taps; a piece's offset, a multiple of 4, is also the
// distance of the output tiles, so the
// transformed input of one tile serves all pieces: for every one of the 49 points,
//
//   M[tile][k] = sum over pieces and channels of V[tile + piece][c] * U[piece][c][k],
//
// which is the direct kernels' product on the grid of tiles, with pieces for taps. A 7 x 7 filter
// costs 12.25 products per output instead of 49, one of 5 x 5 5.4 instead of 25. A task is a block of tiles; its V and M stay near
// the second-level cache:
//
//   x block with halo -> packed [pixel][channel] -> V [49][tile][channel] -> M [49][tile][channel]
//   -> sums [pixel][channel] -> epilogue
#include "cpu/conv/epilogue.h"
#include "cpu/conv/gemm.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

template <typename W>
struct Pieces {
  static constexpr int TILE = W::tile, TAPS = W::taps, POINTS = W::points;
  // Of a single piece: the error of longer sums outweighs that of the transforms (64 channels: 1.4e-6
  // instead of 1.1e-6; 256: 2.8e-6 instead of 1.2e-6).
  static constexpr int64_t longest_sum = TAPS == 4 ? 0 : 32;

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
    Blocking blocking;
    // Small images go together: several to a task where each is one block, of one piece, whose tiles
    // need no neighbours. At least 16 tasks stay, if there are so many images; 4, if it takes that for 24
    // tiles to share what is read of the filter.
    int64_t group = 1;
    explicit Layout(const Args& a)
        : pieces(ceil_div(a.kernel, TAPS)),
          high(ceil_div(a.out_height(), TILE)),
          wide(ceil_div(a.out_width(), TILE)),
          c(padded<float>(a.in_channels)),
          k(padded<float>(a.out_channels)),
          blocking(block_image(a.batch, high, wide,
                               POINTS * POINTS * (c + k) * int64_t(sizeof(float)), budget)) {
      if (pieces == 1 && blocking.per_column * blocking.per_row == 1) {
        const int64_t fit =
            budget / (high * wide * POINTS * POINTS * (c + k) * int64_t(sizeof(float)));
        int64_t most = max(a.batch / 16, min(a.batch / 4, ceil_div(24, high * wide)));
        if constexpr (requires { a.by_one_thread; }) most = a.by_one_thread ? a.batch : most;
        group = max(1, min(fit, most));
      }
    }
    static constexpr int64_t budget = 1600 << 10;

    int64_t taps() const { return pieces * pieces; }
    // Floats of one point: not a power of two, as matrix_floats().
    int64_t filter() const { return taps() * c * k + 16; }
    int64_t grid() const { return (blocking.rows + pieces - 1) * (blocking.columns + pieces - 1); }
    // Rows of V and M of one point; the micro-kernel runs past the end by up to max_rows.
    int64_t v_rows() const { return group * grid() + max_rows; }
    int64_t m_rows() const {
      return group * blocking.rows * (blocking.columns + pieces - 1) + max_rows;
    }
    int64_t tasks() const { return ceil_div(blocking.tasks, group); }
    int64_t packed() const {
      return (TILE * (blocking.rows + pieces) + TAPS) *
             (TILE * (blocking.columns + pieces) + TAPS) * max(c, k);
    }
    Tiles tiles(int64_t block) const {
      const Block b = blocking.block(block, high, wide);
      const int64_t columns = b.columns + pieces - 1;
      return {b, pieces, b.rows + pieces - 1, columns, (b.rows - 1) * columns + b.columns};
    }
    // Calls f(tiles, where their rows of V and M begin) for the blocks of a task; returns the pixels
    // of all.
    template <typename F>
    int64_t each(int64_t task, F&& f) const {
      int64_t pixels = 0;
      for (int64_t i = task * group; i < min(blocking.tasks, (task + 1) * group); ++i) {
        const Tiles t = tiles(i);
        f(t, pixels);
        pixels += t.pixels;
      }
      return pixels;
    }
    void offsets(const Tiles& t, int64_t* offset) const {
      for (int64_t i = 0; i < taps(); ++i) offset[i] = (i / pieces * t.columns + i % pieces) * c;
    }
  };

  // V[point][tile of the grid][c], `step` floats from point to point.
  template <typename T, typename Args>
  static void transform_input(const Args& a, const Layout<Args>& layout, const Tiles& t,
                              float* packed, float* v, int64_t step) {
    const int64_t p = a.padding, c = layout.c;
    const int64_t rows = TILE * t.rows + TAPS - 1, columns = TILE * t.columns + TAPS - 1;
    const Source source = source_of(a);
    pack<T, float>(source, {t.block.n, TILE * t.block.h - p, TILE * t.block.w - p, rows, columns},
                   packed, c);
    note(source.range, packed, rows * columns * c, t.block.n);
    for (int64_t q = 0; q < t.rows * t.columns; ++q) {
      const float* from = packed + (q / t.columns * TILE * columns + q % t.columns * TILE) * c;
      for (int64_t i = 0; i < c; i += lanes<float>) {
        F32 half[POINTS][POINTS];
        for (int x = 0; x < POINTS; ++x) {
          F32 d[POINTS], u[POINTS];
#pragma GCC unroll 7
          for (int y = 0; y < POINTS; ++y) d[y] = load_vec(from + (y * columns + x) * c + i);
          W::input(d, u);
#pragma GCC unroll 7
          for (int y = 0; y < POINTS; ++y) half[y][x] = u[y];
        }
        float* to = v + q * c + i;
        for (int y = 0; y < POINTS; ++y, to += POINTS * step) {
          F32 u[POINTS];
          W::input(half[y], u);
#pragma GCC unroll 7
          for (int x = 0; x < POINTS; ++x) store_vec(to + x * step, u[x]);
        }
      }
    }
  }

  // M[point][tile][k] -> sums[pixel][k]. False where some value is not finite: that shows in the
  // corners.
  static bool transform_output(const Tiles& t, const float* m, int64_t step, int64_t k,
                               float* sums) {
    const int64_t columns = TILE * t.block.columns;
    F32 finite = {};
    for (int64_t row = 0; row < t.block.rows; ++row) {
      for (int64_t column = 0; column < t.block.columns; ++column) {
        const float* from = m + (row * t.columns + column) * k;
        float* to = sums + (row * TILE * columns + column * TILE) * k;
        for (int64_t i = 0; i < k; i += lanes<float>) {
          F32 half[TILE][POINTS];
          for (int x = 0; x < POINTS; ++x) {
            F32 d[POINTS], y[TILE];
#pragma GCC unroll 7
            for (int p = 0; p < POINTS; ++p) d[p] = load_vec(from + (p * POINTS + x) * step + i);
            W::output(d, y);
#pragma GCC unroll 5
            for (int p = 0; p < TILE; ++p) half[p][x] = y[p];
          }
          for (int p = 0; p < TILE; ++p) {
            F32 y[TILE];
            W::output(half[p], y);
            finite += (y[0] + y[TILE - 1]) * 0.0f;
#pragma GCC unroll 5
            for (int x = 0; x < TILE; ++x) store_vec(to + (p * columns + x) * k + i, y[x]);
          }
        }
      }
    }
    float total = 0;
    for (int i = 0; i < lanes<float>; ++i) total += finite[i];
    return total == 0;
  }

  // Where the pieces are full or nearly so: 2 x 2; 5 x 5; 7 x 7, 11 x 11, … Others save less, at the
  // same error of a piece. And where products are fused with sums, without which the error is near its
  // bound.
  static bool serves(const ConvProblem& p) {
    const bool full = TAPS == 4 ? p.kernel >= 7 && p.kernel % TAPS == TAPS - 1 : p.kernel == TAPS;
    return fused_multiply_add && full && p.dtype != DType::f64 &&
           min(p.in_channels, p.out_channels) >= 16 &&
           min(p.out_height(), p.out_width()) >= (TAPS == 5 ? TILE : 2 * TILE);
  }

  static Tile tile(const ConvProblem& p) {
    return {TILE, TILE * ceil_div(p.kernel, TAPS) + TAPS - 1};
  }

  static int64_t prepared_bytes(const ConvArgs& a) {
    return POINTS * POINTS * Layout(a).filter() * int64_t(sizeof(float));
  }
  // [point][panel][piece][c][k in panel]
  template <typename T>
  static void transform_filter(const ConvArgs& a, float* out) {
    constexpr int L = lanes<float>;
    const Layout layout(a);
    const int64_t vectors = layout.k / L;
    for (int64_t vector = 0; vector < vectors; ++vector) {
      const PanelColumn column = panel_column(vector, vectors, layout.taps() * layout.c);
      const int64_t k = vector * L;
      for (int64_t i = 0; i < layout.taps(); ++i) {
        for (int64_t c = 0; c < layout.c; ++c) {
          float* to = out + column.offset + (i * layout.c + c) * column.stride;
          filter_points<W, T>(a, layout.pieces, i, c, k, to, POINTS * layout.filter(),
                              layout.filter());
        }
      }
    }
  }
  static void prepare(const ConvArgs& a, void* prepared) {
    with_float_type(a.dtype,
                    [&]<typename T>() { transform_filter<T>(a, static_cast<float*>(prepared)); });
  }

  static int64_t conv_scratch_bytes(const ConvArgs& a) {
    const Layout l(a);
    return Arena::bytes<float>(l.packed()) +
           Arena::bytes<float>(POINTS * POINTS * l.v_rows() * l.c) +
           Arena::bytes<float>(POINTS * POINTS * l.m_rows() * l.k) +
           Arena::bytes<int64_t>(l.taps());
  }
  static int64_t conv_tasks(const ConvArgs& a) { return Layout(a).tasks(); }

  template <typename T>
  static bool conv_block(const ConvArgs& a, int64_t task, void* memory) {
    const Layout layout(a);
    Arena scratch(memory);
    float* packed = scratch.take<float>(layout.packed());
    const int64_t v_step = layout.v_rows() * layout.c, m_step = layout.m_rows() * layout.k;
    float* v = scratch.take<float>(POINTS * POINTS * v_step);
    float* m = scratch.take<float>(POINTS * POINTS * m_step);
    int64_t* offset = scratch.take<int64_t>(layout.taps());
    int64_t rows = 0;
    const int64_t pixels = layout.each(task, [&](const Tiles& t, int64_t at) {
      layout.offsets(t, offset);
      transform_input<T>(a, layout, t, packed, v + at * layout.c, v_step);
      rows = at + t.rows * t.columns;
    });
    // The products run on into rows that nobody asked for. What lay there may be subnormal: very slow
    // on Intel.
    for (int p = 0; p < POINTS * POINTS; ++p)
      for (int64_t i = 0; i < max_rows * layout.c; ++i) v[p * v_step + rows * layout.c + i] = 0;
    for (int p = 0; p < POINTS * POINTS; ++p)
      multiply<float>(v + p * v_step, layout.c, pixels, offset, layout.taps(), layout.c,
                      static_cast<const float*>(a.prepared) + p * layout.filter(), layout.k,
                      m + p * m_step, longest_sum);
    float* sums = packed;  // which nobody needs any more
    bool finite = true;
    layout.each(task, [&](const Tiles& t, int64_t at) {
      finite &= transform_output(t, m + at * layout.k, m_step, layout.k, sums);
      const int64_t h = TILE * t.block.h, w = TILE * t.block.w;
      epilogue<T, float>(a, sums, TILE * t.block.columns, layout.k,
                         {t.block.n, h, w, min(TILE * t.block.rows, a.out_height() - h),
                          min(TILE * t.block.columns, a.out_width() - w)});
    });
    return finite;
  }
  static bool conv(const ConvArgs& a, int64_t task, void* scratch) {
    return with_float_type(a.dtype, [&]<typename T>() { return conv_block<T>(a, task, scratch); });
  }

  // Filter gradient: for every point, dU[piece][c][k] = sum over tiles of V[tile + piece][c] *
  // Z[tile][k].

  static int64_t sum_bytes(const FilterGradArgs& a) {
    const Layout l(a);
    return Arena::bytes<float>(POINTS * POINTS * l.filter()) + Arena::bytes<double>(l.k);
  }
  static int64_t chunks(const FilterGradArgs& a) {
    return chunk_count(Layout(a).tasks(), sum_bytes(a));
  }
  static int64_t filter_grad_scratch_bytes(const FilterGradArgs& a) {
    const Layout l(a);
    return Arena::bytes<float>(l.packed()) +
           Arena::bytes<float>(POINTS * POINTS * l.v_rows() * l.c) +
           Arena::bytes<float>(POINTS * POINTS * l.m_rows() * l.k) +
           Arena::bytes<int64_t>(l.taps());
  }

  // Z[point][tile of the grid][k], zero in the tiles between those of the output; bias may be null.
  template <typename T>
  static void transform_gradient(const Source& source, const Tiles& t, int64_t k, float* packed,
                                 float* z, int64_t step, double* bias) {
    const int64_t rows = TILE * t.block.rows, columns = TILE * t.block.columns;
    pack<T, float>(source, {t.block.n, TILE * t.block.h, TILE * t.block.w, rows, columns}, packed,
                   k);
    note(source.range, packed, rows * columns * k, t.block.n);
    if (bias) add_rows<float>(packed, rows * columns, k, bias);
    for (int64_t q = 0; q < t.pixels; ++q) {
      const int64_t row = q / t.columns, column = q % t.columns;
      const float* from = packed + (row * TILE * columns + column * TILE) * k;
      for (int64_t i = 0; i < k; i += lanes<float>) {
        float* to = z + q * k + i;
        if (column >= t.block.columns) {
          for (int p = 0; p < POINTS * POINTS; ++p) store_vec(to + p * step, F32{});
          continue;
        }
        F32 half[POINTS][TILE];
        for (int x = 0; x < TILE; ++x) {
          F32 g[TILE], u[POINTS];
#pragma GCC unroll 5
          for (int y = 0; y < TILE; ++y) g[y] = load_vec(from + (y * columns + x) * k + i);
          W::gradient(g, u);
#pragma GCC unroll 7
          for (int y = 0; y < POINTS; ++y) half[y][x] = u[y];
        }
        for (int y = 0; y < POINTS; ++y, to += POINTS * step) {
          F32 u[POINTS];
          W::gradient(half[y], u);
#pragma GCC unroll 7
          for (int x = 0; x < POINTS; ++x) store_vec(to + x * step, u[x]);
        }
      }
    }
  }

  template <typename T>
  static void grad_chunk(const FilterGradArgs& a, int64_t chunk, void* sums_memory, void* memory) {
    const Layout layout(a);
    Arena sums(sums_memory), scratch(memory);
    float* filter = sums.take<float>(POINTS * POINTS * layout.filter());
    double* bias = sums.take<double>(layout.k);
    float* packed = scratch.take<float>(layout.packed());
    const int64_t v_step = layout.v_rows() * layout.c, z_step = layout.m_rows() * layout.k;
    float* v = scratch.take<float>(POINTS * POINTS * v_step);
    float* z = scratch.take<float>(POINTS * POINTS * z_step);
    int64_t* offset = scratch.take<int64_t>(layout.taps());
    for (int64_t i = 0; i < POINTS * POINTS * layout.filter(); ++i) filter[i] = 0;
    for (int64_t i = 0; i < layout.k; ++i) bias[i] = 0;
    const int64_t tasks = layout.tasks(), count = chunks(a);
    for (int64_t task = tasks * chunk / count; task < tasks * (chunk + 1) / count; ++task) {
      const int64_t pixels = layout.each(task, [&](const Tiles& t, int64_t at) {
        layout.offsets(t, offset);
        transform_input<T>(a, layout, t, packed, v + at * layout.c, v_step);
        transform_gradient<T>(grad_source_of(a), t, layout.k, packed, z + at * layout.k, z_step,
                              bias);
      });
      for (int p = 0; p < POINTS * POINTS; ++p)
        multiply_transposed<float>(v + p * v_step, layout.c, pixels, offset, layout.taps(),
                                   layout.c, z + p * z_step, layout.k,
                                   filter + p * layout.filter());
    }
  }
  static void filter_grad(const FilterGradArgs& a, int64_t chunk, void* sums, void* scratch) {
    with_float_type(a.dtype, [&]<typename T>() { grad_chunk<T>(a, chunk, sums, scratch); });
  }

  template <typename T>
  static bool combine_chunks(const FilterGradArgs& a, const char* sums, T* d_bias) {
    constexpr int L = lanes<float>;
    const Layout layout(a);
    const int64_t count = chunks(a), bytes = sum_bytes(a);
    bool finite = true;
    for (int64_t i = 0; i < layout.taps(); ++i) {
      for (int64_t c = 0; c < a.in_channels; ++c) {
        for (int64_t k = 0; k < a.out_channels; k += L) {
          finite &= store_piece<W, T>(a, layout.pieces, i, c, k, [&](int p, int64_t j) {
            const int64_t at = p * layout.filter() + (i * layout.c + c) * layout.k + k + j;
            return sum_of_chunks(sums, count, bytes, at);
          });
        }
      }
    }
    if (d_bias) {
      const int64_t offset = Arena::bytes<float>(POINTS * POINTS * layout.filter());
      for (int64_t k = 0; k < a.out_channels; ++k) {
        double sum = 0;
        for (int64_t n = 0; n < count; ++n)
          sum += reinterpret_cast<const double*>(sums + n * bytes + offset)[k];
        store(d_bias + k, float(sum));
      }
    }
    return finite;
  }
  static bool combine(const FilterGradArgs& a, const void* sums, void* d_bias) {
    return with_float_type(a.dtype, [&]<typename T>() {
      return combine_chunks<T>(a, static_cast<const char*>(sums), static_cast<T*>(d_bias));
    });
  }

  // The same with more padding than half of the filter, as a data gradient has, by the transpose of the
  // convolution whose gradient it would be: the tiles are then of x, of which there are fewer,
  //
  //   sums = B [ (G turned filter G') * (A x A') ] B'
  //
  // and each adds to all the pixels of the result that it touches: POINTS x POINTS of them.

  // As large as x; its tiles are x's.
  static ConvProblem same(ConvProblem p) {
    p.padding = p.kernel / 2;
    return p;
  }
  static ConvArgs same(ConvArgs a) {
    static_cast<ConvProblem&>(a) = same(static_cast<const ConvProblem&>(a));
    return a;
  }
  // Where that saves tiles, and an image's are one block.
  static bool serves_transposed(const ConvProblem& p) {
    const auto tiles = [](const ConvProblem& q) {
      return ceil_div(q.out_height(), TILE) * ceil_div(q.out_width(), TILE);
    };
    if (!fused_multiply_add || p.kernel != TAPS || p.dtype == DType::f64 || p.reflect ||
        p.padding >= p.kernel || min(p.in_channels, p.out_channels) < 8)
      return false;
    const ConvProblem small = same(p);
    const Blocking blocking = Layout(small).blocking;
    return 5 * tiles(small) <= 4 * tiles(p) && blocking.per_column * blocking.per_row == 1;
  }

  static void prepare_transposed(const ConvArgs& a, void* prepared) {
    ConvArgs turned = a;
    View& f = turned.filter;
    f = {static_cast<char*>(f.data) + (a.kernel - 1) * (f.h + f.w) * size_of(a.dtype), f.n, f.c,
         -f.h, -f.w};
    prepare(turned, prepared);
  }

  // sums[pixel][k] += what the points of the tiles come to. False as above.
  static bool spread_output(const Tiles& t, const float* m, int64_t step, int64_t k,
                            int64_t columns, float* sums) {
    F32 finite = {};
    for (int64_t q = 0; q < t.block.rows * t.block.columns; ++q) {
      const int64_t row = q / t.block.columns, column = q % t.block.columns;
      const float* from = m + q * k;
      float* to = sums + (row * TILE * columns + column * TILE) * k;
      for (int64_t i = 0; i < k; i += lanes<float>) {
        F32 half[POINTS][POINTS];
        for (int x = 0; x < POINTS; ++x) {
          F32 v[POINTS], d[POINTS];
#pragma GCC unroll 7
          for (int p = 0; p < POINTS; ++p) v[p] = load_vec(from + (p * POINTS + x) * step + i);
          W::spread(v, d);
#pragma GCC unroll 7
          for (int y = 0; y < POINTS; ++y) half[y][x] = d[y];
        }
        for (int y = 0; y < POINTS; ++y) {
          F32 d[POINTS];
          W::spread(half[y], d);
          finite += (d[0] + d[POINTS - 1]) * 0.0f;
          float* pixels = to + y * columns * k + i;
#pragma GCC unroll 7
          for (int x = 0; x < POINTS; ++x)
            store_vec(pixels + x * k, load_vec(pixels + x * k) + d[x]);
        }
      }
    }
    float total = 0;
    for (int i = 0; i < lanes<float>; ++i) total += finite[i];
    return total == 0;
  }

  static int64_t transposed_scratch_bytes(const ConvArgs& a) { return conv_scratch_bytes(same(a)); }
  static int64_t transposed_tasks(const ConvArgs& a) { return conv_tasks(same(a)); }
  template <typename T>
  static bool transposed_block(const ConvArgs& a, int64_t task, void* memory) {
    const Layout layout(same(a));
    Arena scratch(memory);
    float* packed = scratch.take<float>(layout.packed());
    const int64_t z_step = layout.v_rows() * layout.c, m_step = layout.m_rows() * layout.k;
    float* z = scratch.take<float>(POINTS * POINTS * z_step);
    float* m = scratch.take<float>(POINTS * POINTS * m_step);
    const int64_t offset = 0;
    const int64_t tiles = layout.each(task, [&](const Tiles& t, int64_t at) {
      transform_gradient<T>(source_of(a), t, layout.c, packed, z + at * layout.c, z_step, nullptr);
    });
    for (int p = 0; p < POINTS * POINTS; ++p) {
      // Which the products run on into.
      for (int64_t i = 0; i < max_rows * layout.c; ++i) z[p * z_step + tiles * layout.c + i] = 0;
      multiply<float>(z + p * z_step, layout.c, tiles, &offset, 1, layout.c,
                      static_cast<const float*>(a.prepared) + p * layout.filter(), layout.k,
                      m + p * m_step, longest_sum);
    }
    float* sums = packed;
    bool finite = true;
    layout.each(task, [&](const Tiles& t, int64_t at) {
      const int64_t rows = TILE * t.rows + TAPS - 1, columns = TILE * t.columns + TAPS - 1,
                    outside = a.kernel - 1 - a.padding;  // pixels before the result's first
      for (int64_t i = 0; i < rows * columns * layout.k; i += lanes<float>)
        store_vec(sums + i, F32{});
      finite &= spread_output(t, m + at * layout.k, m_step, layout.k, columns, sums);
      epilogue<T, float>(a, sums + outside * (columns + 1) * layout.k, columns, layout.k,
                         {t.block.n, 0, 0, a.out_height(), a.out_width()});
    });
    return finite;
  }
  static bool transposed(const ConvArgs& a, int64_t task, void* scratch) {
    return with_float_type(a.dtype,
                           [&]<typename T>() { return transposed_block<T>(a, task, scratch); });
  }

  static constexpr ConvKernels transposed_kernels = {
      .serves = serves_transposed,
      .tile = tile,
      .reads_winners = true,
      .prepared_bytes = prepared_bytes,
      .prepare = prepare_transposed,
      .conv_scratch_bytes = transposed_scratch_bytes,
      .conv_tasks = transposed_tasks,
      .conv = transposed,
  };

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

extern const ConvKernels winograd_large, winograd_5x5, winograd_5x5_transposed, winograd_2x2;
const ConvKernels winograd_large = Pieces<Winograd44>::kernels;
const ConvKernels winograd_5x5 = Pieces<Winograd35>::kernels;
const ConvKernels winograd_5x5_transposed = Pieces<Winograd35>::transposed_kernels;
const ConvKernels winograd_2x2 = Pieces<Winograd52>::kernels;

}  // namespace fastda::cpu::FASTDA_ISA
