#include "cuda/kernels/grad_reverse.cuh"

#include "cuda/launch.h"

namespace fastda::cuda {

void negate_scale(const NegateScale& p, void* stream) {
  if (p.total == 0) return;
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int N = 16 / sizeof(T);
    const bool aligned =
        (reinterpret_cast<uintptr_t>(p.grad) | reinterpret_cast<uintptr_t>(p.out)) % 16 == 0;
    launch("negate_scale", negate_scale_kernel<T>,
           unsigned(divide_up(p.total, negate_scale_threads * N)), negate_scale_threads, 0, stream,
           p, aligned && (!p.per_sample || p.inner % N == 0));
  });
}

}  // namespace fastda::cuda
