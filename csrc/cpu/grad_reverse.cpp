#include "cpu/kernels/grad_reverse.h"

#include "common/tensor.h"

namespace fastda::cpu {
namespace {

Tensor grad_reverse_backward(const Tensor& grad, const Tensor& scale) {
  const DType dtype = dtype_of(grad, "grad_reverse_backward");
  const bool per_sample = scale.dim() == 1;
  FASTDA_CHECK(
      scale.dim() == 0 || (per_sample && grad.dim() > 0 && scale.size(0) == grad.size(0)),
      "grad_reverse_backward: scale must be 0-dim, or have one value per entry of grad's dim 0");
  Tensor out = torch::stable::empty_like(grad);
  if (grad.numel() == 0) return out;
  const bool direct = walk_together(grad, out, per_sample);
  const Tensor source = direct ? grad : torch::stable::contiguous(grad);
  Tensor target = direct ? out : torch::stable::empty_like(source);
  const Tensor factors = torch::stable::contiguous(torch::stable::to(scale, ScalarType::Double));
  const double* factor = const_data<double>(factors);
  const int64_t rows = per_sample ? grad.size(0) : 1;
  const int64_t n = grad.numel() / rows;
  const int64_t size = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
  const char* in = static_cast<const char*>(source.const_data_ptr());
  char* result = static_cast<char*>(target.mutable_data_ptr());
  constexpr int64_t grain = 1 << 15;
  // Rows per task, or entries per task of the one row.
  const auto negate_scale = [&](int64_t row, int64_t begin, int64_t end) {
    const int64_t offset = (row * n + begin) * size;
    grad_reverse_kernels().negate_scale(dtype, in + offset, result + offset, end - begin,
                                        factor[row]);
  };
  if (per_sample) {
    torch::stable::parallel_for(0, rows, (grain + n - 1) / n, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) negate_scale(row, 0, n);
    });
  } else {
    torch::stable::parallel_for(0, n, grain,
                                [&](int64_t begin, int64_t end) { negate_scale(0, begin, end); });
  }
  if (!direct) torch::stable::copy_(out, target);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastda, CPU, m) {
  m.impl("grad_reverse_backward", TORCH_BOX(&grad_reverse_backward));
}

}  // namespace fastda::cpu
