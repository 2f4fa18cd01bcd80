#include "cuda/kernels/norm.cuh"

#include <algorithm>

#include "cuda/launch.h"

namespace fastda::cuda {
namespace {

constexpr int64_t many_blocks = 1024;  // fill every device more than once

template <int N>
struct Width {
  static constexpr int value = N;
};

// Calls f(Tag<T>{}, Width<entries of a pack>{}).
template <typename F>
void with_packs(const Norm& p, F&& f) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    constexpr int N = 16 / sizeof(typename decltype(tag)::type);
    (p.by_rows ? p.channels : p.pixels) % N == 0 ? f(tag, Width<N>{}) : f(tag, Width<1>{});
  });
}
template <typename F>
void with_layout(const Norm& p, F&& f) {
  with_packs(p,
             [&](auto tag, auto width) { p.by_rows ? f(tag, width, Yes{}) : f(tag, width, No{}); });
}

struct Cut : NormCut {
  int64_t units = 0;  // statistics, or chunks of all groups
  int threads = 0;    // that have all values of a statistic, if any can
  unsigned blocks() const { return unsigned(units * pieces); }
  unsigned teams() const { return unsigned(divide_up(units, norm_threads / threads)); }
};

template <typename T, int N, bool Rows>
Cut cut_of(const Norm& p) {
  using Walk = NormWalk<T, N, Rows, norm_threads>;
  Cut cut;
  cut.rows = Rows ? p.rows() : p.rows() / N;
  cut.chunks = Rows ? int(divide_up(p.channels, Walk::width)) : 1;
  cut.plane = Divisor(std::min<int64_t>(Rows ? 1 : p.pixels / N, (int64_t(1) << 31) - 1));
  cut.units = Rows ? p.groups * cut.chunks : p.statistics();
  const int64_t tile = Walk::packs * Walk::stride;
  if (!Rows && cut.rows <= tile) {
    cut.threads = cut.rows <= Walk::packs * 32 ? 32 : norm_threads;
    cut.piece = cut.rows;
  } else {
    const int64_t tiles = divide_up(cut.rows, tile);
    cut.steps = int(std::clamp<int64_t>(tiles * cut.units / many_blocks, 1, norm_steps));
    cut.piece = cut.steps * tile;
    cut.pieces = int(divide_up(cut.rows, cut.piece));
  }
  const int64_t row = Rows ? 1 : N;
  cut.values = double(std::min(cut.piece, cut.rows) * row);
  cut.last_values = double((cut.rows - (cut.pieces - 1) * cut.piece) * row);
  cut.share = 1 / cut.values;
  cut.last_share = 1 / cut.last_values;
  return cut;
}

unsigned by_32(int64_t n) { return unsigned(divide_up(n, 32)); }

}  // namespace

int64_t norm_partials(const Norm& p) {
  int64_t count = 0;
  with_layout(p, [&](auto tag, auto width, auto rows) {
    using T = typename decltype(tag)::type;
    const Cut cut = cut_of<T, width.value, rows.value>(p);
    // Those of the pieces, and of all.
    count = 2 * p.statistics() * (cut.pieces + 1);
  });
  return count;
}

void norm_forward(const Norm& given, void* stream) {
  with_layout(given, [&](auto tag, auto width, auto by_rows) {
    using T = typename decltype(tag)::type;
    constexpr int N = width.value;
    constexpr bool Rows = by_rows.value;
    Norm p = given;
    const Cut cut = cut_of<T, N, Rows>(p);
    if (p.mean.data == nullptr) {
      if constexpr (!Rows) {
        if (cut.threads) {
          const auto kernel = cut.threads == 32 ? norm_whole_kernel<T, N, 32>
                                                : norm_whole_kernel<T, N, norm_threads>;
          launch("norm_whole", kernel, cut.teams(), norm_threads, 0, stream, p, cut);
          return;
        }
      }
      double* const means = cut.pieces == 1 ? p.own_mean : p.partial;
      double* const squares =
          cut.pieces == 1 ? p.own_variance : p.partial + cut.pieces * p.statistics();
      launch("norm_moments", norm_moments_kernel<T, N, Rows>, cut.blocks(), norm_threads, 0, stream,
             p, cut, means, squares);
      if (cut.pieces > 1)
        launch("norm_statistics", norm_statistics_kernel, by_32(p.statistics()), norm_threads, 0,
               stream, cut, means, squares, p.statistics(), double(p.rows()), p.own_mean,
               p.own_variance);
      p.mean = {p.own_mean, DType::f64};
      p.variance = {p.own_variance, DType::f64};
      p.own_mean = p.own_variance = nullptr;
    }
    launch("norm_apply", norm_apply_kernel<T, N, Rows>, cut.blocks(), norm_threads, 0, stream, p,
           cut);
  });
}

void norm_backward(const Norm& given, void* stream) {
  with_layout(given, [&](auto tag, auto width, auto by_rows) {
    using T = typename decltype(tag)::type;
    using S = typename Wide<T>::type;
    constexpr int N = width.value;
    constexpr bool Rows = by_rows.value;
    Norm p = given;
    const Cut cut = cut_of<T, N, Rows>(p);
    double *const sums = p.partial, *totals = sums;
    const bool weights = p.d_weight || p.d_bias, through = p.d_x && p.through_statistics;
    bool whole = false;
    if (weights || p.d_residual || through) {
      if constexpr (!Rows) {
        if (cut.threads) {
          whole = true;
          const auto kernel = cut.threads == 32 ? norm_whole_backward_kernel<T, N, 32>
                                                : norm_whole_backward_kernel<T, N, norm_threads>;
          launch("norm_whole_backward", kernel, cut.teams(), norm_threads, 0, stream, p, cut,
                 totals);
        }
      }
      if (!whole) {
        launch("norm_sums", norm_sums_kernel<T, N, Rows>, cut.blocks(), norm_threads, 0, stream, p,
               cut, sums);
        if (cut.pieces > 1) {
          totals = sums + 2 * cut.pieces * p.statistics();
          launch("norm_add", norm_add_kernel, by_32(p.statistics()), norm_threads, 0, stream, sums,
                 cut.pieces, p.statistics(), totals);
        }
      }
      if (weights)
        launch("norm_weight", norm_weight_kernel<S>, by_32(p.channels), norm_threads, 0, stream, p,
               totals);
    }
    if (whole || p.d_x == nullptr) return;
    if (p.d_residual) {  // has passed the activation
      p.grad = p.d_residual;
      p.output = nullptr;
      p.negative_slope = 1;
    }
    launch("norm_input_gradient", norm_input_gradient_kernel<T, N, Rows>, cut.blocks(),
           norm_threads, 0, stream, p, cut, totals);
  });
}

}  // namespace fastda::cuda
