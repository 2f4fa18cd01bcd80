// Normalisation, a residual and (leaky) ReLU: two passes over the images forward, two back, or one
// where a block holds all values of a statistic.
//
// A thread has packs of 16 bytes, or single entries where the shape does not divide by them. Those of
// a block are of a piece of one statistic, or of neighbouring channels:
//
//   planes                              rows of channels (channels_last)
//
//   t0 t1 t2 … t255 │ t0 t1 …           t0 … t7    8 packs, or 32 channels
//   one after the other, from           t8 … t15   of a row; each thread
//   plane to plane of a channel         …          stays at its channels
//
// A thread's sums are in the accumulator type, over at most 64 rows or packs of a channel, and of
// differences from a pivot of its own: the mean of the first tile that it has, at least an eighth of
// its values. Whatever is added up beyond a thread is double, in a fixed order: lanes, warps, pieces.
#pragma once

#include "cuda/kernels/device.cuh"
#include "cuda/kernels/norm.h"

namespace fastda::cuda {

constexpr int norm_threads = 256;
constexpr int norm_steps = 8;  // tiles of a block at most

template <int N, bool Rows>
constexpr int norm_columns = !Rows   ? 1
                             : N > 1 ? 8
                                     : 32;  // threads side by side
template <int N>
constexpr int norm_packs = N > 1 ? 4 : 8;  // of a thread in a tile

// How the values are cut. A row is a row of channels, or a pack of a plane.
struct NormCut {
  int64_t rows = 0;  // of a statistic
  int64_t piece = 0;
  int pieces = 1, steps = 1;
  int chunks = 1;                      // of the channels
  Divisor plane;                       // packs of a plane
  double values = 0, last_values = 0;  // of a piece, and of the last
  double share = 0, last_share = 0;    // one over them
};

FASTDA_DEVICE float fma_of(float a, float b, float c) { return ::fmaf(a, b, c); }
FASTDA_DEVICE double fma_of(double a, double b, double c) { return ::fma(a, b, c); }
template <typename S>
FASTDA_DEVICE bool is_finite(S v) {
  return v - v == 0;
}

// What of the images the threads of a team have; `unit` is a statistic, or a chunk of a group.
template <typename T, int N, bool Rows, int threads>
struct NormWalk {
  static constexpr int columns = norm_columns<N, Rows>, packs = norm_packs<N>;
  static constexpr int channels = Rows ? N : 1;     // of a thread
  static constexpr int width = columns * channels;  // channels of a team
  static constexpr int stride = threads / columns;
  using Tile = Pack<T, N>[packs];

  const Norm& p;
  const NormCut& cut;
  int64_t group, base, begin, end;
  int first_channel, column, row, piece;

