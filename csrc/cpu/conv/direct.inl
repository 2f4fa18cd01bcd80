// Compiled once per instruction set, with FASTDA_ISA naming it.
//
// The direct kernels. A task is a block of output rows and columns of one image:
//
//   x block with halo
//     |  pack: zero outside the image, masked, widened to the accumulator type
//   packed[pixel][channel]
//     |  sums[q][k] = sum over taps t and channels c of packed[q + offset(t)][c] * filter[t][c][k]
//   sums[pixel][channel]
//     |  epilogue: bias, residual, ReLU, mask, back to the layout and type of the tensors
//   out block
//
// Output pixels q are numbered on the grid of the packed block, halo columns included: the few that
// fall into the halo are computed and dropped, and every tap is one constant offset. The
// micro-kernel keeps `rows` pixels x `KV` vectors of output channels in registers. The filter
// gradient is the same micro-kernel turned: rows are (tap, channel) pairs and the reduction runs
// over the pixels.
#include <type_traits>

#include "cpu/conv/epilogue.h"
#include "cpu/conv/strips.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

// Bytes of a block's packed input and sums: they and a filter of 64 channels (147 KB) fit a
// second-level cache of 1 MiB.
constexpr int64_t block_budget = 640 << 10;

template <typename S>
Blocking direct_blocking(const ConvArgs& a) {
  const int64_t bytes = (a.in_channels + padded<S>(a.out_channels)) * int64_t(sizeof(S));
  return block_image(a.batch, a.out_height(), a.out_width(), bytes, block_budget);
}
template <typename S>
struct DirectSizes {
  int64_t packed, sums, taps;
  DirectSizes(const ConvArgs& a, int64_t rows, int64_t columns) {
    const int64_t halo = a.kernel - 1;
    packed = ((rows + halo) * (columns + halo) + max_rows + a.kernel) * a.in_channels;
    sums = (rows * (columns + halo) + max_rows) * padded<S>(a.out_channels);
    taps = a.kernel * a.kernel;
  }
  DirectSizes(const ConvArgs& a, const Blocking& b) : DirectSizes(a, b.rows, b.columns) {}
  int64_t bytes() const {
    return Arena::bytes<S>(packed) + Arena::bytes<S>(sums) + Arena::bytes<int64_t>(taps);
  }
};

template <typename T, typename S>
void prepare_direct(const ConvArgs& a, S* out) {
  constexpr int L = lanes<S>;
  const int64_t vectors = ceil_div(a.out_channels, L), taps = a.kernel * a.kernel;
  for (int64_t vector = 0; vector < vectors; ++vector) {
    const PanelColumn column = panel_column<S>(vector, vectors, taps * a.in_channels);
    S* to = out + column.offset;
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < a.in_channels; ++c, to += column.stride)
        for (int64_t k = vector * L; k < (vector + 1) * L; ++k)
          to[k - vector * L] = k < a.out_channels
                                   ? S(load(at<T>(a.filter, k, c, t / a.kernel, t % a.kernel)))
                                   : S(0);
  }
}

// `sizes`: of a block as large as this one or larger.
template <typename T, typename S>
void conv_block(const ConvArgs& a, const Block& block, const DirectSizes<S>& sizes, Arena scratch) {
  S* packed = scratch.take<S>(sizes.packed);
  S* sums = scratch.take<S>(sizes.sums);
  int64_t* offset = scratch.take<int64_t>(sizes.taps);
  const int64_t p = a.padding, halo = a.kernel - 1, columns = block.columns + halo;
  // A row of taps in one where they have few channels, which lie side by side.
  const int64_t together = few_inputs(a) ? a.kernel : 1, depth = together * a.in_channels;
  const int64_t taps = sizes.taps / together;
  for (int64_t i = 0; i < taps; ++i) {
    const int64_t t = i * together;
    offset[i] = (t / a.kernel * columns + t % a.kernel) * a.in_channels;
  }
  pack<T, S>(source_of(a), {block.n, block.h - p, block.w - p, block.rows + halo, columns}, packed,
             a.in_channels);
  const int64_t tail = (block.rows + halo) * columns * a.in_channels;
  for (int64_t i = 0; i < (max_rows + a.kernel) * a.in_channels; ++i) packed[tail + i] = S(0);
  const int64_t padded_k = padded<S>(a.out_channels),
                filter = sizes.taps * a.in_channels * padded_k;
  // Rows whose sums are made together: one where the filter stays in the first-level cache, and the sums
  // beside it; all where it has to be read anew each time.
  const int64_t step = filter * int64_t(sizeof(S)) <= 16 << 10 ? 1 : block.rows;
  for (int64_t r = 0; r < block.rows; r += step) {
    multiply<S>(packed + r * columns * a.in_channels, a.in_channels,
                (step - 1) * columns + block.columns, offset, taps, depth,
                static_cast<const S*>(a.prepared), padded_k, sums);
    epilogue<T, S>(a, sums, columns, padded_k,
                   {block.n, block.h + r, block.w, step, block.columns});
  }
}

