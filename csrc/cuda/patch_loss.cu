#include "cuda/kernels/patch_loss.cuh"

#include <algorithm>

#include "cuda/launch.h"

namespace fastda::cuda {
namespace {

constexpr int64_t step = loss_threads * loss_unroll;

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

int64_t run_of(int64_t total) { return divide_up(divide_up(total, step), 1024) * step; }

}  // namespace

int loss_blocks(int64_t total) { return total == 0 ? 0 : int(divide_up(total, run_of(total))); }
int weight_blocks(int64_t total) { return int(std::min<int64_t>(256, divide_up(total, step))); }
int head_groups(int64_t total) { return total > (1 << 16) ? head_most_groups : 1; }
int head_blocks(int64_t total, int groups) {
  return int(divide_up(total, int64_t(head_threads) * groups));
}
int head_rows(int64_t total, int groups) {
  return head_blocks(total, groups) * (head_threads / 32);
}

void sum_weights(DType dtype, const Side (&sides)[2], double* const (&sums)[2], void* stream) {
  const int blocks[2] = {sums[0] ? weight_blocks(sides[0].total) : 0,
                         sums[1] ? weight_blocks(sides[1].total) : 0};
  if (blocks[0] + blocks[1] == 0) return;
  const auto kernel = dtype == DType::f64 ? weight_sum_kernel<double> : weight_sum_kernel<float>;
  launch("weight_sum", kernel, unsigned(blocks[0] + blocks[1]), loss_threads, 0, stream, sides[0],
         sides[1], sums[0], sums[1], blocks[0], blocks[1]);
}

void run_losses(DType dtype, const Losses& given, void* stream) {
  Losses p = given;
  for (Side& side : p.side) side.part.run = side.part.blocks ? run_of(side.total) : 0;
  p.l1.part.run = p.l1.part.blocks ? run_of(p.l1.total) : 0;
  p.l1.packs = aligned(p.l1.a) && aligned(p.l1.b);
  const int blocks = p.side[0].part.blocks + p.side[1].part.blocks + p.l1.part.blocks;
  if (blocks == 0) return;
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch("patch_loss", loss_kernel<T>, unsigned(blocks), loss_threads, 0, stream, p,
           Divisor(p.side[0].patches), Divisor(p.side[1].patches));
  });
}

void run_head(DType dtype, const Head& p, double* losses, double* rights, void* stream) {
  const int blocks = p.side[0].part.blocks + p.side[1].part.blocks;
  if (blocks == 0) return;
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int N = 16 / sizeof(T);
    bool packs = p.channels % N == 0;
    for (const HeadSide& s : p.side)
      packs = packs && (s.part.blocks == 0 ||
                        (s.channel == 1 && s.image % N == 0 && s.patch % N == 0 && aligned(s.x)));
    launch("patch_head", head_kernel<T>, unsigned(blocks), head_threads, 0, stream, p, losses,
           rights, Divisor(p.side[0].patches), Divisor(p.side[1].patches), packs);
  });
}

void finish_losses(const Part (&parts)[loss_parts], const double* losses, const double* rights,
                   void* loss, DType loss_dtype, void* stream) {
  Finish p{{}, losses, rights, loss, loss_dtype};
  std::copy(parts, parts + loss_parts, p.parts);
  launch("finish_loss", finish_kernel, 1, loss_threads, 0, stream, p);
}

void finish_head(DType dtype, const void* sums, int rows, int channels, bool pair,
                 void* grad_weight, void* grad_bias, void* stream) {
  const auto run = [&](auto tag) {
    using S = typename decltype(tag)::type;
    launch("head_weight", head_weight_kernel<S>, unsigned(divide_up(channels + 1, 32)),
           loss_threads, 0, stream, static_cast<const S*>(sums), rows, channels, pair,
           static_cast<S*>(grad_weight), static_cast<S*>(grad_bias));
  };
  dtype == DType::f64 ? run(Tag<double>{}) : run(Tag<float>{});
}

void scale_both(void* const (&x)[2], const DType (&dtypes)[2], const int64_t (&totals)[2],
                const void* factor, DType factor_dtype, void* stream) {
  ScaleBoth p{};
  p.factor = factor, p.factor_dtype = factor_dtype;
  for (int i = 0; i < 2; ++i) {
    p.x[i] = x[i], p.dtype[i] = dtypes[i], p.total[i] = totals[i], p.packs[i] = aligned(x[i]);
    p.blocks[i] = divide_up(totals[i], loss_threads * (dtypes[i] == DType::f64 ? 2 : 4));
  }
  if (p.blocks[0] + p.blocks[1] == 0) return;
  launch("patch_loss_scale", scale_kernel, unsigned(p.blocks[0] + p.blocks[1]), loss_threads, 0,
         stream, p);
}

}  // namespace fastda::cuda
