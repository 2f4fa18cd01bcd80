// Compiled once per instruction set, with FASTDA_ISA naming it.
//
// 3 x 3 filters on maps of many tiles. A block of groups goes through three stages,
// all within the second-level cache:
//
//   input
//     |  B' d B
//   V[group][36][6 tiles][C]
//     |  36 matrix products
//   M[group][36][6 tiles][K]
//     |  A' m A
//   output
//
// Point t of every group of the block uses the same C x K matrix, which stays in the first-level
// cache meanwhile. M of point t is written where V of point t - 1 lay.
#include "cpu/conv/epilogue.h"
#include "cpu/conv/gemm.h"

#if FASTDA_SIMD
#include <unistd.h>
#endif

namespace fastda::cpu::FASTDA_ISA {
#if FASTDA_SIMD
namespace {

// Fetches, bit by bit while the products run, what the block's output stage and the next block's
// input stage will touch: they would wait for memory otherwise, and the products leave it idle.
struct Prefetch {
  struct Piece {
    const char* base;
    int64_t rows, row_stride, count, stride, bytes;  // `count` x `rows` segments of `bytes`
  };
  Piece pieces[64];
  int size = 0, piece = 0;
  int64_t row = 0, index = 0, lines = 0;
  // Lines listed at a time, and of a segment: a list of 6 KiB, filled anew every few hundred calls.
  static constexpr int64_t BATCH = 256, LONGEST = 512;
  const char* list[BATCH + LONGEST];
  int64_t used = 0, filled = 0;  // of the list

  void add(const View& x, int64_t size_of, bool channels_last, const Grid& grid, int64_t channels,
           int64_t begin, int64_t end, int64_t below) {
    if (x.data == nullptr) return;
    for (int64_t tile = begin; tile < end && size < 64;) {
      const int64_t tile_row = tile / grid.cols, col = tile % grid.cols,
                    count = min(end - tile, grid.cols - col);
      tile += count;
      const int64_t y = tile_row % grid.rows * 4 + below,
                    width = min(count * 4, grid.width - col * 4);
      Piece& p = pieces[size];
      p.base = static_cast<const char*>(x.data) +
               (tile_row / grid.rows * x.n + y * x.h + col * 4 * x.w) * size_of;
      p.rows = min(4, grid.height - y);
      p.row_stride = x.h * size_of;
      if (channels_last) {
        p.count = count;
        p.stride = 4 * x.w * size_of;
        p.bytes = (3 * x.w + channels) * size_of;
        if (width < count * 4) --p.count;  // not past the row's end
      } else {
        p.count = channels;
        p.stride = x.c * size_of;
        p.bytes = width * size_of;
        if (x.h == width && p.rows > 0) {  // the rows touch
          p.bytes *= p.rows;
          p.rows = 1;
        }
      }
      if (p.rows <= 0 || p.count <= 0) continue;
      p.bytes = min(p.bytes, 64 * LONGEST);
      lines += p.rows * p.count * ceil_div(p.bytes, 64);
      ++size;
    }
  }

