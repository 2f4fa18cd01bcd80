#include "host/grad_reverse.h"

#include "cuda/device.h"
#include "cuda/kernels/grad_reverse.h"

namespace fastda::cuda {
namespace {

struct GradReverse : Device {
  using Device::Device;

  void negate_scale(const Tensor& grad, const Tensor& scale, const Tensor& out) const {
    const char* op = "grad_reverse_backward";
    const Tensor factors = torch::stable::contiguous(scale);
    const bool per_sample = scale.dim() == 1;
    cuda::negate_scale({.dtype = dtype_of(grad, op),
                        .scale_dtype = dtype_of(scale, op),
                        .grad = grad.const_data_ptr(),
                        .scale = factors.const_data_ptr(),
                        .out = out.mutable_data_ptr(),
                        .total = grad.numel(),
                        .inner = per_sample ? grad.numel() / grad.size(0) : 1,
                        .per_sample = per_sample},
                       stream());
  }
};

}  // namespace

FASTDA_CUDA_LIBRARY(m) { register_grad_reverse<GradReverse>(m); }

}  // namespace fastda::cuda
