// The filters of winograd_large.inl and winograd_few.inl to their points and back, in double. Internal
// linkage throughout: see common/dtype.h.
#pragma once

#include "cpu/conv/layout.h"
#include "cpu/conv/transform.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

template <typename W>
constexpr FilterMatrix<W> filter_matrix{};

// to(point, vector of output channels, piece, channel) is where the filter goes, a vector each; zeros
// past the last output channel and in the channels up to `channels`.
template <typename W, typename T, typename To>
void transform_filter(const ConvArgs& a, int64_t pieces, int64_t channels, To&& to) {
  constexpr int L = lanes<float>, TAPS = W::taps, POINTS = W::points;
  const auto& G = filter_matrix<W>;
  for (int64_t vector = 0; vector < padded(a.out_channels) / L; ++vector) {
    const int64_t k = vector * L;
    for (int64_t i = 0; i < pieces * pieces; ++i) {
      for (int64_t c = 0; c < channels; ++c) {
        double half[POINTS][TAPS][L] = {};
        for (int y = 0; y < TAPS; ++y) {
          for (int x = 0; x < TAPS; ++x) {
            const int64_t h = i / pieces * TAPS + y, w = i % pieces * TAPS + x;
            double g[L] = {};
            for (int64_t j = 0; j < min(L, a.out_channels - k); ++j)
              if (h < a.kernel && w < a.kernel && c < a.in_channels)
                g[j] = double(load(at<T>(a.filter, k + j, c, h, w)));
            for (int p = 0; p < POINTS; ++p)
              for (int j = 0; j < L; ++j) half[p][x][j] += G.at[p][y] * g[j];
          }
        }
        for (int p = 0; p < POINTS * POINTS; ++p) {
          float* out = to(p, vector, i, c);
          for (int j = 0; j < L; ++j) {
            double u = 0;
            for (int x = 0; x < TAPS; ++x) u += G.at[p % POINTS][x] * half[p / POINTS][x][j];
            out[j] = float(u);
          }
        }
      }
    }
  }
}

// The transpose: part(chunk, point, vector, piece, channel) is where a chunk's sums lie. False where some
// result is not finite.
template <typename W, typename T, typename Part>
bool combine_filter(const FilterGradArgs& a, int64_t pieces, int64_t chunks, Part&& part) {
  constexpr int L = lanes<float>, TAPS = W::taps, POINTS = W::points;
  const auto& G = filter_matrix<W>;
  bool finite = true;
  // Some vectors at a time: the sums of a point and a chunk lie on a page of their own.
  constexpr int V = 64 / L;
  double u[POINTS * POINTS][V][L];
  for (int64_t i = 0; i < pieces * pieces; ++i) {
    for (int64_t c = 0; c < a.in_channels; ++c) {
      for (int64_t k0 = 0; k0 < a.out_channels; k0 += V * L) {
        const int vectors = int(min(V, ceil_div(a.out_channels - k0, L)));
        for (int p = 0; p < POINTS * POINTS; ++p) {
          for (int v = 0; v < vectors; ++v)
            for (int j = 0; j < L; ++j) u[p][v][j] = 0;
          for (int64_t n = 0; n < chunks; ++n) {
            for (int v = 0; v < vectors; ++v) {
              const float* sum = part(n, p, k0 / L + v, i, c);
              for (int j = 0; j < L; ++j) u[p][v][j] += double(sum[j]);
            }
          }
        }
        for (int v = 0; v < vectors; ++v) {
          double half[TAPS][POINTS][L] = {};
          for (int p = 0; p < POINTS * POINTS; ++p)
            for (int y = 0; y < TAPS; ++y)
              for (int j = 0; j < L; ++j)
                half[y][p % POINTS][j] += G.at[p / POINTS][y] * u[p][v][j];
          const int64_t k = k0 + v * L;
          for (int y = 0; y < TAPS; ++y) {
            for (int x = 0; x < TAPS; ++x) {
              const int64_t h = i / pieces * TAPS + y, w = i % pieces * TAPS + x;
              if (h >= a.kernel || w >= a.kernel) continue;
              double g[L] = {};
              for (int p = 0; p < POINTS; ++p)
                for (int j = 0; j < L; ++j) g[j] += G.at[p][x] * half[y][p][j];
              for (int64_t j = 0; j < min(L, a.out_channels - k); ++j) {
                finite &= g[j] - g[j] == 0;
                store(const_cast<T*>(at<T>(a.d_filter, k + j, c, h, w)), float(g[j]));
              }
            }
          }
        }
      }
    }
  }
  return finite;
}

// of(chunk): the sums of the bias' gradient.
template <typename T, typename Of>
void combine_bias(int64_t out_channels, int64_t chunks, T* d_bias, Of&& of) {
  for (int64_t k = 0; k < out_channels; ++k) {
    double sum = 0;
    for (int64_t n = 0; n < chunks; ++n) sum += of(n)[k];
    store(d_bias + k, float(sum));
  }
}

}  // namespace
}  // namespace fastda::cpu::FASTDA_ISA
