// Compiled once per instruction set, with FASTDA_ISA naming it.
#include "cpu/kernels/grad_reverse.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

template <typename T>
void negate_scale_impl(const T* __restrict grad, T* __restrict out, int64_t n, double scale) {
  const auto factor = typename Acc<T>::type(-scale);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(out + i, load(grad + i) * factor);
}

void negate_scale(DType dtype, const void* grad, void* out, int64_t n, double scale) {
  dispatch(dtype, [&]<typename T>() {
    negate_scale_impl(static_cast<const T*>(grad), static_cast<T*>(out), n, scale);
  });
}

}  // namespace

extern const GradReverseKernels grad_reverse;
const GradReverseKernels grad_reverse = {negate_scale};

}  // namespace fastda::cpu::FASTDA_ISA
