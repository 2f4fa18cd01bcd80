// Where operands of the convolutions lie: blocks of an image, tiles, panels of a packed filter, and
// the arena that scratch memory is taken from. Internal linkage throughout: see common/dtype.h.
#pragma once

#include <initializer_list>

#include "cpu/conv/problem.h"
#include "cpu/simd/generic.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int VL = lanes<float>;
template <typename S = float>
int64_t padded(int64_t channels) {
  return round_up(channels, lanes<S>);
}

// Fewer input channels than a vector of float has lanes where it is widest.
inline bool few_inputs(const ConvProblem& p) { return p.in_channels < 16; }

template <typename T>
const T* at(const View& v, int64_t n, int64_t c, int64_t h, int64_t w) {
  return static_cast<const T*>(v.data) + n * v.n + c * v.c + h * v.h + w * v.w;
}

// Calls f.operator()<T, S>() with the element and the accumulator type.
template <typename F>
decltype(auto) with_types(DType dtype, F&& f) {
  return dispatch(dtype, [&]<typename T>() -> decltype(auto) {
    return f.template operator()<T, typename Acc<T>::type>();
  });
}
// Calls f.operator()<T>() with the element type: anything but double.
template <typename F>
decltype(auto) with_float_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16: return f.template operator()<bf16>();
    case DType::f16: return f.template operator()<f16>();
    default: return f.template operator()<float>();
  }
}

// Pixels of images that lie in one row, where nothing is read beside them.
template <typename Args>
Args flat(Args a, std::initializer_list<const View*> views) {
  bool dense = a.kernel == 1 && a.padding == 0;
  for (const View* v : views) dense = dense && (!v->data || v->h == a.width * v->w);
  if (dense) {
    a.width *= a.height;
    a.height = 1;
  }
  return a;
}
inline ConvArgs flat(const ConvArgs& a) {
  return flat(a, {&a.x, &a.x_mask, &a.residual, &a.residual_mask, &a.out_mask, &a.out});
}
inline FilterGradArgs flat(const FilterGradArgs& a) {
  return flat(a, {&a.x, &a.grad, &a.grad_mask});
}

// Scratch memory, handed out in pieces that begin at cache lines.
struct Arena {
  char* next;

  explicit Arena(void* memory) : next(static_cast<char*>(memory)) {}
  template <typename S>
  static constexpr int64_t bytes(int64_t count) {
    return round_up(count * int64_t(sizeof(S)), 64);
  }
  template <typename S>
  S* take(int64_t count) {
    S* p = reinterpret_cast<S*>(next);
    next += bytes<S>(count);
    return p;
  }
};

// A packed filter is a matrix of `rows` rows, one for every tap and input channel, in panels of at
// most panel_vectors vectors of output channels:
//
//   panel 0                          panel 1
//   row 0: vector 0, 1, 2, 3         row 0: vector 4, 5
//   row 1: vector 0, 1, 2, 3         row 1: vector 4, 5
//   ...                              ...
//
// so that a micro-kernel reads its panel from beginning to end. A vector's column begins at
// `offset`, `stride` elements from row to row.
constexpr int panel_vectors = vector_registers == 32 ? 4 : 2;
struct PanelColumn {
  int64_t offset, stride;
};
template <typename S = float>
PanelColumn panel_column(int64_t vector, int64_t vectors, int64_t rows) {
  const int64_t first = vector / panel_vectors * panel_vectors;
  const int64_t stride = min(panel_vectors, vectors - first) * lanes<S>;
  return {.offset = first * lanes<S> * rows + (vector - first) * lanes<S>, .stride = stride};
}

// A rectangle of one image.
struct Block {
  int64_t n, h, w, rows, columns;
};