  FASTDA_DEVICE NormWalk(const Norm& p, const NormCut& cut, int64_t unit, int piece, int thread)
      : p(p), cut(cut), column(thread % columns), row(thread / columns), piece(piece) {
    const int64_t units = Rows ? cut.chunks : p.channels;
    group = unit / units;
    first_channel = int(unit - group * units) * width;
    begin = piece * cut.piece;
    end = begin + cut.piece < cut.rows ? begin + cut.piece : cut.rows;
    if (Rows) {
      base = group * cut.rows * p.channels + channel();
      if (channel() >= p.channels) end = begin;
    } else {
      base = (group * p.images * p.channels + first_channel) * p.pixels;
    }
  }
  FASTDA_DEVICE int channel() const { return first_channel + column * channels; }
  FASTDA_DEVICE int64_t first_statistic() const { return group * p.channels + first_channel; }
  // The thread that writes what is found of its channels.
  FASTDA_DEVICE bool writes() const { return row == 0 && channel() < p.channels; }
  FASTDA_DEVICE int64_t at(int64_t r) const {
    if (Rows) return base + r * p.channels;
    if (p.images == 1) return base + r * N;
    const int64_t rest = divide(r, cut.plane);
    return base + r * p.channels * p.pixels + rest * N;
  }
  // f(pack, where it begins) for those of a step; the threads' packs of one step lie together.
  template <typename F>
  FASTDA_DEVICE void each(int step, F&& f) const {
    const int64_t first = begin + int64_t(step) * packs * stride + row;
    FASTDA_UNROLL
    for (int k = 0; k < packs; ++k)
      if (first + k * stride < end) f(k, at(first + k * stride));
  }
  FASTDA_DEVICE void load(const void* from, int step, Tile& tile) const {
    each(step,
         [&](int k, int64_t at) { tile[k] = load_pack<N>(static_cast<const T*>(from) + at); });
  }
  // Entry e of a pack is of channel index(e) of the thread.
  static FASTDA_DEVICE int index(int e) { return Rows ? e : 0; }
};

// The sum and that of squared differences from the mean, of every channel of a thread's column;
// `share` is one over the number of values. `tile` holds the thread's first packs, and still does if
// there is but one step.
template <int threads, typename T, int N, typename Walk>
FASTDA_DEVICE void norm_moments(const Walk& w, Pack<T, N> (&tile)[Walk::packs], double share,
                                double* scratch, double (&total)[Walk::channels],
                                double (&squares)[Walk::channels]) {
  using S = typename Wide<T>::type;
  constexpr int C = Walk::channels;
  S pivot[C] = {}, sum[N] = {}, square[N] = {};
  int taken = 0;
  w.each(0, [&](int k, int64_t) {
    ++taken;
    FASTDA_UNROLL
    for (int e = 0; e < N; ++e) pivot[w.index(e)] += S(widen(tile[k].at[e]));
  });
  const S share_taken = S(1) / S(taken > 0 ? taken * (N / C) : 1);
  FASTDA_UNROLL
  for (int c = 0; c < C; ++c) pivot[c] *= share_taken;
  int count = 0;
  FASTDA_NO_UNROLL
  for (int step = 0; step < w.cut.steps; ++step) {
    if (step > 0) w.load(w.p.x, step, tile);
    w.each(step, [&](int k, int64_t) {
      ++count;
      FASTDA_UNROLL
      for (int e = 0; e < N; ++e) {
        const S d = S(widen(tile[k].at[e])) - pivot[w.index(e)];
        sum[e] += d;
        square[e] += d * d;
      }
    });
  }
  double about[C], first[C] = {}, second[C] = {};
  bool finite = true;
  FASTDA_UNROLL
  for (int e = 0; e < N; ++e) {
    finite = finite && is_finite(square[e]);
    first[w.index(e)] += sum[e];
    second[w.index(e)] += square[e];
  }
  FASTDA_UNROLL
  for (int c = 0; c < C; ++c) about[c] = pivot[c];
  if (!finite) {  // squares that overflow, and what is not finite: again in double
    FASTDA_UNROLL
    for (int c = 0; c < C; ++c) {
      about[c] = is_finite(about[c]) ? about[c] : 0;
      first[c] = second[c] = 0;
    }
    FASTDA_NO_UNROLL
    for (int step = 0; step < w.cut.steps; ++step) {
      if (w.cut.steps > 1) w.load(w.p.x, step, tile);
      w.each(step, [&](int k, int64_t) {
        FASTDA_UNROLL
        for (int e = 0; e < N; ++e) {
          const double d = double(widen(tile[k].at[e])) - about[w.index(e)];
          first[w.index(e)] += d;
          second[w.index(e)] += d * d;
        }
      });
    }
  }
  const double n = double(count) * (N / C);
  FASTDA_UNROLL
  for (int c = 0; c < C; ++c) total[c] = first[c] + n * about[c];
  column_sum<threads, Walk::columns>(total, scratch);
  FASTDA_UNROLL
  for (int c = 0; c < C; ++c) {
    const double off = about[c] - total[c] * share;
    squares[c] = second[c] + off * (2 * first[c] + n * off);
  }
  column_sum<threads, Walk::columns>(squares, scratch);
  FASTDA_UNROLL
  for (int c = 0; c < C; ++c) squares[c] = squares[c] < 0 ? 0 : squares[c];
}

// Of one statistic. Rounding the mean to `center` leaves `rest` of it.
template <typename S>
struct NormConstants {
  double inverse, factor, rest;
  S center, scale, shift;

