#include "host/grad_reverse.h"

#include "cpu/device.h"
#include "cpu/kernels/grad_reverse.h"

namespace fastda::cpu {
namespace {

struct GradReverse : Device {
  using Device::Device;

  void negate_scale(const Tensor& grad, const Tensor& scale, const Tensor& out) const {
    const DType dtype = dtype_of(grad, "grad_reverse_backward");
    const Tensor factors = torch::stable::contiguous(torch::stable::to(scale, ScalarType::Double));
    const double* factor = const_data<double>(factors);
    const int64_t rows = scale.dim() == 1 ? grad.size(0) : 1;
    const int64_t n = grad.numel() / rows;
    const char* in = static_cast<const char*>(grad.const_data_ptr());
    char* result = static_cast<char*>(out.mutable_data_ptr());
    // Entries of one row.
    const auto negate_row = [&](int64_t row, int64_t begin, int64_t end) {
      const int64_t offset = (row * n + begin) * size_of(dtype);
      grad_reverse_kernels().negate_scale(dtype, in + offset, result + offset, end - begin,
                                          factor[row]);
    };
    constexpr int64_t grain = 1 << 15;
    if (rows > 1) {
      torch::stable::parallel_for(0, rows, (grain + n - 1) / n, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) negate_row(row, 0, n);
      });
    } else {
      torch::stable::parallel_for(0, n, grain,
                                  [&](int64_t begin, int64_t end) { negate_row(0, begin, end); });
    }
  }
};

}  // namespace

FASTDA_CPU_LIBRARY(m) { register_grad_reverse<GradReverse>(m); }

}  // namespace fastda::cpu