int64_t prepared_bytes(const ConvArgs& a) {
  return with_types(a.dtype, [&]<typename T, typename S>() {
    return Arena::bytes<S>(padded<S>(a.out_channels) * a.in_channels * a.kernel * a.kernel);
  });
}
int64_t conv_scratch_bytes(const ConvArgs& a) {
  return with_types(a.dtype, [&]<typename T, typename S>() {
    return DirectSizes<S>(a, direct_blocking<S>(a)).bytes();
  });
}
void prepare(const ConvArgs& a, void* prepared) {
  with_types(a.dtype,
             [&]<typename T, typename S>() { prepare_direct<T, S>(a, static_cast<S*>(prepared)); });
}
int64_t conv_tasks(const ConvArgs& a) {
  return with_types(a.dtype, [&]<typename T, typename S>() { return direct_blocking<S>(a).tasks; });
}
bool conv(const ConvArgs& a, int64_t task, void* scratch) {
  with_types(a.dtype, [&]<typename T, typename S>() {
    const Blocking blocking = direct_blocking<S>(a);
    conv_block<T, S>(a, blocking.block(task, a.out_height(), a.out_width()),
                     DirectSizes<S>(a, blocking), Arena(scratch));
  });
  return true;
}

// Filter gradient.

template <typename S>
Blocking grad_blocking(const FilterGradArgs& a) {
  const int64_t bytes = (a.in_channels + padded<S>(a.out_channels)) * int64_t(sizeof(S));
  return block_image(a.batch, a.out_height(), a.out_width(), bytes, block_budget);
}
template <typename S>
struct GradSizes {
  Blocking blocking;
  int64_t columns, packed, grads, taps, padded_k, sums;
  explicit GradSizes(const FilterGradArgs& a) : blocking(grad_blocking<S>(a)) {
    columns = blocking.columns + a.kernel - 1;
    packed = ((blocking.rows + a.kernel - 1) * columns + a.kernel) * a.in_channels;
    padded_k = padded<S>(a.out_channels);
    grads = blocking.rows * columns * padded_k;
    taps = a.kernel * a.kernel;
    sums = taps * a.in_channels * padded_k;
  }
  int64_t bytes() const {
    return Arena::bytes<S>(packed) + Arena::bytes<S>(grads) + Arena::bytes<int64_t>(taps);
  }
  int64_t sum_bytes() const { return Arena::bytes<S>(sums) + Arena::bytes<double>(padded_k); }
  int64_t chunks(const FilterGradArgs& a) const { return chunk_count(blocking.tasks, sum_bytes()); }
};

// A block of the image where it lies, if that is how it would be packed, or, `each_row`, each of its
// rows.
template <typename T, typename S>
const S* as_packed(const Source& s, const Block& block, int64_t halo, int64_t stride,
                   bool each_row) {
  if constexpr (std::is_same_v<T, S>)
    if (s.channels_last && !s.mask.data && !s.winners.places && halo == 0 && s.channels == stride &&
        s.x.w == stride && (each_row || block.rows == 1 || s.x.h == block.columns * stride))
      return at<T>(s.x, block.n, 0, block.h, block.w);
  return nullptr;
}

