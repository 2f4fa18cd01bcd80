// out[i] = -scale * grad[i]. Thread t of a block takes the 16 bytes from 16 t on, one load and one
// store; rows of a per-sample scale that split such a pack, and tails, go element by element.
#pragma once

#include "cuda/kernels/device.cuh"
#include "cuda/kernels/grad_reverse.h"

namespace fastda::cuda {

constexpr int negate_scale_threads = 256;

template <typename T>
FASTDA_KERNEL(negate_scale_threads)
negate_scale_kernel(NegateScale p, bool packs) {
  constexpr int N = 16 / int(sizeof(T));
  using S = typename Wide<T>::type;
  const auto* grad = static_cast<const T*>(p.grad);
  auto* out = static_cast<T*>(p.out);
  const int64_t begin = (int64_t(blockIdx.x) * negate_scale_threads + threadIdx.x) * N;
  if (begin >= p.total) return;
  if (packs && begin + N <= p.total) {
    const auto factor = S(-load_scalar(p.scale, p.scale_dtype, p.per_sample ? begin / p.inner : 0));
    Pack<T, N> pack = load_pack<N>(grad + begin);
    FASTDA_UNROLL
    for (int i = 0; i < N; ++i) pack.at[i] = narrowed<T>(widen(pack.at[i]) * factor);
    store_pack(out + begin, pack);
    return;
  }
  FASTDA_NO_UNROLL
  for (int64_t i = begin; i < begin + N; ++i) {
    if (i >= p.total) return;
    out[i] = narrowed<T>(widen(grad[i]) *
                         S(-load_scalar(p.scale, p.scale_dtype, p.per_sample ? i / p.inner : 0)));
  }
}

}  // namespace fastda::cuda
