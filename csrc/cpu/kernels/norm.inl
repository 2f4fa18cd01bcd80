// Compiled once per instruction set, with FASTDA_ISA naming it.
//
// Two passes over memory, forward and back. A run is a piece of one channel, or rows of all channels
// (channels_last):
//
//   one channel                                rows of channels
//
//   x x x x | x x x x | x x x x | x x          x x x x | x x x x | x     a register is some channels
//   four registers at once, one constant       x x x x | x x x x | x     of a row and has its own
//   of each kind                               x x x x | x x x x | x     constants
//
// Statistics: within a block of at most 2048 entries of a channel (small planes together, 128 rows)
// sums of d = x - pivot and of d^2 in the accumulator type, where the pivot is the mean of the
// block's first entries; then in double. A pivot off the block's mean costs what (mean - pivot)^2
// is to the variance: an eighth of a block is never farther from its mean than the root of 7
// variances.
#include "cpu/kernels/norm.h"

#include "cpu/simd/stream.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

constexpr int block_entries = 2048, pivot_entries = 256;
constexpr int block_rows = 128, pivot_rows = 16;
constexpr int panel = 256;        // channels whose sums are kept at once
constexpr int few_channels = 64;  // of rows that are written four at a time

template <typename S, typename T>
FASTDA_INLINE Vec<S> load_whole(const T* p) {
  if constexpr (sizeof(T) == sizeof(S) || FASTDA_SIMD)
    return load_vec(p);
  else
    return load_first<S>(p, lanes<S>);
}
template <typename S, typename T>
FASTDA_INLINE void store_whole(T* p, Vec<S> v) {
  if constexpr (sizeof(T) == sizeof(S) || FASTDA_SIMD)
    store_vec(p, v);
  else
    store_first<S>(p, v, lanes<S>);
}
// A whole vector, or the first n lanes of one.
template <typename S, bool Whole, typename T>
FASTDA_INLINE Vec<S> load_some(const T* p, int n) {
  if (n > lanes<S>) __builtin_unreachable();  // or GCC 12 warns
  if constexpr (Whole)
    return load_whole<S>(p);
  else
    return load_first<S>(p, n);
}
template <typename S, bool Whole, typename T>
FASTDA_INLINE void store_some(T* p, Vec<S> v, int n) {
  if constexpr (Whole)
    store_whole<S>(p, v);
  else
    store_first<S>(p, v, n);
}
// A result: whole aligned vectors may go past the cache.
template <typename S, bool Whole, typename T>
FASTDA_INLINE void write_some(T* p, Vec<S> v, int n, bool past_the_cache) {
  if constexpr (Whole && sizeof(T) == sizeof(float) && sizeof(S) == sizeof(float)) {
    if (past_the_cache && reinterpret_cast<uintptr_t>(p) % sizeof v == 0) return stream_vec(p, v);
  }
  store_some<S, Whole>(p, v, n);
}
template <typename S>
inline double sum_lanes(Vec<S> v) {
  S lane[lanes<S>];
  store_vec(lane, v);
#pragma GCC unroll 4
  for (int half = lanes<S> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return double(lane[0]);
}
// What follows a normalisation. Which it is, is a branch a few vectors, always taken alike.
template <typename S>
struct Activated {
  Activation activation;
  S slope;
  explicit Activated(const Norm& norm)
      : activation(norm.activation), slope(S(norm.negative_slope)) {}
  // The gradients of what goes into the activation, read off its results (or off what goes in, which
  // has the same sign); of values by themselves, the activation.
  template <int R>
  [[gnu::always_inline]] void apply(Vec<S>* grad, const Vec<S>* output) const {
    if (activation == Activation::relu) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) grad[r] = relu_mask(grad[r], output[r]);
    } else if (activation == Activation::leaky_relu) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) grad[r] = leaky_relu_mask(grad[r], output[r], broadcast(slope));
    }
  }
};

// f.template operator()<Whole>(index, lanes) for the vectors of [0, n).
template <typename S, typename F>
FASTDA_INLINE void for_vectors(int64_t n, F&& f) {
  constexpr int L = lanes<S>;
  int64_t i = 0;
  for (; i + L <= n; i += L) f.template operator()<true>(i, L);
  if (i < n) f.template operator()<false>(i, int(n - i));
}