  // The next `wanted` lines, or none where there are not so many left. Valid until the next call.
  Lines take(int64_t wanted) {
    if (used + wanted > filled) refill();
    if (used + wanted > filled) return {};
    used += wanted;
    return {list + used - wanted, wanted};
  }
  void refill() {
    for (int64_t i = used; i < filled; ++i) list[i - used] = list[i];
    filled -= used;
    used = 0;
    while (filled < BATCH && piece < size) {
      const Piece& p = pieces[piece];
      const char* from = p.base + index * p.stride + row * p.row_stride;
      for (int64_t i = 0; i < p.bytes; i += 64) list[filled++] = from + i;
      if (++row == p.rows) {
        row = 0;
        if (++index == p.count) {
          index = 0;
          ++piece;
        }
      }
    }
  }
};

void multiply_all(const Workspace& v, const Workspace& m, int64_t groups, const float* weights,
                  int64_t C, int64_t K, Prefetch& prefetch) {
  const int64_t vectors = ceil_div(K, VL);
  // Sums of at most 128 products, and then of these: one sum of 256 has half again the rounding
  // error.
  const int64_t parts = ceil_div(C, 128), depth = ceil_div(C, parts);
  const int64_t calls = 36 * groups * ceil_div(vectors, panel_vectors) * parts;
  const int64_t share = min(round_up(ceil_div(prefetch.lines, calls), 2), depth / 2 * 2);
  for (int t = 0; t < 36; ++t) {
    const float* u = weights + t * matrix_floats(C, K);
    each_panel(vectors, [&]<int N>(Width<N>, int64_t first) {
      for (int64_t c = 0; c < C; c += depth) {
        const float* panel = u + first * VL * C + c * N * VL;
        // Of the next panel, each group fetches its share.
        const int64_t n = min(depth, C - c), pace = N * VL / groups;
        const float* ahead = panel + n * N * VL;
        for (int64_t g = 0; g < groups; ++g, ahead += n * pace) {
          const float* from = v.data + g * v.group + (t + 1) * v.slot + c;
          const float* next = g + 1 < groups ? from + v.group : v.data + (t + 2) * v.slot + c;
          (c == 0 ? multiply_tiles<N, false>
                  : multiply_tiles<N, true>)(from, v.channels, panel, n,
                                             m.data + g * m.group + t * m.slot + first * VL,
                                             m.channels, next, ahead, pace, prefetch.take(share));
        }
      }
    });
  }
}

template <typename T>
bool transform_output(const ConvArgs& p, const Grid& grid, int64_t begin, int64_t end,
                      const Workspace& m, Scratch& scratch) {
  F32 finite = broadcast(0.0f);
  each_run_and_vector(
      p.out_channels_last, grid, begin, end, 0, p.out_channels,
      [&](const Run& run, int64_t k) { output_run<T>(p, grid, run, k, m, scratch, finite); });
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

// Groups per block. At least 4, so that each point's matrix is used several times; at most 21, the
// most that were measured; and so many that the workspace takes about a fifth of the second-level
// cache: filters of 64 channels take more than a quarter, and the tensors stream through the rest.
// 22 % are 4 groups of 64 channels in 1 MiB and 7 in 2 MiB, where 14 were 10 to 40 % slower.
int64_t block_groups(int64_t group_floats) {
  return max(4, min(21, cache_floats() * 22 / 100 / group_floats));
}

// Few channels leave the transforms alone at work, and a map of less than a tile is mostly padding.
bool serves(const ConvProblem& p) {
  return p.kernel == 3 && p.dtype != DType::f64 && min(p.in_channels, p.out_channels) >= 16 &&
         min(p.height, p.width) >= tile_size && min(p.out_height(), p.out_width()) >= tile_size;
}

// Blocks of a convolution, near `step` groups each.
struct Blocks {
  Grid grid;
  int64_t group_floats, step, count;
  explicit Blocks(const ConvArgs& p) : grid(p) {
    group_floats = Workspace(nullptr, max(padded(p.in_channels), padded(p.out_channels)), 37).group;
    step = block_groups(group_floats);
    count = ceil_div(grid.groups, step);
  }
  int64_t begin(int64_t block) const {
    return min(grid.groups * block / count * group_tiles, grid.tiles);
  }
};

int64_t prepared_bytes(const ConvArgs& p) {
  return 4 * 36 * matrix_floats(p.in_channels, p.out_channels);
}

template <typename T>
void transform_filter(const ConvArgs& p, float* prepared) {
  const int64_t inputs = p.in_channels, outputs = p.out_channels, vectors = ceil_div(outputs, VL);
  const int64_t size = matrix_floats(inputs, outputs);
  for (int64_t v = 0; v < vectors; ++v) {
    const auto [offset, stride] = panel_column(v, vectors, inputs);
    for (int64_t c0 = 0; c0 < inputs; c0 += VL) {
      alignas(64) Taps taps[VL];
      const int64_t n = min(VL, inputs - c0);
      load_taps<T>(p.filter, v * VL, outputs, c0, n, taps);
      for (int64_t c = 0; c < n; ++c)
        transform_taps(taps[c], prepared + offset + (c0 + c) * stride, size);
    }
  }
}
void prepare(const ConvArgs& p, void* prepared) {
  with_float_type(p.dtype,
                  [&]<typename T>() { transform_filter<T>(p, static_cast<float*>(prepared)); });
}

int64_t conv_scratch_bytes(const ConvArgs& p) {
  const Blocks blocks(p);
  return int64_t(sizeof(Scratch)) + 4 * min(blocks.grid.groups, blocks.step) * blocks.group_floats;
}
int64_t conv_tasks(const ConvArgs& p) { return Blocks(p).count; }

// The tiles [begin, end); those before `next` come next.
template <typename T>
bool conv_tiles(const ConvArgs& p, int64_t begin, int64_t end, int64_t next, void* workspace) {
  const Grid grid(p);
  Scratch& scratch = *static_cast<Scratch*>(workspace);
  float* data = reinterpret_cast<float*>(&scratch + 1);
  // Both lie in the same slots; their own numbers of channels set the distance of the tiles alone.
  Workspace v(data, max(padded(p.in_channels), padded(p.out_channels)), 37), m = v;
  v.channels = padded(p.in_channels);
  m.channels = padded(p.out_channels);
  const Source source = source_of(p);
  transform_input_tiles<T>(source, grid, begin, end, v, 1, scratch);
  clear_rest(v, end - begin, 1);
  Prefetch prefetch;
  const View* const outputs[] = {&p.residual, &p.residual_mask, &p.out_mask, &p.out};
  for (const View* x : outputs)
    prefetch.add(*x, sizeof(T), p.out_channels_last, grid, p.out_channels, begin, end, 0);
  const View* const inputs[] = {&p.x, &p.x_mask};
  for (const View* x : inputs)
    prefetch.add(*x, sizeof(T), p.x_channels_last, grid, p.in_channels, end, next, 2 - p.padding);
  multiply_all(v, m, ceil_div(end - begin, group_tiles), static_cast<const float*>(p.prepared),
               p.in_channels, p.out_channels, prefetch);
  return transform_output<T>(p, grid, begin, end, m, scratch);
}
bool conv(const ConvArgs& p, int64_t task, void* scratch) {
  const Blocks blocks(p);
  const int64_t next = blocks.begin(min(task + 2, blocks.count));
  bool finite = false;
  with_float_type(p.dtype, [&]<typename T>() {
    finite = conv_tiles<T>(p, blocks.begin(task), blocks.begin(task + 1), next, scratch);
  });
  return finite;
}

void accumulate_all(const Workspace& v, const Workspace& z, int64_t groups, float* partial,
                    int64_t C, int64_t K, bool first, Prefetch& prefetch) {
  const int64_t vectors = ceil_div(K, VL);
  const int64_t calls = 36 * ceil_div(C, 6) * ceil_div(vectors, panel_vectors);
  const int64_t share = min(ceil_div(prefetch.lines, calls), groups * group_tiles);
  for (int t = 0; t < 36; ++t) {
    each_panel(vectors, [&]<int N>(Width<N>, int64_t vector) {
      accumulate_panel<N>(v.data + t * v.slot, v, z.data + t * z.slot + vector * VL, z, groups, C,
                          partial + t * matrix_floats(C, K) + vector * VL * C, first,
                          [&] { return prefetch.take(share); });
    });
  }
}

int64_t chunks(const FilterGradArgs& p) { return max(1, min(8, Grid(p).groups / 32)); }
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

// Of a chunk: its tiles, and how many of them are a block.
struct GradTiles {
  int64_t begin, end, block;
  GradTiles(const FilterGradArgs& p, const Grid& grid, int64_t chunk) {
    const int64_t count = chunks(p), first = grid.groups * chunk / count;
    const int64_t groups = grid.groups * (chunk + 1) / count - first;
    begin = first * group_tiles;
    end = min((first + groups) * group_tiles, grid.tiles);
    block = ceil_div(groups, ceil_div(groups, block_groups(grad_group_floats(p)))) * group_tiles;
  }
};

double* bias_sums(const FilterGradArgs& p, float* partial) {
  return reinterpret_cast<double*>(partial + 36 * matrix_floats(p.in_channels, p.out_channels));
}

// Adds what the tiles [begin, end) contribute, the `first` of their chunk or not; those before
// `next` come next.
template <typename T>
void grad_tiles(const FilterGradArgs& p, int64_t begin, int64_t end, int64_t next, bool first,
                float* partial, void* workspace) {
  const Grid grid(p);
  const int64_t groups = ceil_div(end - begin, group_tiles);
  Scratch& scratch = *static_cast<Scratch*>(workspace);
  const Workspace v(reinterpret_cast<float*>(&scratch + 1), padded(p.in_channels), 36);
  const Workspace z(v.data + groups * v.group, padded(p.out_channels), 36);
  double* sums = bias_sums(p, partial);
  if (first)
    for (int64_t k = 0; k < padded(p.out_channels); ++k) sums[k] = 0;
  const Source input = source_of(p);
  const Source grad = grad_source_of(p);
  transform_input_tiles<T>(input, grid, begin, end, v, 0, scratch);
  transform_gradient_tiles<T>(grad, grid, begin, end, z, sums, scratch);
  clear_rest(v, end - begin, 0);
  clear_rest(z, end - begin, 0);
  Prefetch prefetch;
  prefetch.add(p.x, sizeof(T), p.x_channels_last, grid, p.in_channels, end, next, 2 - p.padding);
  const View* const grads[] = {&p.grad, &p.grad_mask};
  for (const View* x : grads)
    prefetch.add(*x, sizeof(T), p.grad_channels_last, grid, p.out_channels, end, next, 0);
  accumulate_all(v, z, groups, partial, p.in_channels, p.out_channels, first, prefetch);
}

template <typename T>
void grad_chunk(const FilterGradArgs& p, int64_t chunk, float* partial, void* workspace) {
  const GradTiles tiles(p, Grid(p), chunk);
  for (int64_t begin = tiles.begin; begin < tiles.end; begin += tiles.block) {
    const int64_t end = min(begin + tiles.block, tiles.end),
                  next = min(end + tiles.block, tiles.end);
    grad_tiles<T>(p, begin, end, next, begin == tiles.begin, partial, workspace);
  }
}
void filter_grad(const FilterGradArgs& p, int64_t chunk, void* sums, void* scratch) {
  with_float_type(
      p.dtype, [&]<typename T>() { grad_chunk<T>(p, chunk, static_cast<float*>(sums), scratch); });
}

template <typename T>
bool combine_chunks(const FilterGradArgs& p, const float* partials, T* d_bias) {
  const int64_t C = p.in_channels, K = p.out_channels, vectors = ceil_div(K, VL),
                size = matrix_floats(C, K);
  const int64_t distance = sum_floats(p), count = chunks(p);
  if (d_bias) {
    for (int64_t k = 0; k < K; ++k) {
      double sum = 0;
      for (int64_t i = 0; i < count; ++i)
        sum += reinterpret_cast<const double*>(partials + i * distance + 36 * size)[k];
      store(d_bias + k, float(sum));
    }
  }
  F32 finite = broadcast(0.0f);
  for (int64_t vector = 0; vector < vectors; ++vector) {
    const auto [offset, stride] = panel_column(vector, vectors, C);
    for (int64_t c = 0; c < C; ++c) {
      const float* from = partials + offset + c * stride;
      alignas(64) Taps taps;
      taps_gradient(
          [&](int t) __attribute__((always_inline)) {
            F32 u = load_vec(from + t * size);
            for (int64_t n = 1; n < count; ++n) u = u + load_vec(from + t * size + n * distance);
            return u;
          },
          taps, finite);
      store_taps<T>(p.d_filter, vector * VL, K, c, taps);
    }
  }
  return all_zero(finite);
}
bool combine(const FilterGradArgs& p, const void* sums, void* d_bias) {
  bool finite = false;
  with_float_type(p.dtype, [&]<typename T>() {
    finite = combine_chunks<T>(p, static_cast<const float*>(sums), static_cast<T*>(d_bias));
  });
  return finite;
}

// --- the backward of two convolutions, a few rows at a time

// The window of rows that a chunk has of what lies between. Three cursors walk over its tiles:
//
//   chunk's tiles       begin |-----------------------------------------------| end
//   between is made    |=========================================> made    (and `reach` tiles more
//   summed in d filter       |============================> summed           at either end)
//   taken to the input       |=====================> passed
//   rows kept                         [.................................]
//                                   base                           base + rows
//
// `made` keeps ahead of `summed` by as much as a block of the filter's gradient takes, and of
// `passed` by `reach`, for a tile of the input sees the tiles around it. When the window is full,
// the rows that `summed` and `passed` still need move up to its beginning.
struct Band {
  Grid grid;
  int64_t conv_tiles;     // of a block
  int64_t reach;          // tiles before and behind a tile that its 6 x 6 pixels touch
  int64_t scratch_bytes;  // of the convolutions; the window lies behind it
  int64_t row, rows;      // elements of a row; rows that there is room for
  Band(const ConvArgs& between, const ConvArgs& to_input, const FilterGradArgs& to_filter)
      : grid(between),
        conv_tiles(min(Blocks(between).step, Blocks(to_input).step) * group_tiles),
        reach(grid.cols + 1),
        row(between.out_channels * between.width) {
    const int64_t bytes[] = {conv_scratch_bytes(between), conv_scratch_bytes(to_input),
                             filter_grad_scratch_bytes(to_filter)};
    scratch_bytes = round_up(max(max(bytes[0], bytes[1]), bytes[2]), 64);
    // As many tiles may be made before the first of them is through. Twice their rows, for moving
    // them up each time would cost as much as making them.
    const int64_t tiles = reach + 2 * conv_tiles + GradTiles(to_filter, grid, 0).block;
    rows = 2 * (4 * (ceil_div(tiles, grid.cols) + 1) + 1);
  }
  // The tile's first row, counted through all images, or one `below`.
  int64_t row_of(int64_t tile, int64_t below = 0) const {
    const int64_t tile_row = tile / grid.cols;
    return tile_row / grid.rows * grid.height + min(grid.height, tile_row % grid.rows * 4 + below);
  }
  // First tile of the image of the tile, or of the first image that begins at it or later.
  int64_t image_of(int64_t tile) const { return tile - tile % (grid.rows * grid.cols); }
  int64_t next_image(int64_t tile) const { return round_up(tile, grid.rows * grid.cols); }
};

int64_t band_scratch_bytes(const ConvArgs& between, const ConvArgs& to_input,
                           const FilterGradArgs& to_filter) {
  const Band band(between, to_input, to_filter);
  const int64_t bytes = band.rows * band.row * size_of(between.dtype);
  const bool worthwhile = 2 * band.rows <= between.batch * between.height && bytes <= 4 << 20;
  return worthwhile ? band.scratch_bytes + bytes : 0;
}

template <typename T>
bool band_chunk(ConvArgs between, ConvArgs to_input, FilterGradArgs to_filter, int64_t chunk,
                float* partial, char* workspace) {
  const Band band(between, to_input, to_filter);
  const GradTiles tiles(to_filter, band.grid, chunk);
  T* const window = reinterpret_cast<T*>(workspace + band.scratch_bytes);
  // Tiles are made, then summed up in the filter's gradient, then passed on to the input.
  int64_t made = max(tiles.begin - band.reach, band.image_of(tiles.begin));
  int64_t summed = tiles.begin, passed = tiles.begin, base = 0;
  const int64_t last = min(tiles.end + band.reach, band.next_image(tiles.end));
  bool finite = true;
  const auto open_at = [&](int64_t row) {
    base = row;
    const View rows{window - base * band.row, between.height * band.row, 1, band.row,
                    between.out_channels};
    between.out = to_input.x = to_filter.grad = rows;
  };
  const auto make = [&](int64_t until) {
    while (made < until) {
      const int64_t end = min(made + band.conv_tiles, last);
      if (band.row_of(end - 1, 4) - base > band.rows) {
        int64_t wanted = max(band.row_of(passed) - 1, band.row_of(band.image_of(passed)));
        if (summed < tiles.end) wanted = min(wanted, band.row_of(summed));
        const int64_t rows = band.row_of(made - 1, 4) - wanted;
        if (rows > 0)
          std::memmove(window, window + (wanted - base) * band.row,
                       size_t(rows * band.row) * sizeof(T));
        open_at(wanted);
      }
      finite &= conv_tiles<T>(between, made, end, min(end + band.conv_tiles, last), workspace);
      made = end;
    }
  };
  // What lies between is not there to draw from: its first tiles stand for the chunk.
  const auto set_range = [&](int64_t row, int64_t rows) {
    Source source = source_of(to_input);
    source.height = rows;
    source.x.data = window + (row - base) * band.row;
    const float usual = usual_magnitude<T>(source, 1);
    to_input.range.limit = most * usual;
    to_filter.grad_range.limit = std::sqrt(most) * tile_size * usual;
  };
  open_at(band.row_of(made));
  while (summed < tiles.end || passed < tiles.end) {
    if (summed < tiles.end) {
      const int64_t end = min(summed + tiles.block, tiles.end),
                    next = min(end + tiles.block, tiles.end);
      make(end);
      if (summed == tiles.begin) {
        const int64_t row = band.row_of(summed);
        set_range(row, band.row_of(end - 1, 4) - row);
      }
      grad_tiles<T>(to_filter, summed, end, next, summed == tiles.begin, partial, workspace);
      summed = end;
    }
    while (passed < tiles.end) {
      const int64_t end = min(passed + band.conv_tiles, tiles.end);
      const int64_t wanted = min(end + band.reach, band.next_image(end));
      if (wanted > made && summed < tiles.end) break;
      make(wanted);
      finite &=
          conv_tiles<T>(to_input, passed, end, min(end + band.conv_tiles, tiles.end), workspace);
      passed = end;
    }
  }
  return finite;
}
bool band(const ConvArgs& between, const ConvArgs& to_input, const FilterGradArgs& to_filter,
          int64_t chunk, void* sums, void* scratch) {
  bool finite = false;
  with_float_type(between.dtype, [&]<typename T>() {
    finite = band_chunk<T>(between, to_input, to_filter, chunk, static_cast<float*>(sums),
                           static_cast<char*>(scratch));
  });
  return finite;
}

// Named: a lambda here would have a symbol that the other instruction sets could take.
Tile tile_of(const ConvProblem&) { return {tile_size, tile_size + 2}; }

}  // namespace

extern const ConvKernels winograd_tiles;
const ConvKernels winograd_tiles = {
    .serves = serves,
    .tile = tile_of,
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
    .band_scratch_bytes = band_scratch_bytes,
    .band = band,
};

#else

extern const ConvKernels winograd_tiles;
const ConvKernels winograd_tiles = {};

#endif
}  // namespace fastda::cpu::FASTDA_ISA
