// Compiled once per instruction set, with FASTDA_ISA naming it.
//
// 3 x 3 filters between many channels, for maps of few tiles: there the transformed filter, four
// times the filter, is what does not fit the caches, and the transformed input of all tiles is
// small. So the input is transformed once and for all; a task is a panel of output channels, whose
// filter is transformed a few input channels at a time and used up at once:
//
//   V [chunk of channels][group][36][6 tiles][DEPTH];  per panel and chunk: U [36][DEPTH][PANEL],
//   M [group][36][6][PANEL] += V U
//
// and likewise for the filter's gradient, with Z [panel][group][36][6][PANEL] from the output's
// gradient:
//
//   U [36][GRAD_DEPTH][PANEL] = V' Z over all tiles, turned into d filter at once
#include "cpu/conv/epilogue.h"
#include "cpu/conv/gemm.h"

namespace fastda::cpu::FASTDA_ISA {
#if FASTDA_SIMD
namespace {

// Output channels of a task, and input channels taken together: U has 295 KB (gradient: 443 KB).
constexpr int64_t PANEL = 64, DEPTH = 32, GRAD_DEPTH = 48;
// Where this way was measured to be the faster one: 48 tiles are 8 groups, which use a transformed
// filter too few times; 100,000 pairs of channels have 14 MB of transformed filters.
constexpr int64_t few_tiles = 48, many_pairs = 100'000;

// Workspaces of all tiles, one for each `width` channels.
struct Parts {
  float* data;
  int64_t groups, width;
  Workspace part(int64_t i) const {
    Workspace w(nullptr, width, 36);
    w.data = data + i * groups * w.group;
    w.first = i * width;
    return w;
  }
  static int64_t floats(int64_t groups, int64_t width, int64_t channels) {
    return ceil_div(channels, width) * groups * Workspace(nullptr, width, 36).group;
  }
};

// With few tiles, or filters that exceed the caches by far and fewer tiles than channels, so that V
// is the smaller.
bool serves(const ConvProblem& p) {
  if (p.kernel != 3 || p.dtype == DType::f64 || min(p.in_channels, p.out_channels) < 16 ||
      min(p.height, p.width) < tile_size || min(p.out_height(), p.out_width()) < tile_size)
    return false;
  const int64_t tiles = Grid(p).tiles;
  return tiles <= few_tiles || (p.in_channels * p.out_channels > many_pairs &&
                                tiles <= max(p.in_channels, p.out_channels));
}

template <typename F>
void each_part(int64_t channels, int64_t width, F&& f) {
  for (int64_t c = 0; c < channels; c += width) f(c / width, c, min(width, channels - c));
}

// --- convolution

int64_t prepared_bytes(const ConvArgs& p) {
  return 4 * Parts::floats(Grid(p).groups, DEPTH, p.in_channels);
}
void prepare(const ConvArgs& p, void* prepared) {
  const Grid grid(p);
  const Parts v{static_cast<float*>(prepared), grid.groups, DEPTH};
  const Source source = source_of(p);
  Scratch scratch;
  each_part(p.in_channels, DEPTH, [&](int64_t i, int64_t, int64_t) {
    with_float_type(p.dtype, [&]<typename T>() {
      transform_input_tiles<T>(source, grid, 0, grid.tiles, v.part(i), 0, scratch);
    });
    clear_rest(v.part(i), grid.tiles, 0);
  });
}

int64_t conv_scratch_bytes(const ConvArgs& p) {
  const int64_t groups = Grid(p).groups;
  return int64_t(sizeof(Scratch)) +
         4 * (36 * matrix_floats(DEPTH, PANEL) + Parts::floats(groups, PANEL, PANEL));
}
int64_t conv_tasks(const ConvArgs& p) { return ceil_div(p.out_channels, PANEL); }

template <bool Add>
void multiply_part(const Workspace& v, const Workspace& m, int64_t groups, const float* u,
                   int64_t depth, int64_t vectors) {
  for (int t = 0; t < 36; ++t) {
    each_panel(vectors, [&]<int N>(Width<N>, int64_t first) {
      const float* panel = u + t * matrix_floats(DEPTH, PANEL) + first * VL * depth;
      const float* ahead = panel + depth * N * VL;  // the next panel
      const int64_t pace = N * VL / groups;
      for (int64_t g = 0; g < groups; ++g, ahead += depth * pace) {
        const float* from = v.data + g * v.group + t * v.slot;
        const float* next = g + 1 < groups ? from + v.group : v.data + (t + 1) * v.slot;
        multiply_tiles<N, Add>(from, v.channels, panel, depth,
                               m.data + g * m.group + t * m.slot + first * VL, m.channels, next,
                               ahead, pace, {});
      }
    });
  }
}

template <typename T>
bool conv_panel(const ConvArgs& p, int64_t task, void* workspace) {
  const Grid grid(p);
  const Parts v{const_cast<float*>(static_cast<const float*>(p.prepared)), grid.groups, DEPTH};
  Scratch& scratch = *static_cast<Scratch*>(workspace);
  float* u = reinterpret_cast<float*>(&scratch + 1);
  Workspace m(u + 36 * matrix_floats(DEPTH, PANEL), PANEL, 36);
  m.first = task * PANEL;
  const int64_t end = min(p.out_channels, m.first + PANEL), vectors = ceil_div(end - m.first, VL);
  each_part(p.in_channels, DEPTH, [&](int64_t i, int64_t c0, int64_t depth) {
    for (int64_t vector = 0; vector < vectors; ++vector) {
      const auto [offset, stride] = panel_column(vector, vectors, depth);
      for (int64_t c = 0; c < depth; c += VL) {
        alignas(64) Taps taps[VL];
        const int64_t n = min(VL, depth - c);
        load_taps<T>(p.filter, m.first + vector * VL, p.out_channels, c0 + c, n, taps);
        for (int64_t j = 0; j < n; ++j)
          transform_taps(taps[j], u + offset + (c + j) * stride, matrix_floats(DEPTH, PANEL));
      }
    }
    (i == 0 ? multiply_part<false> : multiply_part<true>)(v.part(i), m, grid.groups, u, depth,
                                                          vectors);
  });
  F32 finite = broadcast(0.0f);
  each_run_and_vector(
      p.out_channels_last, grid, 0, grid.tiles, m.first, end,
      [&](const Run& run, int64_t k) { output_run<T>(p, grid, run, k, m, scratch, finite); });
  return all_zero(finite);
}
bool conv(const ConvArgs& p, int64_t task, void* scratch) {
  bool finite = false;
  with_float_type(p.dtype, [&]<typename T>() { finite = conv_panel<T>(p, task, scratch); });
  return finite;
}

// --- filter gradient

// Shared: the bias' sums, V and Z.
struct GradLayout {
  Grid grid;
  int64_t sums, v, z;
  explicit GradLayout(const FilterGradArgs& p) : grid(p) {
    sums = round_up(int64_t(sizeof(double)) * padded(p.out_channels), 64);
    v = 4 * Parts::floats(grid.groups, GRAD_DEPTH, p.in_channels);
    z = 4 * Parts::floats(grid.groups, PANEL, p.out_channels);
  }
  Parts inputs(char* shared) const {
    return {reinterpret_cast<float*>(shared + sums), grid.groups, GRAD_DEPTH};
  }
  Parts grads(char* shared) const {
    return {reinterpret_cast<float*>(shared + sums + v), grid.groups, PANEL};
  }
};

int64_t grad_prepared_bytes(const FilterGradArgs& p) {
  const GradLayout layout(p);
  return layout.sums + layout.v + layout.z;
}
void prepare_grad(const FilterGradArgs& p, void* prepared) {
  const GradLayout layout(p);
  const Grid& grid = layout.grid;
  char* shared = static_cast<char*>(prepared);
  double* sums = static_cast<double*>(prepared);
  for (int64_t k = 0; k < padded(p.out_channels); ++k) sums[k] = 0;
  const Source input = source_of(p);
  const Source grad = grad_source_of(p);
  const Parts v = layout.inputs(shared), z = layout.grads(shared);
  Scratch scratch;
  with_float_type(p.dtype, [&]<typename T>() {
    each_part(p.in_channels, GRAD_DEPTH, [&](int64_t i, int64_t, int64_t) {
      transform_input_tiles<T>(input, grid, 0, grid.tiles, v.part(i), 0, scratch);
      clear_rest(v.part(i), grid.tiles, 0);
    });
    each_part(p.out_channels, PANEL, [&](int64_t i, int64_t, int64_t) {
      transform_gradient_tiles<T>(grad, grid, 0, grid.tiles, z.part(i), sums, scratch);
      clear_rest(z.part(i), grid.tiles, 0);
    });
  });
}

int64_t chunks(const FilterGradArgs& p) { return ceil_div(p.out_channels, PANEL); }
int64_t sum_bytes(const FilterGradArgs&) { return 64; }  // whether the panel's gradient is finite
int64_t filter_grad_scratch_bytes(const FilterGradArgs&) {
  return 4 * 36 * matrix_floats(GRAD_DEPTH, PANEL);
}

template <typename T>
bool grad_panel(const FilterGradArgs& p, int64_t chunk, float* u) {
  const GradLayout layout(p);
  char* shared = static_cast<char*>(const_cast<void*>(p.prepared));
  const Workspace z = layout.grads(shared).part(chunk);
  const int64_t K = p.out_channels, vectors = ceil_div(min(PANEL, K - z.first), VL);
  const int64_t size = matrix_floats(GRAD_DEPTH, PANEL);
  F32 finite = broadcast(0.0f);
  each_part(p.in_channels, GRAD_DEPTH, [&](int64_t i, int64_t c0, int64_t depth) {
    const Workspace v = layout.inputs(shared).part(i);
    for (int t = 0; t < 36; ++t)
      each_panel(vectors, [&]<int N>(Width<N>, int64_t first) {
        accumulate_panel<N>(v.data + t * v.slot, v, z.data + t * z.slot + first * VL, z,
                            layout.grid.groups, depth, u + t * size + first * VL * depth, true,
                            [] { return Lines{}; });
      });
    for (int64_t vector = 0; vector < vectors; ++vector) {
      const auto [offset, stride] = panel_column(vector, vectors, depth);
      for (int64_t c = 0; c < depth; ++c) {
        alignas(64) Taps taps;
        taps_gradient([&](int t) { return load_vec(u + t * size + offset + c * stride); }, taps,
                      finite);
        store_taps<T>(p.d_filter, z.first + vector * VL, K, c0 + c, taps);
      }
    }
  });
  return all_zero(finite);
}
void filter_grad(const FilterGradArgs& p, int64_t chunk, void* sums, void* scratch) {
  with_float_type(p.dtype, [&]<typename T>() {
    *static_cast<int64_t*>(sums) = grad_panel<T>(p, chunk, static_cast<float*>(scratch));
  });
}

bool combine(const FilterGradArgs& p, const void* sums, void* d_bias) {
  if (d_bias)
    with_float_type(p.dtype, [&]<typename T>() {
      for (int64_t k = 0; k < p.out_channels; ++k)
        store(static_cast<T*>(d_bias) + k, float(static_cast<const double*>(p.prepared)[k]));
    });
  bool finite = true;
  for (int64_t i = 0; i < chunks(p); ++i)
    finite &=
        *reinterpret_cast<const int64_t*>(static_cast<const char*>(sums) + i * sum_bytes(p)) != 0;
  return finite;
}

// Named: a lambda here would have a symbol that the other instruction sets could take.
Tile tile_of(const ConvProblem&) { return {tile_size, tile_size + 2}; }

}  // namespace

extern const ConvKernels winograd_panels;
const ConvKernels winograd_panels = {
    .serves = serves,
    .tile = tile_of,
    .prepared_bytes = prepared_bytes,
    .prepare = prepare,
    .conv_scratch_bytes = conv_scratch_bytes,
    .conv_tasks = conv_tasks,
    .conv = conv,
    .grad_prepared_bytes = grad_prepared_bytes,
    .prepare_grad = prepare_grad,
    .chunks = chunks,
    .sum_bytes = sum_bytes,
    .filter_grad_scratch_bytes = filter_grad_scratch_bytes,
    .filter_grad = filter_grad,
    .combine = combine,
};

#else

extern const ConvKernels winograd_panels;
const ConvKernels winograd_panels = {};

#endif
}  // namespace fastda::cpu::FASTDA_ISA