// Everything in double: for values whose squares are not to be had in the accumulator type, and for
// what is not finite.
template <typename T>
void exact_moments(const T* x, int64_t n, int64_t step, int64_t planes, int64_t stride,
                   double& mean, double& squares) {
  const auto entry = [&](int64_t p, int64_t i) { return double(load(x + p * stride + i * step)); };
  double sum = 0;
  for (int64_t p = 0; p < planes; ++p)
    for (int64_t i = 0; i < n; ++i) sum += entry(p, i);
  mean = sum / double(n * planes);
  squares = 0;
  for (int64_t p = 0; p < planes; ++p)
    for (int64_t i = 0; i < n; ++i) {
      const double d = entry(p, i) - mean;
      squares += d * d;
    }
}
inline bool is_finite(double x) { return x - x == 0; }

// Sums about the pivot as mean and squares about the mean; false if they overflowed.
inline bool settle(double pivot, double sum, double square_sum, int64_t n, double& mean,
                   double& squares) {
  const double difference = sum / double(n), about_mean = square_sum - sum * difference;
  mean = pivot + difference;
  squares = about_mean < 0 ? 0 : about_mean;
  return is_finite(square_sum);
}

// Blocks of at most block_entries entries of a channel, whole small planes or pieces of one:
// f(begin, entries of a plane, planes).
template <typename F>
FASTDA_INLINE void for_blocks(const NormRun& run, F&& f) {
  const int64_t together = run.positions < block_entries ? block_entries / run.positions : 1;
  for (int64_t p = 0; p < run.planes; p += together) {
    const int64_t planes = run.planes - p < together ? run.planes - p : together;
    for (int64_t i = 0; i < run.positions; i += block_entries) {
      const int64_t left = run.positions - i;
      f(run.begin + p * run.stride + i, int(left < block_entries ? left : block_entries),
        int(planes));
    }
  }
}

template <typename T, typename S>
void moments_of_channel(const T* x, const NormRun& run, double& mean, double& squares) {
  constexpr int L = lanes<S>, group = 4;
  int64_t before = 0;
  for_blocks(run, [&](int64_t begin, int n, int planes) __attribute__((always_inline)) {
    const int tail = n % L;
    const auto for_planes = [&](int taken, int entries, auto&& add) __attribute__((always_inline)) {
      for (int q = 0; q < taken; ++q) {
        const T* p = x + begin + q * run.stride;
        int i = 0;
        for (; i + group * L <= entries; i += group * L)
#pragma GCC unroll 4
          for (int v = 0; v < group; ++v) add(v, load_whole<S>(p + i + v * L), true);
        for (; i + L <= entries; i += L) add(0, load_whole<S>(p + i), true);
        if (i < entries) add(1, load_first<S>(p + i, entries - i), false);
      }
    };
    Vec<S> sum[group] = {}, square[group] = {};
    // An eighth of the block or more.
    const int few = n < pivot_entries ? n : pivot_entries, taken = planes < 8 ? 1 : planes / 8;
    for_planes(taken, few, [&](int v, Vec<S> entries, bool) __attribute__((always_inline)) {
      sum[v] += entries;
    });
    const S pivot = S(sum_lanes<S>((sum[0] + sum[1]) + (sum[2] + sum[3])) / (few * taken));
    S filled[L];
    for (int i = 0; i < L; ++i) filled[i] = pivot;
    const Vec<S> pivots = broadcast(pivot), last = load_first<S>(filled, tail);
    for (int v = 0; v < group; ++v) sum[v] = Vec<S>{};
    for_planes(planes, n, [&](int v, Vec<S> entries, bool whole) __attribute__((always_inline)) {
      const Vec<S> d = entries - (whole ? pivots : last);
      sum[v] += d;
      square[v] += d * d;
    });
    const int64_t count = int64_t(n) * planes;
    double block_mean, block_squares;
    if (!settle(double(pivot), sum_lanes<S>((sum[0] + sum[1]) + (sum[2] + sum[3])),
                sum_lanes<S>((square[0] + square[1]) + (square[2] + square[3])), count, block_mean,
                block_squares))
      exact_moments(x + begin, n, 1, planes, run.stride, block_mean, block_squares);
    if (before == 0) {
      mean = block_mean;
      squares = block_squares;
    } else {
      Merge(before, count)(mean, squares, block_mean, block_squares);
    }
    before += count;
  });
}