  FASTDA_DEVICE NormConstants(const Norm& p, int channel, double mean, double variance) {
    const double w = p.weight.data ? load_scalar(p.weight.data, p.weight.dtype, channel) : 1;
    const double b = p.bias.data ? load_scalar(p.bias.data, p.bias.dtype, channel) : 0;
    inverse = 1 / ::sqrt(variance + p.eps);
    factor = w * inverse;
    center = S(mean);
    rest = is_finite(center) ? mean - double(center) : 0;
    scale = S(factor);
    shift = S(rest == 0 ? b : b - rest * factor);
  }
  FASTDA_DEVICE double by_weight(double grads, double products) const {
    return (products - rest * grads) * inverse;
  }
  // Of d_x = scale grad + slope (x - center) + offset.
  FASTDA_DEVICE void through(double grads, double products, double values, S& slope,
                             S& offset) const {
    const double tilt = -factor * (by_weight(grads, products) / values) * inverse;
    slope = S(tilt);
    offset = S(-factor * (grads / values) - tilt * rest);
  }
};
template <typename S>
FASTDA_DEVICE NormConstants<S> norm_constants(const Norm& p, int64_t statistic, int channel) {
  return {p, channel, load_scalar(p.mean.data, p.mean.dtype, statistic),
          load_scalar(p.variance.data, p.variance.dtype, statistic)};
}

// `kinds` constants of each channel of a team: compute(channel of the team, constants) by one thread
// a channel, then known to the threads that have it. A warp alone computes them in every lane.
template <int threads, int kinds, typename S, typename Walk, typename F>
FASTDA_DEVICE void share_constants(const Walk& w, double* scratch,
                                   S (&constants)[kinds][Walk::channels], F&& compute) {
  if constexpr (threads == 32) {
    S mine[kinds];
    compute(0, mine);
    for (int i = 0; i < kinds; ++i) constants[i][0] = mine[i];
  } else {
    S* shared = reinterpret_cast<S*>(scratch);
    const int t = int(threadIdx.x);
    if (t < Walk::width && w.first_channel + t < w.p.channels) {
      S mine[kinds];
      compute(t, mine);
      FASTDA_UNROLL
      for (int i = 0; i < kinds; ++i) shared[i * Walk::width + t] = mine[i];
    }
    __syncthreads();
    if (w.channel() >= w.p.channels) return;
    FASTDA_UNROLL
    for (int i = 0; i < kinds; ++i) FASTDA_UNROLL
    for (int c = 0; c < Walk::channels; ++c)
      constants[i][c] = shared[i * Walk::width + w.column * Walk::channels + c];
  }
}
// Doubles that column_sum and share_constants need of shared memory.
constexpr int norm_scratch = norm_threads / 32 * 8 * 8 * 2;

template <typename S>
FASTDA_DEVICE S normalized(S x, S center, S scale, S shift) {
  // In one rounding, whatever a compiler would make of it: backward asks for its sign again.
  return fma_of(x - center, scale, shift);
}

enum NormKind { center_of, scale_of, shift_of, slope_of, offset_of };

// y of a step.
template <typename T, int N, typename Walk, typename S, int kinds>
FASTDA_DEVICE void norm_apply(const Walk& w, int step, const Pack<T, N> (&x)[Walk::packs],
                              const Pack<T, N> (&residual)[Walk::packs],
                              const S (&constants)[kinds][Walk::channels]) {
  const auto slope = S(w.p.negative_slope);
  const bool adds = w.p.residual != nullptr;
  w.each(step, [&](int k, int64_t at) {
    Pack<T, N> out;
    FASTDA_UNROLL
    for (int e = 0; e < N; ++e) {
      const int c = w.index(e);
      S v = normalized(S(widen(x[k].at[e])), constants[center_of][c], constants[scale_of][c],
                       constants[shift_of][c]);
      if (adds) v += S(widen(residual[k].at[e]));
      out.at[e] = narrowed<T>(masked_wide(v, v, slope));
    }
    store_pack(static_cast<T*>(w.p.y) + at, out);
  });
}

// What of grad passes the activation, of entry e of a pack.
template <typename T, int N, typename S, int kinds, int C>
FASTDA_DEVICE S norm_passed(const Norm& p, const Pack<T, N>& grad, const Pack<T, N>& x,
                            const Pack<T, N>& output, const S (&constants)[kinds][C], int e,
                            int c) {
  const S result = p.output ? S(widen(output.at[e]))
                            : normalized(S(widen(x.at[e])), constants[center_of][c],
                                         constants[scale_of][c], constants[shift_of][c]);
  return masked_wide(result, S(widen(grad.at[e])), S(p.negative_slope));
}

// Adds to the sums of a step's gradients and of their products with (x - center), and writes
// d_residual.
template <typename T, int N, typename Walk, typename S, int kinds>
FASTDA_DEVICE void norm_gather(const Walk& w, int step, const Pack<T, N> (&grad)[Walk::packs],
                               const Pack<T, N> (&x)[Walk::packs],
                               const Pack<T, N> (&output)[Walk::packs],
                               const S (&constants)[kinds][Walk::channels], S (&sum)[N],
                               S (&product)[N]) {
  auto* d_residual = static_cast<T*>(w.p.d_residual);
  w.each(step, [&](int k, int64_t at) {
    Pack<T, N> out;
    FASTDA_UNROLL
    for (int e = 0; e < N; ++e) {
      const int c = w.index(e);
      const S g = norm_passed<T, N>(w.p, grad[k], x[k], output[k], constants, e, c);
      sum[e] += g;
      product[e] += g * (S(widen(x[k].at[e])) - constants[center_of][c]);
      out.at[e] = narrowed<T>(g);
    }
    if (d_residual) store_pack(d_residual + at, out);
  });
}
// The sums over a column of threads, in double.
template <int threads, typename Walk, typename S, int N>
FASTDA_DEVICE void norm_add_up(const S (&sum)[N], const S (&product)[N], double* scratch,
                               double (&total)[2 * Walk::channels]) {
  FASTDA_UNROLL
  for (int c = 0; c < 2 * Walk::channels; ++c) total[c] = 0;
  FASTDA_UNROLL
  for (int e = 0; e < N; ++e) {
    total[Walk::index(e)] += double(sum[e]);
    total[Walk::channels + Walk::index(e)] += double(product[e]);
  }
  column_sum<threads, Walk::columns>(total, scratch);
}

template <typename T, int N, typename Walk, typename S>
FASTDA_DEVICE void norm_input_gradient(const Walk& w, int step,
                                       const Pack<T, N> (&grad)[Walk::packs],
                                       const Pack<T, N> (&x)[Walk::packs],
                                       const Pack<T, N> (&output)[Walk::packs],
                                       const S (&constants)[5][Walk::channels]) {
  w.each(step, [&](int k, int64_t at) {
    Pack<T, N> out;
    FASTDA_UNROLL
    for (int e = 0; e < N; ++e) {
      const int c = w.index(e);
      const S g = norm_passed<T, N>(w.p, grad[k], x[k], output[k], constants, e, c);
      S d = g * constants[scale_of][c];
      if (w.p.through_statistics)
        d = fma_of(S(widen(x[k].at[e])) - constants[center_of][c], constants[slope_of][c],
                   d + constants[offset_of][c]);
      out.at[e] = narrowed<T>(d);
    }
    store_pack(static_cast<T*>(w.p.d_x) + at, out);
  });
}

// -- in two passes

// [pieces, statistics]; of a single piece the second is the variance.
template <typename T, int N, bool Rows>
FASTDA_KERNEL(norm_threads, 2)
norm_moments_kernel(Norm p, NormCut cut, double* means, double* squares) {
  using Walk = NormWalk<T, N, Rows, norm_threads>;
  FASTDA_SHARED(double, scratch, norm_scratch);
  const int64_t unit = blockIdx.x / unsigned(cut.pieces);
  const Walk w(p, cut, unit, int(blockIdx.x - unit * cut.pieces), int(threadIdx.x));
  typename Walk::Tile tile;
  w.load(p.x, 0, tile);
  double total[Walk::channels], square[Walk::channels];
  const bool last = w.piece + 1 == cut.pieces;
  norm_moments<norm_threads, T, N>(w, tile, last ? cut.last_share : cut.share, scratch, total,
                                   square);
  if (!w.writes()) return;
  const int64_t at = w.piece * p.groups * p.channels + w.first_statistic() + w.column * N;
  FASTDA_UNROLL
  for (int c = 0; c < Walk::channels; ++c) {
    means[at + c] = total[c] / (last ? cut.last_values : cut.values);
    squares[at + c] = cut.pieces == 1 ? square[c] / cut.values : square[c];
  }
}

// Mean and variance of 32 statistics a block, of the pieces: warps take them in turn.
FASTDA_KERNEL(norm_threads, 2)
norm_statistics_kernel(NormCut cut, const double* means, const double* squares, int64_t statistics,
                       double values, double* mean, double* variance) {
  constexpr int warps = norm_threads / 32;
  FASTDA_SHARED(double, scratch, norm_scratch);
  const int warp = int(threadIdx.x / 32);
  const int64_t s = int64_t(blockIdx.x) * 32 + threadIdx.x % 32;
  const auto each = [&](auto&& f) {
    if (s >= statistics) return;
    for (int i = warp; i < cut.pieces; i += warps)
      f(i * statistics + s, i + 1 == cut.pieces ? cut.last_values : cut.values);
  };
  double m[1] = {}, v[1] = {};
  each([&](int64_t at, double n) { m[0] += n * means[at]; });
  column_sum<norm_threads, 32>(m, scratch);
  m[0] /= values;
  each([&](int64_t at, double n) {
    const double d = means[at] - m[0];
    v[0] += squares[at] + n * d * d;
  });
  column_sum<norm_threads, 32>(v, scratch);
  if (warp > 0 || s >= statistics) return;
  mean[s] = m[0];
  variance[s] = v[0] / values;
}

// From the end, which the cache still has.
template <typename T, int N, bool Rows>
FASTDA_KERNEL(norm_threads, 2)
norm_apply_kernel(Norm p, NormCut cut) {
  using S = typename Wide<T>::type;
  using Walk = NormWalk<T, N, Rows, norm_threads>;
  FASTDA_SHARED(double, scratch, norm_scratch);
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const int64_t unit = block / unsigned(cut.pieces);
  const Walk w(p, cut, unit, int(block - unit * cut.pieces), int(threadIdx.x));
  S constants[3][Walk::channels];
  share_constants<norm_threads>(w, scratch, constants, [&](int t, S(&mine)[3]) {
    const int64_t s = w.first_statistic() + t;
    const auto of = norm_constants<S>(p, s, w.first_channel + t);
    mine[center_of] = of.center, mine[scale_of] = of.scale, mine[shift_of] = of.shift;
    if (p.own_mean && w.piece == 0) {
      p.own_mean[s] = load_scalar(p.mean.data, p.mean.dtype, s);
      p.own_variance[s] = load_scalar(p.variance.data, p.variance.dtype, s);
    }
  });
  FASTDA_NO_UNROLL
  for (int step = 0; step < cut.steps; ++step) {
    typename Walk::Tile x, residual;
    w.load(p.x, step, x);
    if (p.residual) w.load(p.residual, step, residual);
    norm_apply<T, N>(w, step, x, residual, constants);
  }
}

// [2, pieces, statistics]: sums of gradients, and of their products with (x - center).
template <typename T, int N, bool Rows>
FASTDA_KERNEL(norm_threads, 2)
norm_sums_kernel(Norm p, NormCut cut, double* sums) {
  using S = typename Wide<T>::type;
  using Walk = NormWalk<T, N, Rows, norm_threads>;
  FASTDA_SHARED(double, scratch, norm_scratch);
  const int64_t unit = blockIdx.x / unsigned(cut.pieces);
  const Walk w(p, cut, unit, int(blockIdx.x - unit * cut.pieces), int(threadIdx.x));
  S constants[3][Walk::channels] = {};
  share_constants<norm_threads>(w, scratch, constants, [&](int t, S(&mine)[3]) {
    const auto of = norm_constants<S>(p, w.first_statistic() + t, w.first_channel + t);
    mine[center_of] = of.center, mine[scale_of] = of.scale, mine[shift_of] = of.shift;
  });
  S sum[N] = {}, product[N] = {};
  FASTDA_NO_UNROLL
  for (int step = 0; step < cut.steps; ++step) {
    typename Walk::Tile grad, x, output;
    w.load(p.grad, step, grad);
    w.load(p.x, step, x);
    if (p.output) w.load(p.output, step, output);
    norm_gather<T, N>(w, step, grad, x, output, constants, sum, product);
  }
  double total[2 * Walk::channels];
  norm_add_up<norm_threads, Walk>(sum, product, scratch, total);
  if (!w.writes()) return;
  const int64_t statistics = p.groups * p.channels;
  const int64_t at = w.piece * statistics + w.first_statistic() + w.column * N;
  FASTDA_UNROLL
  for (int c = 0; c < Walk::channels; ++c) {
    sums[at + c] = total[c];
    sums[cut.pieces * statistics + at + c] = total[Walk::channels + c];
  }
}

// [2, statistics]: the sums of the pieces; a block has 32 statistics.
FASTDA_KERNEL(norm_threads, 2)
norm_add_kernel(const double* sums, int pieces, int64_t statistics, double* totals) {
  FASTDA_SHARED(double, scratch, norm_scratch);
  const int warp = int(threadIdx.x / 32);
  const int64_t s = int64_t(blockIdx.x) * 32 + threadIdx.x % 32;
  double total[2] = {};
  if (s < statistics)
    for (int i = warp; i < pieces; i += norm_threads / 32) {
      total[0] += sums[i * statistics + s];
      total[1] += sums[(int64_t(pieces) + i) * statistics + s];
    }
  column_sum<norm_threads, 32>(total, scratch);
  if (warp > 0 || s >= statistics) return;
  totals[s] = total[0];
  totals[statistics + s] = total[1];
}

// d_weight and d_bias of 32 channels a block: warps take the groups in turn.
template <typename S>
FASTDA_KERNEL(norm_threads, 2)
norm_weight_kernel(Norm p, const double* totals) {
  FASTDA_SHARED(double, scratch, norm_scratch);
  const int warp = int(threadIdx.x / 32);
  const int64_t c = int64_t(blockIdx.x) * 32 + threadIdx.x % 32;
  double total[2] = {};
  if (c < p.channels)
    for (int64_t g = warp; g < p.groups; g += norm_threads / 32) {
      const int64_t s = g * p.channels + c;
      const double grads = totals[s], products = totals[p.groups * p.channels + s];
      total[0] += grads;
      total[1] += norm_constants<S>(p, s, int(c)).by_weight(grads, products);
    }
  column_sum<norm_threads, 32>(total, scratch);
  if (warp > 0 || c >= p.channels) return;
  if (p.d_bias) static_cast<S*>(p.d_bias)[c] = S(total[0]);
  if (p.d_weight) static_cast<S*>(p.d_weight)[c] = S(total[1]);
}

template <typename T, int N, bool Rows>
FASTDA_KERNEL(norm_threads, 2)
norm_input_gradient_kernel(Norm p, NormCut cut, const double* totals) {
  using S = typename Wide<T>::type;
  using Walk = NormWalk<T, N, Rows, norm_threads>;
  FASTDA_SHARED(double, scratch, norm_scratch);
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const int64_t unit = block / unsigned(cut.pieces);
  const Walk w(p, cut, unit, int(block - unit * cut.pieces), int(threadIdx.x));
  S constants[5][Walk::channels] = {};
  share_constants<norm_threads>(w, scratch, constants, [&](int t, S(&mine)[5]) {
    const int64_t s = w.first_statistic() + t;
    const auto of = norm_constants<S>(p, s, w.first_channel + t);
    mine[center_of] = of.center, mine[scale_of] = of.scale, mine[shift_of] = of.shift;
    mine[slope_of] = mine[offset_of] = 0;
    if (p.through_statistics)
      of.through(totals[s], totals[p.groups * p.channels + s], double(p.images * p.pixels),
                 mine[slope_of], mine[offset_of]);
  });
  FASTDA_NO_UNROLL
  for (int step = 0; step < cut.steps; ++step) {
    typename Walk::Tile grad, x, output;
    w.load(p.grad, step, grad);
    w.load(p.x, step, x);
    if (p.output) w.load(p.output, step, output);
    norm_input_gradient<T, N>(w, step, grad, x, output, constants);
  }
}

// -- in one pass: `threads` have all values of a statistic in registers

// What column_sum may still be reading when the constants are written behind it.
constexpr int norm_sums_of_warps = 2 * norm_threads / 32;

template <typename T, int N, int threads>
FASTDA_KERNEL(norm_threads, 2)
norm_whole_kernel(Norm p, NormCut cut) {
  using S = typename Wide<T>::type;
  using Walk = NormWalk<T, N, false, threads>;
  FASTDA_SHARED(double, scratch, norm_scratch);
  const int64_t s = int64_t(blockIdx.x) * (norm_threads / threads) + threadIdx.x / threads;
  if (threads == 32 && s >= p.groups * p.channels) return;
  const Walk w(p, cut, s, 0, int(threadIdx.x % threads));
  typename Walk::Tile x, residual;
  w.load(p.x, 0, x);
  if (p.residual) w.load(p.residual, 0, residual);
  double total[1], square[1];
  norm_moments<threads, T, N>(w, x, cut.share, scratch, total, square);
  S constants[3][1];
  share_constants<threads>(w, scratch + norm_sums_of_warps, constants, [&](int, S(&mine)[3]) {
    const double mean = total[0] / cut.values, variance = square[0] / cut.values;
    const NormConstants<S> of(p, w.first_channel, mean, variance);
    mine[center_of] = of.center, mine[scale_of] = of.scale, mine[shift_of] = of.shift;
    if (!w.writes()) return;
    p.own_mean[s] = mean;
    p.own_variance[s] = variance;
  });
  norm_apply<T, N>(w, 0, x, residual, constants);
}

template <typename T, int N, int threads>
FASTDA_KERNEL(norm_threads, 2)
norm_whole_backward_kernel(Norm p, NormCut cut, double* totals) {
  using S = typename Wide<T>::type;
  using Walk = NormWalk<T, N, false, threads>;
  FASTDA_SHARED(double, scratch, norm_scratch);
  const int64_t statistics = p.groups * p.channels;
  const int64_t s = int64_t(blockIdx.x) * (norm_threads / threads) + threadIdx.x / threads;
  if (threads == 32 && s >= statistics) return;
  const Walk w(p, cut, s, 0, int(threadIdx.x % threads));
  typename Walk::Tile grad, x, output;
  w.load(p.grad, 0, grad);
  w.load(p.x, 0, x);
  if (p.output) w.load(p.output, 0, output);
  S constants[5][1] = {};
  const auto compute = [&](S(&mine)[5], bool slopes, const double (&total)[2]) {
    const auto of = norm_constants<S>(p, s, w.first_channel);
    mine[center_of] = of.center, mine[scale_of] = of.scale, mine[shift_of] = of.shift;
    mine[slope_of] = mine[offset_of] = 0;
    if (slopes) of.through(total[0], total[1], cut.values, mine[slope_of], mine[offset_of]);
  };
  double total[2] = {};
  share_constants<threads>(w, scratch, constants,
                           [&](int, S(&mine)[5]) { compute(mine, false, total); });
  S sum[N] = {}, product[N] = {};
  norm_gather<T, N>(w, 0, grad, x, output, constants, sum, product);
  norm_add_up<threads, Walk>(sum, product, scratch, total);
  if (w.writes()) {
    totals[s] = total[0];
    totals[statistics + s] = total[1];
  }
  if (p.d_x == nullptr) return;
  share_constants<threads>(w, scratch + norm_sums_of_warps, constants,
                           [&](int, S(&mine)[5]) { compute(mine, p.through_statistics, total); });
  norm_input_gradient<T, N>(w, 0, grad, x, output, constants);
}

}  // namespace fastda::cuda
