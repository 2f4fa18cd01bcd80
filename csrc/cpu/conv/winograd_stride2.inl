// Compiled once per instruction set, with FASTDA_ISA naming it.
//
// 4 x 4 filters with a stride of 2 by Winograd F(4x4, 2x2). Every second row and column of the padded
// image is a phase; the four phases, each with 2 x 2 of the taps, make one convolution of four times the
// channels and a stride of 1: 6.25 products an output instead of 16. The input transform reads the four
// phases of a patch of 10 x 10 pixels at once, where they lie:
//
//   input  ->  V[group][25][6 tiles][4 phases][C]  ->  M[group][25][6 tiles][K]  ->  output
//
// The data gradient is four convolutions of the output's gradient, by 2 x 2 of the taps, one for each
// phase of the input; the filter's gradient sums V' Z, with Z from the output's gradient.
#include "cpu/conv/epilogue.h"
#include "cpu/conv/gemm.h"

namespace fastda::cpu::FASTDA_ISA {
#if FASTDA_SIMD
namespace {

using W = Winograd42;
constexpr int points = W::points * W::points;
constexpr int64_t stretch =
    4;  // tiles of a run whose columns stay in the first-level cache together
// Of a block. V and M leave the second-level cache in part, but so the transformed filter, which is larger
// than it, is read half as often; twice as many were slower again.
constexpr int64_t block_groups = 8;
// Products in one sum: see longest_sum in winograd_large.inl.
constexpr int64_t longest_sum = 64;

struct Room {
  Scratch scratch;
  alignas(64) float strip[10 * VL * VL];
  alignas(64) float columns[(8 * stretch + 2 + VL - 2) * 10 * VL];
};

// The tiles of a run from the rows and columns of s that begin `top` before row 0 and `left` before
// column 0. Of two phases each way, their channels are `phase` apart in v.
template <int Phases>
void transform_stretch(const Source& s, int64_t top, int64_t left, const Run& run, int64_t c,
                       const Workspace& v, int64_t phase, int64_t first_slot, Room& room) {
  constexpr int P = W::points, R = P * Phases;
  Peak peak;
  each_column<float, R>(s, run.image, c, run.row * 4 * Phases - top, run.column * 4 * Phases - left,
                        (run.count * 4 + 1) * Phases, room.strip,
                        [&](int64_t i, const F32* d) __attribute__((always_inline)) {
#pragma GCC unroll 2
                          for (int p = 0; p < Phases; ++p) {
                            F32 x[P], t[P];
#pragma GCC unroll 5
                            for (int r = 0; r < P; ++r) {
                              x[r] = d[Phases * r + p];
                              peak.add(x[r]);
                            }
                            W::input(x, t);
#pragma GCC unroll 5
                            for (int r = 0; r < P; ++r)
                              store_vec(room.columns + (i * R + p * P + r) * VL, t[r]);
                          }
                        });
  peak.note(s.range, run.image);
  for (int64_t q = 0; q < run.count; ++q) {
    float* out = v.at(run.position + q, first_slot, c);
    const float* in = room.columns + q * 4 * Phases * R * VL;
#pragma GCC unroll 1
    for (int row = 0; row < Phases; ++row)
#pragma GCC unroll 5
      for (int i = 0; i < P; ++i) {
#pragma GCC unroll 2
        for (int column = 0; column < Phases; ++column) {
          F32 d[P], t[P];
#pragma GCC unroll 5
          for (int j = 0; j < P; ++j)
            d[j] = load_vec(in + ((Phases * j + column) * R + row * P + i) * VL);
          W::input(d, t);
#pragma GCC unroll 5
          for (int j = 0; j < P; ++j)
            store_vec(out + (i * P + j) * v.slot + (row * Phases + column) * phase, t[j]);
        }
      }
  }
}
template <int Phases>
void transform_input(const Source& s, const Grid& grid, int64_t top, int64_t left, int64_t begin,
                     int64_t end, const Workspace& v, int64_t first_slot, Room& room) {
  each_run_and_vector(s.channels_last, grid, begin, end, 0, s.channels,
                      [&](const Run& run, int64_t c) {
                        for (int64_t i = 0; i < run.count; i += stretch)
                          transform_stretch<Phases>(s, top, left,
                                                    {.image = run.image,
                                                     .row = run.row,
                                                     .column = run.column + i,
                                                     .count = min(stretch, run.count - i),
                                                     .position = run.position + i},
                                                    c, v, padded(s.channels), first_slot, room);
                      });
  clear_rest(v, end - begin, first_slot, points);
}

// --- filters

// The taps of VL output channels, of one input channel; zeros past the last output channel.
using Taps4 = float[16][VL];

// Of `count` (at most VL) input channels from c on.
void load_taps4(const View& filter, int64_t k, int64_t outputs, int64_t c, int64_t count,
                Taps4* taps) {
  const int64_t valid = min(VL, outputs - k);
  const float* from = static_cast<const float*>(filter.data) + k * filter.n + c * filter.c;
  for (int t = 0; t < 16 && (filter.n == 1 || filter.c == 1); ++t) {
    const float* tap = from + t / 4 * filter.h + t % 4 * filter.w;
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
    for (int i = 0; i < VL; ++i) store_vec(taps[i][t], v[i]);
  }
  if (filter.n == 1 || filter.c == 1) return;
  const bool adjacent = filter.w == 1 && filter.h == 4;
  for (int64_t i = 0; i < count; ++i) {
    const float* row = from + i * filter.c;
    for (int t = 0; t < 16; t += VL) {
      F32 v[VL];
      for (int j = 0; j < VL; ++j) {
        v[j] = broadcast(0.0f);
        if (j >= valid) continue;
        const float* tap = row + j * filter.n;
        if (adjacent) {
          v[j] = load_vec(tap + t);
        } else {
          for (int l = 0; l < VL; ++l)
            v[j][l] = tap[(t + l) / 4 * filter.h + (t + l) % 4 * filter.w];
        }
      }
      transpose<float>(v);
      for (int j = 0; j < VL; ++j) store_vec(taps[i][t + j], v[j]);
    }
  }
}

// The tap of a phase: row and column y and x of its 2 x 2, or, rotated, 1 - y and 1 - x.
constexpr int tap_of(int phase, int y, int x) {
  return (phase / 2 + 2 * y) * 4 + phase % 2 + 2 * x;
}

// U[point][panel][rows][outputs in the panel].
struct Filter {
  int64_t rows, outputs;
  int64_t size() const { return matrix_floats(rows, outputs); }
  int64_t bytes() const { return 4 * points * size(); }
};

// Of `inputs` channels, or zeros up to a whole vector of them, in four phases. to(phase, channel) has
// the place of their row in a panel's column.
template <typename F>
void transform_filter(const View& filter, int64_t inputs, int64_t outputs, bool rotated,
                      int64_t size, F&& to) {
  for (int64_t k = 0; k < outputs; k += VL) {
    for (int64_t c0 = 0; c0 < inputs; c0 += VL) {
      alignas(64) Taps4 taps[VL] = {};
      load_taps4(filter, k, outputs, c0, min(VL, inputs - c0), taps);
      for (int64_t c = 0; c < VL; ++c)
        for (int phase = 0; phase < 4; ++phase) {
          F32 half[W::points][2];
          for (int x = 0; x < 2; ++x) {
            F32 w[2], u[W::points];
            for (int y = 0; y < 2; ++y)
              w[y] = load_vec(taps[c][tap_of(phase, rotated ? 1 - y : y, rotated ? 1 - x : x)]);
            W::filter(w, u);
            for (int i = 0; i < W::points; ++i) half[i][x] = u[i];
          }
          float* out = to(k / VL, phase, c0 + c);
          for (int i = 0; i < W::points; ++i) {
            F32 u[W::points];
            W::filter(half[i], u);
            for (int j = 0; j < W::points; ++j) store_vec(out + (i * W::points + j) * size, u[j]);
          }
        }
    }
  }
}

// --- products

void multiply_all(const Workspace& v, const Workspace& m, int64_t groups, const float* weights,
                  const Filter& filter) {
  const int64_t depth = ceil_div(filter.rows, ceil_div(filter.rows, longest_sum));
  for (int t = 0; t < points; ++t) {
    each_panel(ceil_div(filter.outputs, VL), [&]<int N>(Width<N>, int64_t first) {
      for (int64_t c = 0; c < filter.rows; c += depth) {
        const float* panel = weights + t * filter.size() + first * VL * filter.rows + c * N * VL;
        const int64_t part = min(depth, filter.rows - c), pace = N * VL / groups;
        const float* ahead =
            panel + part * N * VL;  // of the next one, each group fetches its share
        for (int64_t g = 0; g < groups; ++g, ahead += part * pace) {
          const float* from = v.data + g * v.group + (t + 1) * v.slot + c;
          const float* next = g + 1 < groups ? from + v.group : v.data + (t + 2) * v.slot + c;
          (c == 0 ? multiply_tiles<N, false>
                  : multiply_tiles<N, true>)(from, v.channels, panel, part,
                                             m.data + g * m.group + t * m.slot + first * VL,
                                             m.channels, next, ahead, pace, {});
        }
      }
    });
  }
}

// A convolution with 2 x 2 taps, by blocks of tiles. M of point t lies where V of point t - 1 was.
struct Blocks {
  Grid grid;
  Filter filter;
  int64_t channels, step, count;
  Blocks(const Grid& g, const Filter& f)
      : grid(g),
        filter(f),
        channels(max(f.rows, padded(f.outputs))),
        step(min(block_groups, g.groups)),
        count(ceil_div(g.groups, block_groups)) {}
  int64_t begin(int64_t block) const {
    return min(grid.groups * block / count * group_tiles, grid.tiles);
  }
  int64_t scratch_bytes() const {
    return int64_t(sizeof(Room)) + 4 * step * Workspace(nullptr, channels, points + 1).group;
  }