// Sums of up to `panel` channels of a block of rows. They lie in the first-level cache, so that whole
// rows are read one after another, which is what memory is good at.
template <typename S>
struct PanelSums {
  alignas(64) S first[panel + lanes<S>] = {}, second[panel + lanes<S>] = {};
};

// f.template operator()<Whole, Rows>(row, channel, lanes): the vectors of the first `grouped` rows,
// four at a time, then of single ones.
template <typename S, typename F>
FASTDA_INLINE void for_row_groups(int64_t rows, int64_t grouped, int64_t channels, F&& f) {
  int64_t r = 0;
  for (; r + 4 <= grouped; r += 4)
    for_vectors<S>(channels, [&]<bool Whole>(int64_t c, int n) __attribute__((always_inline)) {
      f.template operator()<Whole, 4>(r, c, n);
    });
  for (; r < rows; ++r)
    for_vectors<S>(channels, [&]<bool Whole>(int64_t c, int n) __attribute__((always_inline)) {
      f.template operator()<Whole, 1>(r, c, n);
    });
}
template <int N, typename V>
FASTDA_INLINE V sum_of(const V* v) {
  if constexpr (N == 4) return (v[0] + v[1]) + (v[2] + v[3]);
  return v[0];
}

template <typename T, typename S>
void moments_of_rows(const T* x, int rows, int64_t stride, int channels, S* pivots,
                     PanelSums<S>& sums) {
  const int few = rows < pivot_rows ? rows : pivot_rows;
  const auto row = [&](int64_t r, int64_t c) { return x + r * stride + c; };
  for_row_groups<S>(few, few, channels,
                    [&]<bool Whole, int R>(int64_t r, int64_t c, int n)
                        __attribute__((always_inline)) {
                          Vec<S> v[R];
#pragma GCC unroll 4
                          for (int i = 0; i < R; ++i) v[i] = load_some<S, Whole>(row(r + i, c), n);
                          store_vec(pivots + c, load_vec(pivots + c) + sum_of<R>(v));
                        });
  for (int c = 0; c < channels; ++c) pivots[c] *= S(1) / S(few);
  for_row_groups<S>(rows, rows, channels,
                    [&]<bool Whole, int R>(int64_t r, int64_t c, int n)
                        __attribute__((always_inline)) {
                          const Vec<S> pivot = load_vec(pivots + c);
                          Vec<S> d[R], square[R];
#pragma GCC unroll 4
                          for (int i = 0; i < R; ++i) {
                            d[i] = load_some<S, Whole>(row(r + i, c), n) - pivot;
                            square[i] = d[i] * d[i];
                          }
                          store_vec(sums.first + c, load_vec(sums.first + c) + sum_of<R>(d));
                          store_vec(sums.second + c, load_vec(sums.second + c) + sum_of<R>(square));
                        });
}

template <typename T, typename S>
void moments_of(const T* x, const NormRun& run, double* mean, double* squares) {
  if (run.channels == 1) return moments_of_channel<T, S>(x, run, *mean, *squares);
  for (int64_t first = 0; first < run.positions; first += block_rows) {
    const int rows = int(run.positions - first < block_rows ? run.positions - first : block_rows);
    const Merge merge(first, rows);
    const T* block = x + run.begin + first * run.channels;
    for (int64_t c = 0; c < run.channels; c += panel) {
      const int taken = int(run.channels - c < panel ? run.channels - c : panel);
      alignas(64) S pivots[panel + lanes<S>] = {};
      PanelSums<S> sums;
      moments_of_rows<T, S>(block + c, rows, run.channels, taken, pivots, sums);
      for (int i = 0; i < taken; ++i) {
        double m, q;
        if (!settle(double(pivots[i]), double(sums.first[i]), double(sums.second[i]), rows, m, q))
          exact_moments(block + c + i, rows, run.channels, 1, 0, m, q);
        if (first == 0) {
          mean[c + i] = m;
          squares[c + i] = q;
        } else {
          merge(mean[c + i], squares[c + i], m, q);
        }
      }
    }
  }
}

