#include "cuda/kernels/refiner_conv_grad.cuh"

#include "cuda/conv_plan.h"

namespace fastda::cuda {
namespace {

// Of a weight gradient, roughly: two to four for each multiprocessor.
constexpr int64_t target_blocks = 256;
constexpr int64_t most_pieces = 4096;

struct Plan {
  Tile tile;  // width 0: directly
  int stages = 1;
  int blocks_across = 1, blocks_down = 1, groups = 1;
  int64_t tiles = 0, tiles_per_piece = 1, pieces = 1;
  int64_t piece_pixels = 0;  // of a direct one
};

int64_t stage_bytes(const FilterGrad& p, Tile t) {
  const int64_t row = grad_channels * element_bytes(p.arithmetic.dtype);
  const int pixels = p.arithmetic.dtype == DType::f32 ? grad_pixels<float> : grad_pixels<bf16>;
  return (window_pixels(t, p.kernel) + 1 + pixels) * row + pixels * 4;
}

Plan plan_of(const FilterGrad& p) {
  Plan plan;
  const DType dtype = p.arithmetic.dtype;
  if (dtype != DType::f64 && !wasteful(dtype, p.in_channels, p.out_channels)) {
    const int64_t limit = shared_bytes_per_block();
    plan.tile = best_tile(p.height, p.width, p.kernel,
                          dtype == DType::f32 ? grad_pixels<float> : grad_pixels<bf16>,
                          [&](Tile t) { return stage_bytes(p, t) <= limit; });
    // Two tiles a block, where a multiprocessor has room for two such blocks.
    if (4 * stage_bytes(p, plan.tile) <= limit) plan.stages = 2;
  }
  if (plan.tile.width == 0) {
    const int64_t pixels = int64_t(p.batch) * p.height * p.width;
    const int64_t blocks = divide_up(int64_t(p.kernel) * p.kernel * p.in_channels * p.out_channels,
                                     direct_grad_threads);
    plan.pieces = std::clamp<int64_t>(4 * target_blocks / std::max<int64_t>(1, blocks), 1,
                                      divide_up(pixels, 64));
    plan.pieces = std::min(plan.pieces, most_pieces);
    plan.piece_pixels = divide_up(pixels, plan.pieces);
    plan.pieces = divide_up(pixels, plan.piece_pixels);
    return plan;
  }
  plan.tiles = p.batch * tiles_of(plan.tile, p.height, p.width);
  plan.groups = p.d_weight ? int(divide_up(p.kernel * p.kernel, grad_taps)) : 1;
  plan.blocks_across = p.d_weight ? int(divide_up(p.in_channels, grad_channels)) : 1;
  plan.blocks_down = int(divide_up(p.out_channels, grad_channels));
  const int64_t blocks = int64_t(plan.groups) * plan.blocks_across * plan.blocks_down;
  plan.pieces = std::clamp<int64_t>(divide_up(target_blocks, blocks), 1, plan.tiles);
  plan.tiles_per_piece = divide_up(plan.tiles, plan.pieces);
  plan.pieces = divide_up(plan.tiles, plan.tiles_per_piece);
  return plan;
}

int64_t entries(const FilterGrad& p) {
  return p.d_weight ? int64_t(p.kernel) * p.kernel * p.in_channels * p.out_channels : 0;
}

}  // namespace

int64_t sum_bytes(const FilterGrad& p) {
  const int64_t size = p.arithmetic.dtype == DType::f64 ? 8 : 4;
  return plan_of(p).pieces * (entries(p) + (p.d_bias ? p.out_channels : 0)) * size;
}

void filter_gradient(const FilterGrad& p, void* stream) {
  const Plan plan = plan_of(p);
  const DType dtype = p.arithmetic.dtype;
  const int64_t size = dtype == DType::f64 ? 8 : 4;
  void* bias_sums =
      p.d_bias ? static_cast<char*>(p.sums) + plan.pieces * entries(p) * size : nullptr;
  if (plan.tile.width == 0) {
    DirectFilterGrad d{p.x, p.grad, p.mask, p.d_weight ? p.sums : nullptr, bias_sums};
    d.in_channels = p.in_channels, d.out_channels = p.out_channels;
    d.height = p.height, d.width = p.width, d.kernel = p.kernel;
    d.pixels = int64_t(p.batch) * p.height * p.width, d.piece = plan.piece_pixels;
    d.slope = p.negative_slope;
    const dim3 grid(
        unsigned(divide_up(entries(p) + (p.d_bias ? p.out_channels : 0), direct_grad_threads)),
        unsigned(plan.pieces));
    dispatch_dtype(dtype, [&](auto tag) {
      launch("direct_filter_grad", direct_filter_grad_kernel<typename decltype(tag)::type>, grid,
             direct_grad_threads, 0, stream, d);
    });
  } else {
    FilterGradKernel k{p.x, p.grad, p.mask, static_cast<float*>(p.sums),
                       static_cast<float*>(bias_sums)};
    k.in_channels = p.in_channels, k.out_channels = p.out_channels, k.kernel = p.kernel;
    k.blocks_across = plan.blocks_across;
    k.tile_height = plan.tile.height, k.tile_pixels = plan.tile.height * plan.tile.width;
    k.tiles_total = int(plan.tiles), k.tiles_per_piece = int(plan.tiles_per_piece);
    k.tile_width = Divisor(plan.tile.width);
    k.tiles = Divisor(tiles_of(plan.tile, p.height, p.width));
    k.tiles_across = Divisor(divide_up(p.width, plan.tile.width));
    k.stages = plan.stages;
    k.window = window_of(plan.tile, p.kernel, p.height, p.width);
    k.core = window_of(plan.tile, 1, p.height, p.width);
    k.x_packs = in_packs(p.x, p.in_channels, element_bytes(dtype));
    k.grad_packs = in_packs(p.grad, p.out_channels, element_bytes(dtype)) &&
                   in_packs(p.mask, p.out_channels, element_bytes(dtype));
    k.weight = p.d_weight != nullptr;
    k.slope = float(p.negative_slope);
    const dim3 grid(unsigned(plan.groups * plan.blocks_across * plan.blocks_down),
                    unsigned(plan.pieces));
    const auto run = [&](auto kernel) {
      launch("filter_grad", kernel, grid, grad_threads,
             size_t(plan.stages * stage_bytes(p, plan.tile)), stream, k);
    };
    switch (dtype) {
      case DType::bf16: run(filter_grad_kernel<bf16, false>); break;
      case DType::f16: run(filter_grad_kernel<f16, false>); break;
      default:
        p.arithmetic.tf32 ? run(filter_grad_kernel<float, false>)
                          : run(filter_grad_kernel<float, true>);
    }
  }
  const AddPieces add{p.sums,           bias_sums,     p.d_weight,     p.d_bias,
                      int(plan.pieces), p.in_channels, p.out_channels, p.kernel * p.kernel};
  const int64_t outputs = entries(p) + (p.d_bias ? p.out_channels : 0);
  dispatch_dtype(dtype, [&](auto tag) {
    launch("add_pieces", add_pieces_kernel<typename decltype(tag)::type>,
           unsigned(divide_up(outputs, add_threads)), add_threads, 0, stream, add);
  });
}

}  // namespace fastda::cuda