  // False where some value is not finite.
  template <int Phases>
  bool run(int64_t block, const Source& source, int64_t top, int64_t left, const float* weights,
           const ConvArgs& out, void* workspace) const {
    const int64_t first = begin(block), last = begin(block + 1);
    Room& room = *static_cast<Room*>(workspace);
    Workspace v(reinterpret_cast<float*>(&room + 1), channels, points + 1), m = v;
    v.channels = filter.rows;
    m.channels = padded(filter.outputs);
    transform_input<Phases>(source, grid, top, left, first, last, v, 1, room);
    multiply_all(v, m, ceil_div(last - first, group_tiles), weights, filter);
    F32 finite = broadcast(0.0f);
    each_run_and_vector(out.out_channels_last, grid, first, last, 0, filter.outputs,
                        [&](const Run& run, int64_t k) {
                          output_run<float, W>(out, grid, run, k, m, room.scratch, finite);
                        });
    return all_zero(finite);
  }
};

// Few channels leave the transforms alone at work. The transformed filter is six times the filter: few
// tiles do not repay it, and where it exceeds the caches by far, no number of them.
bool serves(const ConvProblem& p) {
  if (p.kernel != 4 || p.stride != 2 || p.dtype != DType::f32 || p.reflect ||
      min(p.in_channels, p.out_channels) < 16 || min(p.out_height(), p.out_width()) < tile_size)
    return false;
  return p.in_channels * p.out_channels <= min(1 << 15, 512 * Grid(p).tiles);
}
Tile tile_of(const ConvProblem&) { return {tile_size, 2 * tile_size + 2}; }

// --- convolution

Blocks blocks_of(const ConvArgs& p) {
  return {Grid(p), {4 * padded(p.in_channels), p.out_channels}};
}
int64_t prepared_bytes(const ConvArgs& p) { return blocks_of(p).filter.bytes(); }
void prepare(const ConvArgs& p, void* prepared) {
  const Filter f = blocks_of(p).filter;
  const int64_t channels = padded(p.in_channels), vectors = ceil_div(f.outputs, VL);
  transform_filter(p.filter, p.in_channels, f.outputs, false, f.size(),
                   [&](int64_t vector, int phase, int64_t c) {
                     const PanelColumn column = panel_column(vector, vectors, f.rows);
                     return static_cast<float*>(prepared) + column.offset +
                            (phase * channels + c) * column.stride;
                   });
}
int64_t conv_scratch_bytes(const ConvArgs& p) { return blocks_of(p).scratch_bytes(); }
int64_t conv_tasks(const ConvArgs& p) { return blocks_of(p).count; }
bool conv(const ConvArgs& p, int64_t task, void* scratch) {
  return blocks_of(p).run<2>(task, source_of(p), p.padding, p.padding,
                             static_cast<const float*>(p.prepared), p, scratch);
}

// --- data gradient: x is the output's gradient, out that of the input

// Every second row of the input, or column: the first of them, the pixel of the output's gradient that
// its two taps end at, and how many there are.
struct Phase {
  int64_t first, from, count;
  Phase(int64_t parity, int64_t padding, int64_t size)
      : first((parity + padding) % 2),
        from((first + padding - parity) / 2),
        count((size - first + 1) / 2) {}
};
Blocks phase_blocks(const ConvArgs& p, int64_t height, int64_t width) {
  ConvProblem grid = p;
  grid.height = height;
  grid.width = width;
  grid.kernel = grid.stride = 1;
  grid.padding = 0;
  return {Grid(grid), {padded(p.out_channels), p.in_channels}};
}
// Of the phases with the most rows and columns.
Blocks most_blocks(const ConvArgs& p) {
  return phase_blocks(p, (p.height + 1) / 2, (p.width + 1) / 2);
}
int64_t data_prepared_bytes(const ConvArgs& p) { return 4 * most_blocks(p).filter.bytes(); }
void prepare_data(const ConvArgs& p, void* prepared) {
  const Filter f = most_blocks(p).filter;
  const int64_t vectors = ceil_div(f.outputs, VL);
  View turned = p.filter;
  turned.n = p.filter.c;
  turned.c = p.filter.n;
  transform_filter(turned, p.out_channels, f.outputs, true, f.size(),
                   [&](int64_t vector, int phase, int64_t k) {
                     const PanelColumn column = panel_column(vector, vectors, f.rows);
                     return static_cast<float*>(prepared) + phase * points * f.size() +
                            column.offset + k * column.stride;
                   });
}
int64_t data_scratch_bytes(const ConvArgs& p) { return most_blocks(p).scratch_bytes(); }
int64_t data_tasks(const ConvArgs& p) { return 4 * most_blocks(p).count; }
bool data(const ConvArgs& p, int64_t task, void* scratch) {
  const int64_t phase = task % 4;
  const Phase rows(phase / 2, p.padding, p.height), columns(phase % 2, p.padding, p.width);
  const Blocks blocks = phase_blocks(p, rows.count, columns.count);
  if (task / 4 >= blocks.count) return true;
  ConvArgs out = p;
  out.out_channels = p.in_channels;
  out.out.data = const_cast<float*>(at<float>(p.out, 0, 0, rows.first, columns.first));
  out.out.h *= 2;
  out.out.w *= 2;
  Source source = source_of(p);
  source.channels = p.out_channels;
  source.height = p.out_height();
  source.width = p.out_width();
  const float* weights = static_cast<const float*>(p.prepared);
  return blocks.run<1>(task / 4, source, 1 - rows.from, 1 - columns.from,
                       weights + phase * points * blocks.filter.size(), out, scratch);
}

// --- filter gradient

int64_t grad_rows(const FilterGradArgs& p) { return 4 * padded(p.in_channels); }
int64_t filter_grad_scratch_bytes(const FilterGradArgs& p) {
  const int64_t group = Workspace(nullptr, grad_rows(p), points).group +
                        Workspace(nullptr, padded(p.out_channels), points).group;
  return int64_t(sizeof(Room)) + 4 * block_groups * group;
}
int64_t chunks(const FilterGradArgs& p) { return max(1, min(4, Grid(p).groups / 20)); }
// The bias' sums are doubles, behind the filter's.
int64_t filter_floats(const FilterGradArgs& p) {
  return points * matrix_floats(grad_rows(p), p.out_channels);
}
int64_t sum_floats(const FilterGradArgs& p) {
  return filter_floats(p) + 2 * padded(p.out_channels);
}
int64_t sum_bytes(const FilterGradArgs& p) { return 4 * sum_floats(p); }

void filter_grad(const FilterGradArgs& p, int64_t chunk, void* sums, void* workspace) {
  const Grid grid(p);
  const int64_t first = grid.groups * chunk / chunks(p),
                groups = grid.groups * (chunk + 1) / chunks(p) - first;
  const int64_t blocks = ceil_div(groups, block_groups), rows = grad_rows(p);
  const int64_t size = matrix_floats(rows, p.out_channels);
  Room& room = *static_cast<Room*>(workspace);
  float* filter = static_cast<float*>(sums);
  double* bias = reinterpret_cast<double*>(filter + filter_floats(p));
  for (int64_t k = 0; k < padded(p.out_channels); ++k) bias[k] = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const auto tile = [&](int64_t b) {
      return min(grid.tiles, (first + groups * b / blocks) * group_tiles);
    };
    const int64_t begin = tile(block), end = tile(block + 1),
                  count = ceil_div(end - begin, group_tiles);
    const Workspace v(reinterpret_cast<float*>(&room + 1), rows, points);
    const Workspace z(v.data + count * v.group, padded(p.out_channels), points);
    transform_input<2>(source_of(p), grid, p.padding, p.padding, begin, end, v, 0, room);
    transform_gradient_tiles<float, W>(grad_source_of(p), grid, begin, end, z, bias, room.scratch);
    clear_rest(z, end - begin, 0, points);
    for (int t = 0; t < points; ++t)
      each_panel(ceil_div(p.out_channels, VL), [&]<int N>(Width<N>, int64_t vector) {
        accumulate_panel<N>(v.data + t * v.slot, v, z.data + t * z.slot + vector * VL, z, count,
                            rows, filter + t * size + vector * VL * rows, block == 0,
                            [] { return Lines{}; });
      });
  }
}

void store_taps4(const View& filter, int64_t k, int64_t outputs, int64_t c, const Taps4& taps) {
  const int64_t valid = min(VL, outputs - k);
  float* to = static_cast<float*>(filter.data) + k * filter.n + c * filter.c;
  for (int t = 0; t < 16; t += VL) {
    F32 v[VL];
    for (int j = 0; j < VL; ++j) v[j] = load_vec(taps[t + j]);
    transpose<float>(v);
    for (int i = 0; i < VL; ++i) {
      if (i >= valid) break;
      store_vec(to + i * filter.n + t, v[i]);  // the result's own taps lie side by side
    }
  }
}

bool combine(const FilterGradArgs& p, const void* sums, void* d_bias) {
  const int64_t rows = grad_rows(p), vectors = ceil_div(p.out_channels, VL), count = chunks(p);
  const int64_t size = matrix_floats(rows, p.out_channels), distance = sum_floats(p);
  const float* partials = static_cast<const float*>(sums);
  for (int64_t k = 0; d_bias && k < p.out_channels; ++k) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i)
      sum += reinterpret_cast<const double*>(partials + i * distance + filter_floats(p))[k];
    static_cast<float*>(d_bias)[k] = float(sum);
  }
  F32 finite = broadcast(0.0f);
  for (int64_t vector = 0; vector < vectors; ++vector) {
    const auto [offset, stride] = panel_column(vector, vectors, rows);
    for (int64_t c = 0; c < p.in_channels; ++c) {
      alignas(64) Taps4 taps;
      for (int phase = 0; phase < 4; ++phase) {
        const float* from = partials + offset + (phase * padded(p.in_channels) + c) * stride;
        F32 half[2][W::points];
        for (int x = 0; x < W::points; ++x) {
          F32 u[W::points], w[2];
          for (int y = 0; y < W::points; ++y) {
            const float* at = from + (y * W::points + x) * size;
            u[y] = load_vec(at);
            for (int64_t n = 1; n < count; ++n) u[y] = u[y] + load_vec(at + n * distance);
          }
          W::filter_gradient(u, w);
          for (int y = 0; y < 2; ++y) half[y][x] = w[y];
        }
        for (int y = 0; y < 2; ++y) {
          F32 w[2];
          W::filter_gradient(half[y], w);
          for (int x = 0; x < 2; ++x) {
            store_vec(taps[tap_of(phase, y, x)], w[x]);
            finite = fma(w[x], broadcast(0.0f), finite);
          }
        }
      }
      store_taps4(p.d_filter, vector * VL, p.out_channels, c, taps);
    }
  }
  return all_zero(finite);
}

}  // namespace

extern const ConvKernels winograd_stride2, winograd_stride2_data;
const ConvKernels winograd_stride2 = {
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
};
const ConvKernels winograd_stride2_data = {
    .serves = serves,
    .tile = tile_of,
    .prepared_bytes = data_prepared_bytes,
    .prepare = prepare_data,
    .conv_scratch_bytes = data_scratch_bytes,
    .conv_tasks = data_tasks,
    .conv = data,
};

#else

extern const ConvKernels winograd_stride2, winograd_stride2_data;
const ConvKernels winograd_stride2 = {};
const ConvKernels winograd_stride2_data = {};

#endif
}  // namespace fastda::cpu::FASTDA_ISA