// The constants of a run's statistics, from one for all to one a channel.
template <typename S, bool Rows>
struct Constant {
  const S* p;
  Constant(const void* all, const NormRun& run) : p(static_cast<const S*>(all) + run.statistic) {}
  template <bool Whole>
  [[gnu::always_inline]] Vec<S> at(int64_t i, int n) const {
    if constexpr (Rows)
      return load_some<S, Whole>(p + i, n);
    else
      return broadcast(*p);
  }
};

// f.template operator()<Whole, R>(entry, step, channel, lanes): R vectors of a run, `step` apart.
// Planes from the last, which the cache still has, each from where whole vectors of `out` are
// aligned, if there is one.
template <typename S, bool Rows, typename T, typename F>
FASTDA_INLINE void for_run(const NormRun& run, const T* out, F&& f) {
  constexpr int L = lanes<S>;
  if constexpr (Rows) {
    for_row_groups<S>(
        run.positions, run.channels <= few_channels ? run.positions : 0, run.channels,
        [&]<bool Whole, int R>(int64_t row, int64_t c, int n) __attribute__((always_inline)) {
          f.template operator()<Whole, R>(run.begin + row * run.channels + c, run.channels, c, n);
        });
  } else {
    for (int64_t p = run.planes - 1; p >= 0; --p) {
      const int64_t plane = run.begin + p * run.stride;
      const int off = out ? int(reinterpret_cast<uintptr_t>(out + plane) / sizeof(T) % L) : 0;
      int64_t i = off == 0 ? 0 : L - off;
      if (i > run.positions) i = run.positions;
      if (i > 0) f.template operator()<false, 1>(plane, 0, 0, int(i));
      for (; i + 4 * L <= run.positions; i += 4 * L)
        f.template operator()<true, 4>(plane + i, L, 0, L);
      for (; i + L <= run.positions; i += L) f.template operator()<true, 1>(plane + i, 0, 0, L);
      if (i < run.positions)
        f.template operator()<false, 1>(plane + i, 0, 0, int(run.positions - i));
    }
  }
}

template <typename T, typename S, bool Rows>
void normalize_of(const Norm& norm, const NormRun& run) {
  const T* x = static_cast<const T*>(norm.x);
  const T* residual = static_cast<const T*>(norm.residual);
  T* y = static_cast<T*>(norm.y);
  const Constant<S, Rows> centers(norm.center, run), scales(norm.scale, run),
      shifts(norm.shift, run);
  const Activated<S> activated(norm);
  const bool past = norm.past_the_cache;
  for_run<S, Rows>(run, past ? y : nullptr,
                   [&]<bool Whole, int R>(int64_t at, int64_t step, int64_t c,
                                          int n) __attribute__((always_inline)) {
                     const Vec<S> center = centers.template at<Whole>(c, n);
                     const Vec<S> scale = scales.template at<Whole>(c, n);
                     const Vec<S> shift = shifts.template at<Whole>(c, n);
                     Vec<S> v[R];
#pragma GCC unroll 4
                     for (int r = 0; r < R; ++r)
                       v[r] = (load_some<S, Whole>(x + at + r * step, n) - center) * scale + shift;
                     if (residual)
#pragma GCC unroll 4
                       for (int r = 0; r < R; ++r)
                         v[r] += load_some<S, Whole>(residual + at + r * step, n);
                     activated.template apply<R>(v, v);
#pragma GCC unroll 4
                     for (int r = 0; r < R; ++r)
                       write_some<S, Whole>(y + at + r * step, v[r], n, past);
                   });
}

