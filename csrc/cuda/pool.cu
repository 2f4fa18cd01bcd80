#include "cuda/kernels/pool.cuh"

#include "cuda/launch.h"

namespace fastda::cuda {

void pool_forward(const PoolProblem& p, const void* x, void* y, uint8_t* indices, void* stream) {
  const int64_t total = p.images * p.channels * p.out_height * p.out_width;
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch("pool_forward", pool_forward_kernel<T>, unsigned(divide_up(total, pool_threads)),
           pool_threads, 0, stream, p, static_cast<const T*>(x), static_cast<T*>(y), indices, total,
           Divisor(p.channels), Divisor(p.out_height), Divisor(p.out_width));
  });
}

void pool_backward(const PoolProblem& p, const void* grad, const uint8_t* indices, void* out,
                   void* stream) {
  const int64_t total = p.images * p.channels * p.height * p.width;
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch("pool_backward", pool_backward_kernel<T>, unsigned(divide_up(total, pool_threads)),
           pool_threads, 0, stream, p, static_cast<const T*>(grad), indices, static_cast<T*>(out),
           total, Divisor(p.channels), Divisor(p.height), Divisor(p.width));
  });
}

}  // namespace fastda::cuda