template <typename T, typename S>
void grad_direct(const FilterGradArgs& a, int64_t chunk, void* sums_memory, void* memory) {
  const GradSizes<S> sizes(a);
  Arena sums(sums_memory), scratch(memory);
  S* filter = sums.take<S>(sizes.sums);
  double* bias = sums.take<double>(sizes.padded_k);
  S* packed = scratch.take<S>(sizes.packed);
  S* grads = scratch.take<S>(sizes.grads);
  int64_t* offset = scratch.take<int64_t>(sizes.taps);
  const Source grad_source = grad_source_of(a);
  for (int64_t i = 0; i < sizes.sums; ++i) filter[i] = S(0);
  for (int64_t i = 0; i < sizes.padded_k; ++i) bias[i] = 0;
  const int64_t p = a.padding, halo = a.kernel - 1, tasks = sizes.blocking.tasks,
                count = sizes.chunks(a);
  for (int64_t task = tasks * chunk / count; task < tasks * (chunk + 1) / count; ++task) {
    const Block block = sizes.blocking.block(task, a.out_height(), a.out_width());
    const int64_t columns = block.columns + halo;
    // The gradient lies on the same grid as the packed input, with zeros where the grid has halo
    // columns.
    const int64_t pixels = block.rows * columns;
    Strips<S> grad{grads, columns * sizes.padded_k, sizes.padded_k};
    const bool in_strips = few_inputs(a);
    if (const S* there =
            as_packed<T, S>(grad_source, block, in_strips ? 0 : halo, sizes.padded_k, in_strips)) {
      grad.at = there;
      grad.row = grad_source.x.h;
    } else {
      for (int64_t r = 0; r < block.rows; ++r) {
        S* row = grads + r * columns * sizes.padded_k;
        pack<T, S>(grad_source, {block.n, block.h + r, block.w, 1, block.columns}, row,
                   sizes.padded_k);
        for (int64_t i = block.columns * sizes.padded_k; i < columns * sizes.padded_k; ++i)
          row[i] = S(0);
      }
    }
    if (in_strips) {
      for (int64_t r = 0; r < block.rows; ++r)
        add_rows<S>(grad.at + r * grad.row, block.columns, sizes.padded_k, bias);
    } else {
      add_rows<S>(grad.at, pixels, sizes.padded_k, bias);
    }
    if (a.x.data == nullptr) continue;
    pack<T, S>(source_of(a), {block.n, block.h - p, block.w - p, block.rows + halo, columns},
               packed, a.in_channels);
    if (in_strips) {
      multiply_strips<S>({packed, columns * a.in_channels, a.in_channels}, grad, block.rows,
                         block.columns, a.kernel, a.kernel * a.in_channels, sizes.padded_k, filter);
      continue;
    }
    for (int64_t t = 0; t < sizes.taps; ++t)
      offset[t] = (t / a.kernel * columns + t % a.kernel) * a.in_channels;
    const int64_t tail = (block.rows + halo) * columns * a.in_channels;
    for (int64_t i = 0; i < a.kernel * a.in_channels; ++i) packed[tail + i] = S(0);
    multiply_transposed<S>(packed, a.in_channels, pixels, offset, sizes.taps, a.in_channels,
                           grad.at, sizes.padded_k, filter);
  }
}

template <typename T, typename S>
void combine_direct(const FilterGradArgs& a, const char* sums, T* d_bias) {
  const GradSizes<S> sizes(a);
  const int64_t chunk_bytes = sizes.sum_bytes(), count = sizes.chunks(a);
  const auto total = [&](int64_t offset, auto zero) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      decltype(zero) part;
      std::memcpy(&part, sums + i * chunk_bytes + offset, sizeof part);
      sum += double(part);
    }
    return sum;
  };
  if (a.d_filter.data)
    for (int64_t t = 0; t < sizes.taps; ++t)
      for (int64_t c = 0; c < a.in_channels; ++c)
        for (int64_t k = 0; k < a.out_channels; ++k)
          store(
              const_cast<T*>(at<T>(a.d_filter, k, c, t / a.kernel, t % a.kernel)),
              S(total(((t * a.in_channels + c) * sizes.padded_k + k) * int64_t(sizeof(S)), S(0))));
  if (d_bias)
    for (int64_t k = 0; k < a.out_channels; ++k)
      store(d_bias + k, S(total(Arena::bytes<S>(sizes.sums) + k * int64_t(sizeof(double)), 0.0)));
}

int64_t sum_bytes(const FilterGradArgs& a) {
  return with_types(a.dtype, [&]<typename T, typename S>() { return GradSizes<S>(a).sum_bytes(); });
}
int64_t filter_grad_scratch_bytes(const FilterGradArgs& a) {
  return with_types(a.dtype, [&]<typename T, typename S>() { return GradSizes<S>(a).bytes(); });
}
int64_t chunks(const FilterGradArgs& a) {
  return with_types(a.dtype, [&]<typename T, typename S>() { return GradSizes<S>(a).chunks(a); });
}
void filter_grad(const FilterGradArgs& a, int64_t chunk, void* sums, void* scratch) {
  with_types(a.dtype,
             [&]<typename T, typename S>() { grad_direct<T, S>(a, chunk, sums, scratch); });
}
bool combine(const FilterGradArgs& a, const void* sums, void* d_bias) {
  with_types(a.dtype, [&]<typename T, typename S>() {
    combine_direct<T, S>(a, static_cast<const char*>(sums), static_cast<T*>(d_bias));
  });
  return true;
}

