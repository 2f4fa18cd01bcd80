// Convolution of a tile of at most 128 or 256 output pixels (any height × width) with 64 output
// channels, a block of four warps:
//
//   for every row of channels
//     x ─ tile with halo, one row of channels ────┐ shared memory
//     for every tap                               │
//       filter ─ 64 × row, the next two taps ─────┤ (copied ahead)
//                                                 └─ registers
//                                                    warp: 32 or 64 pixels × 64 channels
//   registers ─ shared memory, float32 ─ + bias + residual, ReLU, mask ─ out
//
// No pixel is stored twice per tap: a tap is another address into the same tile (implicit matrix
// product). Whatever does not fit this (float64, filters too wide for the tile, few channels) goes
// through direct_conv_kernel, one output a thread.
#pragma once

#include "cuda/kernels/conv_tile.cuh"

namespace fastda::cuda {

constexpr int conv_threads = 128;
// Of a tile, where a warp has so many tiles of 16 pixels: two, or four, for which a filter is read
// half as often.
constexpr int conv_pixels(int each) { return conv_threads / 32 * each * 16; }
constexpr int conv_stages = 3;
constexpr int staging_stride = 72;  // floats: conflict-free pairs, and rows of 16-byte packs
constexpr int staging_stride_scalar = 65;

struct ConvKernel {
  View x, x_mask, residual, residual_mask, out_mask, out;
  const void* filter;  // prepared
  const void* bias;
  int in_channels, out_channels, kernel;
  int tile_height, tile_pixels;
  Divisor tile_width, tiles, tiles_across;  // tiles: of one image
  WindowShape window;
  bool relu, x_packs, out_packs;
  float slope;
};

// Adds everything but the product, and stores.
template <typename T, int each>
FASTDA_DEVICE void finish_tile(const ConvKernel& p, const float* staging, int image, int y0,
                               int x0) {
  constexpr int E = 16 / int(sizeof(T));
  const int first = int(blockIdx.y) * filter_columns;
  const auto* bias = static_cast<const T*>(p.bias);
  const auto place = [&](const View& v, int y, int x) {
    return static_cast<T*>(v.data) + (image * v.n + y * v.h + x * v.w);
  };
  const auto finished = [&](float v, int c, T residual, T residual_mask, T out_mask) {
    if (bias) v += widen(bias[c]);
    if (p.residual.data)
      v += widen(p.residual_mask.data ? masked(residual_mask, residual, p.slope) : residual);
    if (p.relu) v = masked_wide(v, v, p.slope);
    if (p.out_mask.data) v = masked_wide(widen(out_mask), v, p.slope);
    return narrowed<T>(v);
  };
  if (p.out_packs) {
    constexpr int packs = filter_columns / E;
    FASTDA_NO_UNROLL
    for (int i = int(threadIdx.x); i < p.tile_pixels * packs; i += conv_threads) {
      const int m = i / packs, n = i % packs * E, c = first + n;
      const auto row = int(p.tile_width.quotient(uint32_t(m)));
      const int y = y0 + row, x = x0 + m - row * int(p.tile_width.value);
      if (y >= p.window.height || x >= p.window.columns || c >= p.out_channels) continue;
      Pack<float, E> v;
      const float* from = staging + m * staging_stride + n;
      if constexpr (E == 8) {
        // A pixel's 64 sums are all banks twice: the lanes of its second half read the second 16 of their
        // 32 bytes first, so that eight lanes together meet every bank once.
        const bool turned = n >= filter_columns / 2;
        const Pack<float, 4> one = load_pack<4>(from + (turned ? 4 : 0));
        const Pack<float, 4> two = load_pack<4>(from + (turned ? 0 : 4));
        FASTDA_UNROLL
        for (int e = 0; e < 4; ++e) {
          v.at[e] = turned ? two.at[e] : one.at[e];
          v.at[4 + e] = turned ? one.at[e] : two.at[e];
        }
      } else {
        v = load_pack<E>(from);
      }
      Pack<T, E> residual{}, residual_mask{}, out_mask{}, result;
      if (p.residual.data) residual = load_pack<E>(place(p.residual, y, x) + c);
      if (p.residual_mask.data) residual_mask = load_pack<E>(place(p.residual_mask, y, x) + c);
      if (p.out_mask.data) out_mask = load_pack<E>(place(p.out_mask, y, x) + c);
      FASTDA_UNROLL
      for (int e = 0; e < E; ++e)
        result.at[e] =
            finished(v.at[e], c + e, residual.at[e], residual_mask.at[e], out_mask.at[e]);
      store_pack(place(p.out, y, x) + c, result);
    }
    return;
  }
  // A pixel a thread, so that neighbours write side by side; loads of eight channels are under way
  // at once.
  constexpr int ahead = 8;
  FASTDA_NO_UNROLL
  for (int turn = 0; turn < each / 2; ++turn) {
    const int m = turn * conv_threads + int(threadIdx.x);
    const auto row = int(p.tile_width.quotient(uint32_t(m)));
    const int y = y0 + row, x = x0 + m - row * int(p.tile_width.value);
    if (m >= p.tile_pixels || y >= p.window.height || x >= p.window.columns) continue;
    FASTDA_NO_UNROLL
    for (int start = 0; start < filter_columns && first + start < p.out_channels; start += ahead) {
      T residual[ahead] = {}, residual_mask[ahead] = {}, out_mask[ahead] = {};
      const auto fetch = [&](const View& v, T(&to)[ahead]) {
        if (v.data == nullptr) return;
        const T* from = place(v, y, x) + (first + start) * v.c;
        FASTDA_UNROLL
        for (int e = 0; e < ahead; ++e)
          if (first + start + e < p.out_channels) to[e] = from[e * v.c];
      };
      fetch(p.residual, residual);
      fetch(p.residual_mask, residual_mask);
      fetch(p.out_mask, out_mask);
      FASTDA_UNROLL
      for (int e = 0; e < ahead; ++e) {
        const int n = start + e, c = first + n;
        if (c >= p.out_channels) break;
        place(p.out, y, x)[c * p.out.c] = finished(staging[m * staging_stride_scalar + n], c,
                                                   residual[e], residual_mask[e], out_mask[e]);
      }
    }
  }
}

// `each`: tiles of 16 pixels a warp has.
template <typename T, bool exact, int each>
FASTDA_KERNEL(conv_threads)
conv_kernel(ConvKernel p) {
  FASTDA_DYNAMIC_SHARED(shared);
  unsigned char* rows = shared;                                        // [window pixels]
  unsigned char* stages = shared + p.window.pixels.value * row_bytes;  // [conv_stages][64]
  const int taps = p.kernel * p.kernel;
  const int chunks = (p.in_channels + row_channels<T> - 1) / row_channels<T>;
  const int steps = chunks * taps;
  const auto image = int(p.tiles.quotient(blockIdx.x));
  const uint32_t tile = blockIdx.x - uint32_t(image) * p.tiles.value;
  const uint32_t down = p.tiles_across.quotient(tile);
  const int y0 = int(down) * p.tile_height;
  const int x0 = int(tile - down * p.tiles_across.value) * int(p.tile_width.value);
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);

