// Host side of gradient reversal.
#pragma once

#include "host/tensor.h"

namespace fastda {

// Whether entries of `a` and of `b`, made by empty_like(a), stand in the same order without gaps,
// as they do where a is dense; and, if `by_sample`, the samples of dim 0 one after another.
inline bool walk_together(const Tensor& a, const Tensor& b, bool by_sample) {
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.stride(i) != b.stride(i)) return false;
  return !by_sample || b.stride(0) * b.size(0) == b.numel();
}

// Kernels::negate_scale(grad, scale, out): out = -scale * grad, for dense grad and out that are not
// empty, and a scale that is 0-dim or has one value per sample.
template <typename Kernels>
Tensor grad_reverse_backward(const Tensor& grad, const Tensor& scale) {
  const char* op = "grad_reverse_backward";
  const Kernels kernels(op, grad, scale);
  dtype_of(grad, op);
  const bool per_sample = scale.dim() == 1;
  FASTDA_CHECK(scale.dim() == 0 || (per_sample && grad.dim() > 0 && scale.size(0) == grad.size(0)),
               op, ": scale must be 0-dim, or have one value per entry of grad's dim 0");
  Tensor out = torch::stable::empty_like(grad);
  if (grad.numel() == 0) return out;
  const bool direct = walk_together(grad, out, per_sample);
  const Tensor source = direct ? grad : torch::stable::contiguous(grad);
  const Tensor target = direct ? out : torch::stable::empty_like(source);
  kernels.negate_scale(source, scale, target);
  if (!direct) torch::stable::copy_(out, target);
  return out;
}

template <typename Kernels, typename Library>
void register_grad_reverse(Library& m) {
  m.impl("grad_reverse_backward", TORCH_BOX(&grad_reverse_backward<Kernels>));
}

}  // namespace fastda
