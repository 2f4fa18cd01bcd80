#include "cpu/kernels/grad_reverse.h"

#include "common/tensor.h"

namespace fastda::cpu {
namespace {

Tensor grad_reverse_backward(const Tensor& grad, const Tensor& scale) {
  const DType dtype = dtype_of(grad, "grad_reverse_backward");
  const Tensor dense = torch::stable::contiguous(grad);
  Tensor out = torch::stable::empty_like(dense);
  const Tensor factors = torch::stable::contiguous(torch::stable::to(scale, ScalarType::Double));
  const bool per_sample = scale.dim() == 1;
  FASTDA_CHECK(!per_sample || (grad.dim() > 0 && scale.size(0) == grad.size(0)),
               "grad_reverse_backward: a 1-D scale needs one value per entry of grad's dim 0");
  const int64_t rows = per_sample ? grad.size(0) : 1;
  const int64_t n = rows == 0 ? 0 : grad.numel() / rows;
  const double* factor = const_data<double>(factors);
  const int64_t size = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
  const char* in = static_cast<const char*>(dense.const_data_ptr());
  char* result = static_cast<char*>(out.mutable_data_ptr());
  constexpr int64_t grain = 1 << 15;
  if (per_sample) {
    torch::stable::parallel_for(0, rows, n ? (grain + n - 1) / n : grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        grad_reverse_kernels().negate_scale(dtype, in + r * n * size, result + r * n * size, n, factor[r]);
    });
  } else {
    torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
      grad_reverse_kernels().negate_scale(dtype, in + begin * size, result + begin * size, end - begin,
                                          *factor);
    });
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastda, CPU, m) {
  m.impl("grad_reverse_backward", TORCH_BOX(&grad_reverse_backward));
}

}  // namespace fastda::cpu