  const auto* filter =
      static_cast<const unsigned char*>(p.filter) + int64_t(blockIdx.y) * steps * filter_bytes;
  const auto fetch = [&](int step) {
    if (step < steps) {
      unsigned char* to = stages + step % conv_stages * filter_bytes;
      FASTDA_UNROLL
      for (int i = 0; i < filter_bytes / 16 / conv_threads; ++i) {
        const int at = (i * conv_threads + int(threadIdx.x)) * 16;
        copy_async(to + at, filter + int64_t(step) * filter_bytes + at, true);
      }
    }
    commit_copies();
  };

  // What this lane points at: of each tile of 16 pixels one, or, without tensor cores, of eight
  // pixels.
  constexpr int M = exact ? 8 : each;
  uint32_t row[M];
  FASTDA_UNROLL
  for (int i = 0; i < M; ++i) {
    int m = warp * each * 16 + (exact ? i * 4 + lane / 8 : i * 16 + lane % 16);
    if (m >= p.tile_pixels) m = 0;  // computed in vain, of whatever stands there
    const uint32_t r = p.tile_width.quotient(uint32_t(m));
    row[i] = r * p.window.width.value + (uint32_t(m) - r * p.tile_width.value);
  }
  auto key = uint32_t(exact ? lane / 8 : lane % 16);
  float sum[M][8][exact ? 1 : 4] = {};

  for (int step = 0; step < conv_stages - 1; ++step) fetch(step);
  int step = 0;
  FASTDA_NO_UNROLL
  for (int chunk = 0; chunk < chunks; ++chunk) {
    if (chunk > 0) __syncthreads();  // no warp reads the last rows any more
    const int halo = p.kernel / 2;
    load_window<T, conv_threads, 8, 0>(rows, p.x, p.x_mask, p.slope, p.x_packs,
                                       chunk * row_channels<T>, p.in_channels,
                                       {image, y0 - halo, x0 - halo}, p.window);
    commit_copies();
    int dx = 0;
    FASTDA_NO_UNROLL
    for (int tap = 0; tap < taps; ++tap, ++step) {
      if (tap == 0) {
        wait_copies<0>();
      } else {
        wait_copies<conv_stages - 2>();
      }
      // This step's filter is there for all, and no warp reads the last one's any more.
      __syncthreads();
      fetch(step + conv_stages - 1);
      const unsigned char* stage = stages + step % conv_stages * filter_bytes;
      if constexpr (exact) {
        multiply_rows_exactly(reinterpret_cast<float (&)[8][8]>(sum), rows, row, key, stage);
      } else {
        multiply_rows<T>(sum, rows, row, key, stage);
      }
      // To the next tap: one pixel on, or to the next row's first; counted, since a division is long.
      const bool ends = ++dx == p.kernel;
      if (ends) dx = 0;
      FASTDA_UNROLL
      for (int i = 0; i < M; ++i)
        row[i] += ends ? p.window.width.value - uint32_t(p.kernel) + 1 : 1;
      key += ends ? p.tile_width.value - uint32_t(p.kernel) + 1 : 1;
    }
    // Back to the first tap.
    FASTDA_UNROLL
    for (int i = 0; i < M; ++i) row[i] -= uint32_t(p.kernel) * p.window.width.value;
    key -= uint32_t(p.kernel) * p.tile_width.value;
  }