// How an image is cut into blocks: whole rows if they are not too long, as many as fit `bytes` with
// their sums.
struct Blocking {
  int64_t rows, columns, per_column, per_row, tasks;
  Block block(int64_t task, int64_t height, int64_t width) const {
    const int64_t n = task / (per_column * per_row), rest = task % (per_column * per_row);
    const int64_t h = rest / per_row * rows, w = rest % per_row * columns;
    return {n, h, w, min(rows, height - h), min(columns, width - w)};
  }
};
inline Blocking block_image(int64_t batch, int64_t height, int64_t width, int64_t bytes_per_pixel,
                            int64_t budget) {
  const int64_t pixels = max(1, budget / bytes_per_pixel);
  const int64_t columns = ceil_div(width, ceil_div(width, max(16, min(pixels, 256))));
  const int64_t rows = ceil_div(height, ceil_div(height, max(1, min(height, pixels / columns))));
  const int64_t per_column = ceil_div(height, rows), per_row = ceil_div(width, columns);
  return {rows, columns, per_column, per_row, batch * per_column * per_row};
}

// Into how many chunks the `tasks` of a filter's gradient go, each with sums of its own: enough for
// some threads, and 8 MiB of sums at most unless that left fewer than 4.
inline int64_t chunk_count(int64_t tasks, int64_t sum_bytes) {
  return min(tasks, max(4, min(16, (8 << 20) / sum_bytes)));
}

// -- tiles of Winograd F(4x4, 3x3)

constexpr int tile_size = 4;     // pixels of the output each way
constexpr int group_tiles = 6;   // that a micro-kernel takes together: its rows
constexpr int longest_run = 15;  // tiles transformed together: 29 KB between the two transforms

// Of the output of a convolution: height and width are its.
struct Grid {
  int64_t height, width, rows, cols, tiles, groups;
  explicit Grid(const ConvProblem& p)
      : height(p.out_height()),
        width(p.out_width()),
        rows(ceil_div(height, tile_size)),
        cols(ceil_div(width, tile_size)),
        tiles(p.batch * rows * cols),
        groups(ceil_div(tiles, group_tiles)) {}
};

// Neighbouring tiles of one row of tiles: the first one's image, row and column, and its position
// in the block of tiles that is at work.
struct Run {
  int64_t image, row, column, count, position;
};

// Calls f(run) for the tiles [begin, end), cut into runs of about equal length.
template <typename F>
FASTDA_INLINE void each_run(const Grid& grid, int64_t begin, int64_t end, F&& f) {
  for (int64_t tile = begin; tile < end;) {
    const int64_t row = tile / grid.cols, column = tile % grid.cols;
    const int64_t left = min(end - tile, grid.cols - column);
    const int64_t count = ceil_div(left, ceil_div(left, longest_run));
    f(Run{.image = row / grid.rows,
          .row = row % grid.rows,
          .column = column,
          .count = count,
          .position = tile - begin});
    tile += count;
  }
}

// Visits all runs and vectors of the channels [c0, c1) of a block, in the order in which the
// tensor's layout lies in memory.
template <typename F>
FASTDA_INLINE void each_run_and_vector(bool channels_last, const Grid& grid, int64_t begin,
                                       int64_t end, int64_t c0, int64_t c1, F&& f) {
  if (channels_last) {
    each_run(grid, begin, end, [&](const Run& run) {
      for (int64_t c = c0; c < c1; c += lanes<float>) f(run, c);
    });
  } else {
    for (int64_t c = c0; c < c1; c += lanes<float>)
      each_run(grid, begin, end, [&](const Run& run) { f(run, c); });
  }
}

// [group][slot][tile][channel], one slot per interpolation point, the channels from `first` on.
// `slot` is an odd number of cache lines, so that the 36 lines of one tile fall into different
// sets.
struct Workspace {
  float* data;
  int64_t channels, slot, group, first = 0;
  Workspace(float* p, int64_t c, int64_t slots)
      : data(p), channels(c), slot(group_tiles * c + 16), group(slots * slot) {}
  float* at(int64_t tile, int64_t point, int64_t channel) const {
    return data + tile / group_tiles * group + point * slot + tile % group_tiles * channels +
           (channel - first);
  }
};

// Distance of the C x K matrices of two interpolation points: not a power of two, for the lines of
// all 36 would fall into one set of the first-level cache.
inline int64_t matrix_floats(int64_t C, int64_t K) { return C * padded(K) + 16; }

}  // namespace
}  // namespace fastda::cpu::FASTDA_ISA
