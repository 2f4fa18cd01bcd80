#include "cuda/kernels/refiner_conv.cuh"

#include "cuda/conv_plan.h"

namespace fastda::cuda {
namespace {

int64_t shared_bytes(Tile t, int kernel, int each) {
  return std::max<int64_t>(window_pixels(t, kernel) * row_bytes + conv_stages * filter_bytes,
                           conv_pixels(each) * staging_stride * 4);
}

struct Plan {
  Tile tile;  // width 0: directly
  int each = 2;
};

Plan plan_of(const Conv& p) {
  const DType dtype = p.arithmetic.dtype;
  if (dtype == DType::f64 || wasteful(dtype, p.in_channels, p.out_channels)) return {};
  const int64_t limit = shared_bytes_per_block();
  const auto tile_of = [&](int each, int64_t bytes) {
    return best_tile(p.height, p.width, p.kernel, conv_pixels(each),
                     [&](Tile t) { return shared_bytes(t, p.kernel, each) <= bytes; });
  };
  const Plan small{tile_of(2, limit), 2};
  // The large tile, where a multiprocessor has room for two and the one with most to do has no more
  // pixels than with small ones. What a pixel sums, and in which order, does not hang on its tile.
  if (small.tile.width == 0 || (dtype == DType::f32 && !p.arithmetic.tf32)) return small;
  const Plan large{tile_of(4, limit / 2), 4};
  const auto most = [&](const Plan& plan) {
    const int64_t blocks = p.batch * tiles_of(plan.tile, p.height, p.width) *
                           divide_up(p.out_channels, filter_columns);
    return divide_up(blocks, multiprocessors()) * conv_pixels(plan.each);
  };
  return large.tile.width > 0 && most(large) <= most(small) ? large : small;
}

void convolve_directly(const Conv& p, void* stream) {
  DirectConv d{p.x, p.x_mask, p.filter, p.residual, p.residual_mask, p.out_mask, p.out, p.bias};
  d.in_channels = p.in_channels, d.out_channels = p.out_channels;
  d.height = p.height, d.width = p.width, d.kernel = p.kernel;
  d.total = int64_t(p.batch) * p.out_channels * p.height * p.width;
  d.relu = p.relu, d.slope = p.negative_slope;
  d.channels_last = p.out.c == 1;
  dispatch_dtype(p.arithmetic.dtype, [&](auto tag) {
    launch("direct_conv", direct_conv_kernel<typename decltype(tag)::type>,
           unsigned(divide_up(d.total, direct_threads)), direct_threads, 0, stream, d);
  });
}

}  // namespace

int64_t prepared_bytes(const Conv& p) {
  if (plan_of(p).tile.width == 0) return 0;
  return prepare_of(p.filter, p.out_channels, p.in_channels, p.kernel, p.arithmetic.dtype, nullptr)
             .pieces *
         16;
}

void convolve(const Conv& p, void* stream) {
  const Plan plan = plan_of(p);
  const Tile tile = plan.tile;
  if (tile.width == 0) return convolve_directly(p, stream);
  const DType dtype = p.arithmetic.dtype;
  prepare_filters(p.arithmetic,
                  prepare_of(p.filter, p.out_channels, p.in_channels, p.kernel, dtype, p.prepared),
                  {}, stream);

  ConvKernel k{p.x, p.x_mask, p.residual, p.residual_mask, p.out_mask, p.out, p.prepared, p.bias};
  k.in_channels = p.in_channels, k.out_channels = p.out_channels, k.kernel = p.kernel;
  k.tile_height = tile.height, k.tile_pixels = tile.height * tile.width;
  k.tile_width = Divisor(tile.width);
  const int64_t tiles = tiles_of(tile, p.height, p.width);
  k.tiles = Divisor(tiles), k.tiles_across = Divisor(divide_up(p.width, tile.width));
  k.window = window_of(tile, p.kernel, p.height, p.width);
  k.relu = p.relu, k.slope = float(p.negative_slope);
  const int64_t size = element_bytes(dtype);
  k.x_packs = in_packs(p.x, p.in_channels, size) && in_packs(p.x_mask, p.in_channels, size);
  k.out_packs = true;
  for (const View& v : {p.out, p.residual, p.residual_mask, p.out_mask})
    k.out_packs = k.out_packs && in_packs(v, p.out_channels, size);

  const dim3 grid(unsigned(p.batch * tiles), unsigned(divide_up(p.out_channels, filter_columns)));
  const auto run = [&](auto small, auto large) {
    launch("conv", plan.each == 4 ? large : small, grid, conv_threads,
           size_t(shared_bytes(tile, p.kernel, plan.each)), stream, k);
  };
  switch (dtype) {
    case DType::bf16: return run(conv_kernel<bf16, false, 2>, conv_kernel<bf16, false, 4>);
    case DType::f16: return run(conv_kernel<f16, false, 2>, conv_kernel<f16, false, 4>);
    default:
      return p.arithmetic.tf32 ? run(conv_kernel<float, false, 2>, conv_kernel<float, false, 4>)
                               : run(conv_kernel<float, true, 2>, conv_kernel<float, true, 2>);
  }
}

}  // namespace fastda::cuda