  __syncthreads();  // what follows overwrites rows and stages; all copies were waited for
  auto* staging = reinterpret_cast<float*>(shared);
  // The branch is out here, and the loops twice: merged inside them, nvcc stores word by word.
  const auto stage = [&](auto packs) {
    constexpr bool wide = decltype(packs)::value;
    constexpr int stride = wide ? staging_stride : staging_stride_scalar;
    FASTDA_UNROLL
    for (int i = 0; i < M; ++i) {
      FASTDA_UNROLL
      for (int j = 0; j < 8; ++j) {
        if constexpr (exact) {
          staging[(warp * each * 16 + i * 4 + lane / 8) * stride + j * 8 + lane % 8] = sum[i][j][0];
        } else {
          FASTDA_UNROLL
          for (int e = 0; e < 4; e += 2) {
            float* to = staging + (warp * each * 16 + i * 16 + lane / 4 + e * 4) * stride + j * 8 +
                        lane % 4 * 2;
            if constexpr (wide) {
              store_pack(to, Pack<float, 2>{{sum[i][j][e], sum[i][j][e + 1]}});
            } else {
              to[0] = sum[i][j][e], to[1] = sum[i][j][e + 1];
            }
          }
        }
      }
    }
  };
  if (p.out_packs) {
    stage(Yes{});
  } else {
    stage(No{});
  }
  __syncthreads();
  finish_tile<T, each>(p, staging, image, y0, x0);
}

struct DirectConv {
  View x, x_mask, filter, residual, residual_mask, out_mask, out;
  const void* bias;
  int in_channels, out_channels, height, width, kernel;
  int64_t total;
  bool relu, channels_last;
  double slope;
};

constexpr int direct_threads = 256;

template <typename T>
FASTDA_KERNEL(direct_threads)
direct_conv_kernel(DirectConv p) {
  using S = typename Wide<T>::type;
  const int64_t i = int64_t(blockIdx.x) * direct_threads + threadIdx.x;
  if (i >= p.total) return;
  int64_t rest = i;
  int k = 0, y, x;
  if (p.channels_last) k = int(rest % p.out_channels), rest /= p.out_channels;
  x = int(rest % p.width), rest /= p.width;
  y = int(rest % p.height), rest /= p.height;
  if (!p.channels_last) k = int(rest % p.out_channels), rest /= p.out_channels;
  const int64_t image = rest;
  const auto at = [&](const View& v, int c) {
    return static_cast<T*>(v.data) + (image * v.n + c * v.c + y * v.h + x * v.w);
  };
  const int half = p.kernel / 2;
  const auto slope = S(p.slope);
  S sum = 0;
  for (int dy = -half; dy <= half; ++dy) {
    if (y + dy < 0 || y + dy >= p.height) continue;
    for (int dx = -half; dx <= half; ++dx) {
      if (x + dx < 0 || x + dx >= p.width) continue;
      const T* in = at(p.x, 0) + dy * p.x.h + dx * p.x.w;
      const T* mask = p.x_mask.data ? at(p.x_mask, 0) + dy * p.x_mask.h + dx * p.x_mask.w : nullptr;
      const T* w = static_cast<const T*>(p.filter.data) + k * p.filter.n +
                   (dy + half) * p.filter.h + (dx + half) * p.filter.w;
      for (int c = 0; c < p.in_channels; ++c) {
        T v = in[c * p.x.c];
        if (mask) v = masked(mask[c * p.x_mask.c], v, slope);
        sum += S(widen(v)) * S(widen(w[c * p.filter.c]));
      }
    }
  }
  if (p.bias) sum += widen(static_cast<const T*>(p.bias)[k]);
  if (p.residual.data)
    sum += widen(p.residual_mask.data ? masked(*at(p.residual_mask, k), *at(p.residual, k), slope)
                                      : *at(p.residual, k));
  if (p.relu) sum = masked_wide(sum, sum, slope);
  if (p.out_mask.data) sum = masked_wide(S(widen(*at(p.out_mask, k))), sum, slope);
  *at(p.out, k) = narrowed<T>(sum);
}

}  // namespace fastda::cuda