bool serves(const ConvProblem&) { return true; }

// Outliers.

void set_range(ConvArgs& a) {
  with_float_type(a.dtype,
                  [&]<typename T>() { a.range.usual = usual_magnitude<T>(source_of(a), a.batch); });
  a.range.limit = most * a.range.usual;
}
// A value of each, at its limit and beside usual ones, costs a tile as much as the promise allows.
void set_ranges(FilterGradArgs& a, Tile tile) {
  with_float_type(a.dtype, [&]<typename T>() {
    a.range.usual = usual_magnitude<T>(source_of(a), a.batch);
    if (a.grad.data) a.grad_range.usual = usual_magnitude<T>(grad_source_of(a), a.batch);
  });
  const float at = std::sqrt(most) * float(tile.size);
  a.range.limit = at * a.range.usual;
  a.grad_range.limit = at * a.grad_range.usual;
}

int64_t row_columns(const ConvProblem& p, Tile tile) {
  return ceil_div(p.out_width(), tile.size) * tile.size + tile.reach - tile.size;
}

int64_t mend_scratch_bytes(const ConvArgs& a, Tile tile) {
  return Magnitudes::bytes(tile.reach, row_columns(a, tile), a.in_channels) +
         DirectSizes<float>(a, tile.size, tile.size).bytes();
}
void mend(const ConvArgs& a, Tile tile, int64_t image, int64_t tile_row, void* memory) {
  const int64_t columns = row_columns(a, tile), h = tile_row * tile.size;
  const int64_t rows = min(tile.size, a.out_height() - h);
  Arena scratch(memory);
  Magnitudes x(scratch, tile.reach, columns, a.in_channels);
  const DirectSizes<float> sizes(a, tile.size, tile.size);
  with_float_type(a.dtype, [&]<typename T>() {
    x.read<T>(source_of(a), {image, h - a.padding, -a.padding, tile.reach, columns});
    for (int64_t w = 0; w < a.out_width(); w += tile.size) {
      const int64_t width = min(tile.size, a.out_width() - w);
      if (!keeps_promise(x, w, tile, a.kernel, rows, width, a.range.usual))
        conv_block<T, float>(a, {image, h, w, rows, width}, sizes, scratch);
    }
  });
}

int64_t weigh_scratch_bytes(const FilterGradArgs& a, Tile tile) {
  const int64_t columns = row_columns(a, tile);
  return Magnitudes::bytes(tile.reach, columns, a.in_channels) +
         Magnitudes::bytes(tile.size, columns, a.out_channels);
}
void weigh(const FilterGradArgs& a, Tile tile, int64_t image, int64_t tile_row, double* products,
           double* taps, void* memory) {
  const int64_t columns = row_columns(a, tile), h = tile_row * tile.size;
  const int64_t rows = min(tile.size, a.out_height() - h);
  Arena scratch(memory);
  Magnitudes x(scratch, tile.reach, columns, a.in_channels);
  Magnitudes grad(scratch, tile.size, columns, a.out_channels);
  with_float_type(a.dtype, [&]<typename T>() {
    x.read<T>(source_of(a), {image, h - a.padding, -a.padding, tile.reach, columns});
    grad.read<T>(grad_source_of(a), {image, h, 0, rows, a.out_width()});
  });
  for (int64_t w = 0; w < a.out_width(); w += tile.size) {
    const int64_t width = min(tile.size, a.out_width() - w);
    *products += double(x.largest(0, w, tile.reach, tile.reach)) * grad.largest(0, w, rows, width);
    for (int64_t t = 0; t < a.kernel * a.kernel; ++t)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t q = w; q < w + width; ++q)
          taps[t] += double(std::max(a.range.usual,
                                     x.at[(r + t / a.kernel) * columns + q + t % a.kernel])) *
                     std::max(a.grad_range.usual, grad.at[r * columns + q]);
  }
}

}  // namespace

extern const OutlierKernels outliers;
const OutlierKernels outliers = {
    .set_range = set_range,
    .set_ranges = set_ranges,
    .mend_scratch_bytes = mend_scratch_bytes,
    .mend = mend,
    .weigh_scratch_bytes = weigh_scratch_bytes,
    .weigh = weigh,
    .most = most,
};
extern const ConvKernels direct;
const ConvKernels direct = {
    .serves = serves,
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

}  // namespace fastda::cpu::FASTDA_ISA
