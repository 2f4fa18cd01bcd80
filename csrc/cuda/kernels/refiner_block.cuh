// SimGAN's residual block in one persistent launch, for 16-bit types and at most 64 channels. A
// block of eight warps keeps both filters in shared memory (147 KB for 64 channels and 3×3) and
// walks over tiles of the output:
//
//   x ─ tile with both halos, two of them: the next one is copied while this one is used
//     │ filter1, + bias1, ReLU
//   inner ─ tile with one halo, zero outside the image; its middle is written out for training
//     │ filter2, + bias2, + x (from the tile), ReLU
//   out ─ over the middle of x's tile, and from there out, 16 bytes a store
//
// so that an activation is read once and written once. What it costs: the inner activation's halo
// is computed again by the neighbouring tile. Warp (i, j) of 4 × 2 has every fourth tile of 16
// pixels and 32 of the 64 output channels.
#pragma once

#include "cuda/kernels/conv_tile.cuh"

namespace fastda::cuda {

constexpr int block_threads = 256;
// Of a tile of the output, at most: two tiles of 16 for each warp.
constexpr int block_pixels = 128;
constexpr int block_inner_pixels = 192;  // of the inner activation's: three

struct BlockKernel {
  View x, inner, out;
  const void *filter1, *filter2;  // prepared
  const void *bias1, *bias2;
  int channels, inner_channels, kernel1, kernel2;
  int tile_height, tiles_total;
  Divisor tile_width, tile_pixels, tiles, tiles_across;
  WindowShape x_window, inner_window;
  bool x_packs, inner_packs, out_packs;
};

// Sum over the taps of one filter for M tiles of 16 pixels, four tiles apart, of a window `width`
// wide, whose pixels (m / width, m % width) are the upper left corners of what the filter sees in
// rows of `pixels`.
template <typename T, int M>
FASTDA_DEVICE void multiply_taps(float (&sum)[M][4][4], const unsigned char* pixels,
                                 const WindowShape& shape, Divisor width, int count, int kernel,
                                 const unsigned char* filter) {
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  uint32_t row[M];
  FASTDA_UNROLL
  for (int i = 0; i < M; ++i) {
    int m = (warp / 2 + i * 4) * 16 + lane % 16;
    if (m >= count) m = 0;  // computed in vain, of whatever stands there
    const uint32_t r = width.quotient(uint32_t(m)), c = uint32_t(m) - r * width.value;
    row[i] = r * shape.width.value + c;
  }
  auto key = uint32_t(lane % 16);  // along `width`, which is the key's
  int dx = 0;
  FASTDA_NO_UNROLL
  for (int tap = 0; tap < kernel * kernel; ++tap) {
    multiply_rows<T>(sum, pixels, row, key,
                     filter + tap * filter_bytes + warp % 2 * 32 * row_bytes);
    // To the next tap: one pixel on, or to the next row's first; counted, since a division is long.
    const bool ends = ++dx == kernel;
    if (ends) dx = 0;
    FASTDA_UNROLL
    for (int i = 0; i < M; ++i) row[i] += ends ? shape.width.value - uint32_t(kernel) + 1 : 1;
    key += ends ? uint32_t(shape.key_width - kernel + 1) : 1;
  }
}

// Two neighbouring channels of a row.
template <typename T>
FASTDA_DEVICE T* pair_of(unsigned char* rows, uint32_t pixel, uint32_t key, int channel) {
  return reinterpret_cast<T*>(rows + pixel * row_bytes +
                              ((uint32_t(channel / 8) ^ (key & 7)) * 16)) +
         channel % 8;
}

// Writes the rows of a part of a window to an image: pixel m of a tile `width` wide stands in row
// `row(m)`.
template <typename T, typename RowOf>
FASTDA_DEVICE void store_rows(const View& view, bool packs, int channels, Window at,
                              const WindowShape& shape, Divisor width, Divisor pixels,
                              const unsigned char* rows, RowOf&& row_of) {
  constexpr int E = 8;
  T* to = static_cast<T*>(view.data) + at.image * view.n;
  for (uint32_t i = threadIdx.x; i < pixels.value * 8; i += block_threads) {
    uint32_t m, piece;
    if (packs) {
      m = i / 8, piece = i % 8;
    } else {
      piece = pixels.quotient(i), m = i - piece * pixels.value;
    }
    const uint32_t r = width.quotient(m), column = m - r * width.value;
    const int y = at.y + int(r), x = at.x + int(column), c = int(piece) * E;
    if (y >= shape.height || x >= shape.columns || c >= channels) continue;
    uint32_t pixel, key;
    row_of(r, column, pixel, key);
    const Pack<T, E> pack = load_pack<E>(
        reinterpret_cast<const T*>(rows + pixel * row_bytes + ((piece ^ (key & 7)) * 16)));
    if (packs) {
      store_pack(to + (y * view.h + x * view.w + c), pack);
    } else {
      FASTDA_UNROLL
      for (int e = 0; e < E; ++e)
        if (c + e < channels) to[y * view.h + x * view.w + (c + e) * view.c] = pack.at[e];
    }
  }
}

template <typename T>
FASTDA_KERNEL(block_threads)
refiner_block_kernel(BlockKernel p) {
  FASTDA_DYNAMIC_SHARED(shared);
  const int taps1 = p.kernel1 * p.kernel1, taps2 = p.kernel2 * p.kernel2;
  unsigned char* filter1 = shared;
  unsigned char* filter2 = filter1 + taps1 * filter_bytes;
  unsigned char* x_tiles = filter2 + taps2 * filter_bytes;  // two
  const uint32_t x_bytes = p.x_window.pixels.value * row_bytes;
  unsigned char* inner = x_tiles + 2 * x_bytes;
  auto* bias1 = reinterpret_cast<float*>(inner + p.inner_window.pixels.value * row_bytes);
  float* bias2 = bias1 + filter_columns;

  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int halo1 = p.kernel1 / 2, halo2 = p.kernel2 / 2;
  const auto window_at = [&](int tile) {
    const auto image = int(p.tiles.quotient(uint32_t(tile)));
    const uint32_t within = uint32_t(tile) - uint32_t(image) * p.tiles.value;
    const uint32_t down = p.tiles_across.quotient(within);
    return Window{image, int(down) * p.tile_height,
                  int(within - down * p.tiles_across.value) * int(p.tile_width.value)};
  };
  const auto fetch = [&](int tile, unsigned char* to) {
    if (tile < p.tiles_total) {
      const Window at = window_at(tile);
      load_window<T, block_threads, 8, 0>(to, p.x, View{}, 0, p.x_packs, 0, p.channels,
                                          {at.image, at.y - halo1 - halo2, at.x - halo1 - halo2},
                                          p.x_window);
    }
    commit_copies();
  };

  for (int i = thread; i < (taps1 + taps2) * (filter_bytes / 16); i += block_threads) {
    const int edge = taps1 * (filter_bytes / 16);
    const auto* from = static_cast<const unsigned char*>(i < edge ? p.filter1 : p.filter2);
    copy_async(shared + i * 16, from + (i < edge ? i : i - edge) * 16, true);
  }
  for (int i = thread; i < 2 * filter_columns; i += block_threads) {
    const int c = i % filter_columns;
    const auto* bias = static_cast<const T*>(i < filter_columns ? p.bias1 : p.bias2);
    bias1[i] =
        bias && c < (i < filter_columns ? p.inner_channels : p.channels) ? widen(bias[c]) : 0.0f;
  }
  int tile = int(blockIdx.x);
  fetch(tile, x_tiles);

  FASTDA_NO_UNROLL
  for (int turn = 0; tile < p.tiles_total; ++turn, tile += int(gridDim.x)) {
    unsigned char* x = x_tiles + turn % 2 * x_bytes;
    wait_copies<0>();
    __syncthreads();  // this tile is there for all, and no thread reads the last one any more
    fetch(tile + int(gridDim.x), x_tiles + (turn + 1) % 2 * x_bytes);
    const Window at = window_at(tile);

    float sum[3][4][4] = {};
    multiply_taps<T>(sum, x, p.x_window, p.inner_window.width, int(p.inner_window.pixels.value),
                     p.kernel1, filter1);
    FASTDA_UNROLL
    for (int i = 0; i < 3; ++i) {
      FASTDA_UNROLL
      for (int e = 0; e < 4; e += 2) {
        const auto m = uint32_t((warp / 2 + i * 4) * 16 + lane / 4 + e * 4);
        if (m >= p.inner_window.pixels.value) continue;
        const uint32_t r = p.inner_window.width.quotient(m), c = m - r * p.inner_window.width.value;
        const int y = at.y - halo2 + int(r), column = at.x - halo2 + int(c);
        const bool there =
            y >= 0 && y < p.x_window.height && column >= 0 && column < p.x_window.columns;
        FASTDA_UNROLL
        for (int j = 0; j < 4; ++j) {
          const int k = warp % 2 * 32 + j * 8 + lane % 4 * 2;
          Pack<T, 2> pair{};
          FASTDA_UNROLL
          for (int f = 0; f < 2; ++f) {
            const float v = sum[i][j][e + f] + bias1[k + f];
            if (there) pair.at[f] = narrowed<T>(v <= 0 ? 0.0f : v);
          }
          store_pack(pair_of<T>(inner, m, r * uint32_t(p.inner_window.key_width) + c, k), pair);
        }
      }
    }
    __syncthreads();
    const auto inner_row = [&](uint32_t r, uint32_t c, uint32_t& pixel, uint32_t& key) {
      const uint32_t y = r + uint32_t(halo2), column = c + uint32_t(halo2);
      pixel = y * p.inner_window.width.value + column;
      key = y * uint32_t(p.inner_window.key_width) + column;
    };
    const auto x_row = [&](uint32_t r, uint32_t c, uint32_t& pixel, uint32_t& key) {
      const uint32_t y = r + uint32_t(halo1 + halo2), column = c + uint32_t(halo1 + halo2);
      pixel = y * p.x_window.width.value + column;
      key = y * uint32_t(p.x_window.key_width) + column;
    };
    if (p.inner.data)
      store_rows<T>(p.inner, p.inner_packs, p.inner_channels, at, p.x_window, p.tile_width,
                    p.tile_pixels, inner, inner_row);

    float out[2][4][4] = {};
    multiply_taps<T>(out, inner, p.inner_window, p.tile_width, int(p.tile_pixels.value), p.kernel2,
                     filter2);
    FASTDA_UNROLL
    for (int i = 0; i < 2; ++i) {
      FASTDA_UNROLL
      for (int e = 0; e < 4; e += 2) {
        const auto m = uint32_t((warp / 2 + i * 4) * 16 + lane / 4 + e * 4);
        if (m >= p.tile_pixels.value) continue;
        const uint32_t r = p.tile_width.quotient(m);
        uint32_t pixel, key;
        x_row(r, m - r * p.tile_width.value, pixel, key);
        FASTDA_UNROLL
        for (int j = 0; j < 4; ++j) {
          const int k = warp % 2 * 32 + j * 8 + lane % 4 * 2;
          T* place = pair_of<T>(x, pixel, key, k);
          Pack<T, 2> pair = load_pack<2>(place);
          FASTDA_UNROLL
          for (int f = 0; f < 2; ++f) {
            const float v = out[i][j][e + f] + bias2[k + f] + widen(pair.at[f]);
            pair.at[f] = narrowed<T>(v <= 0 ? 0.0f : v);
          }
          store_pack(place, pair);
        }
      }
    }
    __syncthreads();
    store_rows<T>(p.out, p.out_packs, p.channels, at, p.x_window, p.tile_width, p.tile_pixels, x,
                  x_row);
  }
}

}  // namespace fastda::cuda