// What passes the activation, of R vectors `step` apart, and x - center where that is wanted.
template <typename T, typename S, bool Rows>
struct Back {
  const T *x, *grad, *output;
  Activated<S> activated;
  bool reads_x;
  Constant<S, Rows> centers, scales, shifts;
  Back(const Norm& norm, const NormRun& run, bool want_x)
      : x(static_cast<const T*>(norm.x)),
        grad(static_cast<const T*>(norm.grad)),
        output(static_cast<const T*>(norm.output)),
        activated(norm),
        reads_x(want_x || (activated.activation != Activation::none && !output)),
        centers(norm.center, run),
        scales(norm.scale, run),
        shifts(norm.shift, run) {}
  template <bool Whole, int R>
  [[gnu::always_inline]] void operator()(int64_t at, int64_t step, int64_t c, int n, Vec<S>* passed,
                                         Vec<S>* centered) const {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) passed[r] = load_some<S, Whole>(grad + at + r * step, n);
    const Vec<S> center = centers.template at<Whole>(c, n);
    if (reads_x)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) centered[r] = load_some<S, Whole>(x + at + r * step, n) - center;
    if (activated.activation == Activation::none) return;
    Vec<S> y[R];
    if (output) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) y[r] = load_some<S, Whole>(output + at + r * step, n);
    } else {
      const Vec<S> scale = scales.template at<Whole>(c, n), shift = shifts.template at<Whole>(c, n);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) y[r] = centered[r] * scale + shift;
    }
    activated.template apply<R>(passed, y);
  }
};

template <typename T, typename S, bool Rows>
void input_gradient_of(const Norm& norm, const NormRun& run) {
  const Back<T, S, Rows> back(norm, run, norm.through_statistics);
  T* d_x = static_cast<T*>(norm.d_x);
  const Constant<S, Rows> slopes(norm.slope, run), offsets(norm.offset, run);
  const bool through = norm.through_statistics;
  const bool past = norm.past_the_cache;
  for_run<S, Rows>(run, past ? d_x : nullptr,
                   [&]<bool Whole, int R>(int64_t at, int64_t step, int64_t c, int n)
                       __attribute__((always_inline)) {
                         Vec<S> v[R], centered[R] = {};
                         back.template operator()<Whole, R>(at, step, c, n, v, centered);
                         const Vec<S> scale = back.scales.template at<Whole>(c, n);
                         const Vec<S> slope = slopes.template at<Whole>(c, n);
                         const Vec<S> offset = offsets.template at<Whole>(c, n);
#pragma GCC unroll 4
                         for (int r = 0; r < R; ++r) {
                           const Vec<S> direct = v[r] * scale;
                           v[r] = through ? centered[r] * slope + (direct + offset) : direct;
                         }
#pragma GCC unroll 4
                         for (int r = 0; r < R; ++r)
                           write_some<S, Whole>(d_x + at + r * step, v[r], n, past);
                       });
}

template <typename T, typename S>
void sums_of_channel(const Norm& norm, const NormRun& run, double& grads, double& products) {
  constexpr int L = lanes<S>, group = 4;
  const Back<T, S, false> back(norm, run, true);
  T* d_residual = static_cast<T*>(norm.d_residual);
  for_blocks(run, [&](int64_t begin, int n, int planes) __attribute__((always_inline)) {
    Vec<S> sum[group] = {}, product[group] = {};
    const auto add = [&]<bool Whole, int R>(int first, int64_t at, int count)
                         __attribute__((always_inline)) {
                           Vec<S> g[R], centered[R];
                           back.template operator()<Whole, R>(at, L, 0, count, g, centered);
                           if (d_residual)
#pragma GCC unroll 4
                             for (int r = 0; r < R; ++r)
                               store_some<S, Whole>(d_residual + at + r * L, g[r], count);
#pragma GCC unroll 4
                           for (int r = 0; r < R; ++r) {
                             sum[first + r] += g[r];
                             product[first + r] += g[r] * centered[r];
                           }
                         };
    for (int q = 0; q < planes; ++q) {
      const int64_t plane = begin + q * run.stride;
      int i = 0;
      for (; i + group * L <= n; i += group * L)
        add.template operator()<true, group>(0, plane + i, L);
      for (; i + L <= n; i += L) add.template operator()<true, 1>(0, plane + i, L);
      // Lanes past the end have a gradient of 0, whatever the mask.
      if (i < n) add.template operator()<false, 1>(1, plane + i, n - i);
    }
    grads += sum_lanes<S>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    products += sum_lanes<S>((product[0] + product[1]) + (product[2] + product[3]));
  });
}

