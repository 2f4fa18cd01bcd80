// How convolutions are cut into tiles: csrc/cuda/refiner_*.cu include it.
#pragma once

#include <algorithm>
#include <limits>

#include "cuda/kernels/conv_tile.cuh"
#include "cuda/launch.h"

namespace fastda::cuda {

struct Tile {
  int height = 0, width = 0;  // 0: none fits
};

inline int64_t window_pixels(Tile t, int kernel) {
  return int64_t(t.height + kernel - 1) * (t.width + kernel - 1);
}
inline int64_t tiles_of(Tile t, int height, int width) {
  return divide_up(height, t.height) * divide_up(width, t.width);
}

// The tile of at most `pixels` pixels for which `fits(tile)`, and which costs the least: every tile
// takes the time of its products, as if it were full, and some for each pixel that it loads.
template <typename Fits>
Tile best_tile(int height, int width, int kernel, int pixels, Fits&& fits) {
  Tile best;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int h = 1; h <= std::min(pixels, height); ++h) {
    const Tile t{h, std::min(pixels / h, width)};
    const int64_t cost = tiles_of(t, height, width) *
                         (int64_t(4) * pixels * kernel * kernel + 2 * window_pixels(t, kernel));
    if (cost < least && fits(t)) best = t, least = cost;
  }
  // As wide as needed and no wider, so that the last tile of a row is as full as the others.
  if (best.width) best.width = int(divide_up(width, divide_up(width, best.width)));
  if (best.height) best.height = int(divide_up(height, divide_up(height, best.height)));
  return best;
}

inline WindowShape window_of(Tile t, int kernel, int height, int width) {
  return {Divisor(window_pixels(t, kernel)), Divisor(t.width + kernel - 1), t.width, height, width};
}

// Whether a view can be read and written 16 bytes at a time along its channels.
inline bool in_packs(const View& v, int channels, int64_t element_bytes) {
  const int64_t pack = 16 / element_bytes;
  return v.data == nullptr ||
         (v.c == 1 && channels % pack == 0 && v.n % pack == 0 && v.h % pack == 0 &&
          v.w % pack == 0 && reinterpret_cast<uintptr_t>(v.data) % 16 == 0);
}

inline int64_t element_bytes(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}
inline int channels_of_row(DType dtype) { return int(row_bytes / element_bytes(dtype)); }

// The products that tiles would compute, all channels filled up, are this many times those that are
// asked for.
inline bool wasteful(DType dtype, int in_channels, int out_channels) {
  const int64_t row = channels_of_row(dtype);
  const int64_t filled =
      divide_up(in_channels, row) * row * divide_up(out_channels, filter_columns) * filter_columns;
  return filled >= 16 * int64_t(in_channels) * out_channels;
}

inline PrepareFilter prepare_of(const View& filter, int out_channels, int in_channels, int kernel,
                                DType dtype, void* prepared) {
  PrepareFilter p{filter, out_channels, in_channels, kernel, prepared, 0, 0};
  p.chunks = int(divide_up(in_channels, channels_of_row(dtype)));
  p.pieces =
      divide_up(out_channels, filter_columns) * p.chunks * kernel * kernel * (filter_bytes / 16);
  return p;
}

inline void prepare_filters(Arithmetic a, const PrepareFilter& first, const PrepareFilter& second,
                            void* stream) {
  const dim3 grid(unsigned(divide_up(std::max(first.pieces, second.pieces), prepare_threads)),
                  second.pieces > 0 ? 2 : 1);
  if (element_bytes(a.dtype) == 2) {
    launch("prepare_filter", prepare_filter_kernel<bf16>, grid, prepare_threads, 0, stream,
           PrepareFilters{{first, second}}, false);
  } else {
    launch("prepare_filter", prepare_filter_kernel<float>, grid, prepare_threads, 0, stream,
           PrepareFilters{{first, second}}, a.tf32);
  }
}

}  // namespace fastda::cuda
