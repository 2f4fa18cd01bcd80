#include "cuda/kernels/grad_reverse.h"

#include "cuda/tensor.h"

namespace fastda::cuda {
namespace {

Tensor grad_reverse_backward(const Tensor& grad, const Tensor& scale) {
  const char* op = "grad_reverse_backward";
  const OnDevice device(grad, op);
  check_devices(op, grad, scale);
  const bool per_sample = scale.dim() == 1;
  FASTDA_CHECK(scale.dim() == 0 || (per_sample && grad.dim() > 0 && scale.size(0) == grad.size(0)),
               op, ": scale must be 0-dim, or have one value per entry of grad's dim 0");
  Tensor out = torch::stable::empty_like(grad);
  const bool direct = walk_together(grad, out, per_sample);
  const Tensor source = direct ? grad : torch::stable::contiguous(grad);
  const Tensor target = direct ? out : torch::stable::empty_like(source);
  const Tensor factors = torch::stable::contiguous(scale);
  NegateScale p{};
  p.dtype = dtype_of(grad, op), p.scale_dtype = dtype_of(scale, op);
  p.grad = source.const_data_ptr();
  p.scale = factors.const_data_ptr();
  p.out = target.mutable_data_ptr();
  p.total = grad.numel();
  p.inner = per_sample && p.total > 0 ? p.total / grad.size(0) : 1;
  p.per_sample = per_sample;
  negate_scale(p, device.stream());
  if (!direct) torch::stable::copy_(out, target);
  return out;
}

}  // namespace

FASTDA_CUDA_LIBRARY(m) { m.impl("grad_reverse_backward", TORCH_BOX(&grad_reverse_backward)); }

}  // namespace fastda::cuda