template <typename T, typename S>
void sums_of_rows(const Norm& norm, const NormRun& run, int64_t begin, int rows, int64_t channel,
                  int channels, PanelSums<S>& sums) {
  const Back<T, S, true> back(norm, run, true);
  T* d_residual = static_cast<T*>(norm.d_residual);
  for_row_groups<S>(
      rows, rows, channels,
      [&]<bool Whole, int R>(int64_t row, int64_t c, int n) __attribute__((always_inline)) {
        const int64_t at = begin + row * run.channels + channel + c;
        Vec<S> g[R], product[R];
        back.template operator()<Whole, R>(at, run.channels, channel + c, n, g, product);
        if (d_residual)
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r)
            write_some<S, Whole>(d_residual + at + r * run.channels, g[r], n, norm.past_the_cache);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) product[r] *= g[r];
        store_vec(sums.first + c, load_vec(sums.first + c) + sum_of<R>(g));
        store_vec(sums.second + c, load_vec(sums.second + c) + sum_of<R>(product));
      });
}

template <typename T, typename S, bool Rows>
void sums_of(const Norm& norm, const NormRun& run, double* grads, double* products) {
  if constexpr (!Rows) {
    sums_of_channel<T, S>(norm, run, *grads, *products);
  } else {
    for (int64_t first = 0; first < run.positions; first += block_rows) {
      const int rows = int(run.positions - first < block_rows ? run.positions - first : block_rows);
      const int64_t begin = run.begin + first * run.channels;
      for (int64_t c = 0; c < run.channels; c += panel) {
        const int taken = int(run.channels - c < panel ? run.channels - c : panel);
        PanelSums<S> part;
        sums_of_rows<T, S>(norm, run, begin, rows, c, taken, part);
        for (int i = 0; i < taken; ++i) {
          grads[c + i] += double(part.first[i]);
          products[c + i] += double(part.second[i]);
        }
      }
    }
  }
}

// Calls f.template operator()<T, S, Rows>().
template <typename F>
void specialize(const Norm& norm, const NormRun& run, F&& f) {
  dispatch(norm.dtype, [&]<typename T>() {
    using S = typename Acc<T>::type;
    run.channels == 1 ? f.template operator()<T, S, false>() : f.template operator()<T, S, true>();
  });
}

void moments(const Norm& norm, const NormRun& run, double* mean, double* squares) {
  dispatch(norm.dtype, [&]<typename T>() {
    moments_of<T, typename Acc<T>::type>(static_cast<const T*>(norm.x), run, mean, squares);
  });
}
void normalize(const Norm& norm, const NormRun& run) {
  specialize(norm, run,
             [&]<typename T, typename S, bool Rows>() { normalize_of<T, S, Rows>(norm, run); });
  if (norm.past_the_cache) stream_fence();
}
void sums(const Norm& norm, const NormRun& run, double* grads, double* products) {
  specialize(norm, run, [&]<typename T, typename S, bool Rows>() {
    sums_of<T, S, Rows>(norm, run, grads, products);
  });
  if (norm.past_the_cache) stream_fence();
}
void input_gradient(const Norm& norm, const NormRun& run) {
  Norm n = norm;
  if (n.d_residual) {  // has passed the activation
    n.grad = n.d_residual;
    n.activation = Activation::none;
    n.output = nullptr;
  }
  specialize(n, run,
             [&]<typename T, typename S, bool Rows>() { input_gradient_of<T, S, Rows>(n, run); });
  if (norm.past_the_cache) stream_fence();
}

}  // namespace

extern const NormKernels norm;
const NormKernels norm = {moments, normalize, sums, input_gradient};

}  // namespace fastda::cpu::FASTDA_ISA
