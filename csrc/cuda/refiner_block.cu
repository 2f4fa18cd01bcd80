#include "cuda/kernels/refiner_block.cuh"

#include <cstdlib>
#include <cstring>

#include "cuda/conv_plan.h"

namespace fastda::cuda {
namespace {

int64_t shared_bytes(const BlockConv& p, Tile t) {
  const int64_t taps = p.kernel1 * p.kernel1 + p.kernel2 * p.kernel2;
  const int64_t x_pixels = window_pixels(t, p.kernel1 + p.kernel2 - 1),
                inner_pixels = window_pixels(t, p.kernel2);
  return taps * filter_bytes + (2 * x_pixels + inner_pixels) * row_bytes + 2 * filter_columns * 4;
}

// Tiles whose inner activation fits the warps' registers, and which fit beside both filters.
Tile tile_of(const BlockConv& p) {
  if (element_bytes(p.arithmetic.dtype) != 2 || p.channels > filter_columns ||
      p.inner_channels > filter_columns ||
      wasteful(p.arithmetic.dtype, p.channels, p.inner_channels))
    return {};
  const int64_t limit = shared_bytes_per_block();
  return best_tile(p.height, p.width, p.kernel2, block_pixels, [&](Tile t) {
    return window_pixels(t, p.kernel2) <= block_inner_pixels && shared_bytes(p, t) <= limit;
  });
}

PrepareFilter first_filter(const BlockConv& p, void* prepared) {
  return prepare_of(p.filter1, p.inner_channels, p.channels, p.kernel1, p.arithmetic.dtype,
                    prepared);
}
PrepareFilter second_filter(const BlockConv& p, void* prepared) {
  return prepare_of(p.filter2, p.channels, p.inner_channels, p.kernel2, p.arithmetic.dtype,
                    prepared);
}

}  // namespace

bool block_fits(const BlockConv& p) {
  // Two launches on request, so that one process can measure both.
  const char* launches = std::getenv("FASTDA_CUDA_BLOCK_LAUNCHES");
  return !(launches && std::strcmp(launches, "2") == 0) && tile_of(p).width > 0;
}

int64_t prepared_bytes(const BlockConv& p) {
  return 16 * (first_filter(p, nullptr).pieces + second_filter(p, nullptr).pieces);
}

void convolve_block(const BlockConv& p, void* stream) {
  const Tile tile = tile_of(p);
  const PrepareFilter first = first_filter(p, p.prepared);
  const PrepareFilter second = second_filter(p, static_cast<char*>(p.prepared) + first.pieces * 16);
  prepare_filters(p.arithmetic, first, second, stream);

  BlockKernel k{p.x, p.inner, p.out, first.prepared, second.prepared, p.bias1, p.bias2};
  k.channels = p.channels, k.inner_channels = p.inner_channels;
  k.kernel1 = p.kernel1, k.kernel2 = p.kernel2;
  k.tile_height = tile.height;
  const int64_t tiles = tiles_of(tile, p.height, p.width);
  k.tiles_total = int(p.batch * tiles);
  k.tile_width = Divisor(tile.width), k.tile_pixels = Divisor(tile.height * tile.width);
  k.tiles = Divisor(tiles), k.tiles_across = Divisor(divide_up(p.width, tile.width));
  // Keys count along what a filter makes of the window: the inner activation's window for x, the
  // tile for inner.
  k.x_window = window_of({tile.height + p.kernel2 - 1, tile.width + p.kernel2 - 1}, p.kernel1,
                         p.height, p.width);
  k.inner_window = window_of(tile, p.kernel2, p.height, p.width);
  k.x_packs = in_packs(p.x, p.channels, 2), k.inner_packs = in_packs(p.inner, p.inner_channels, 2);
  k.out_packs = in_packs(p.out, p.channels, 2);
  const auto run = [&](auto kernel) {
    launch("refiner_block", kernel, unsigned(std::min(k.tiles_total, multiprocessors())),
           block_threads, size_t(shared_bytes(p, tile)), stream, k);
  };
  p.arithmetic.dtype == DType::bf16 ? run(refiner_block_kernel<bf16>)
                                    : run(refiner_block_kernel<f16>);
}

}  // namespace fastda::cuda
