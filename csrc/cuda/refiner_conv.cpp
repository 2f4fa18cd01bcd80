#include <Python.h>

#include "cuda/kernels/refiner_conv.h"

#include "cuda/device.h"

namespace fastda::cuda {
namespace {

bool convolution_tf32() {
  // The flag is Python's and torch's; what reads it on every version stands in fastda/_torch.py.
  const PyGILState_STATE state = PyGILState_Ensure();
  bool result = false;
  PyObject* module = PyImport_ImportModule("fastda._torch");
  PyObject* function = module ? PyObject_GetAttrString(module, "convolution_tf32") : nullptr;
  PyObject* answer = function ? PyObject_CallObject(function, nullptr) : nullptr;
  if (answer) result = PyObject_IsTrue(answer) == 1;
  PyErr_Clear();
  for (PyObject* object : {answer, function, module}) Py_DecRef(object);
  PyGILState_Release(state);
  return result;
}

Arithmetic arithmetic_of(const Tensor& x, const char* op) {
  const DType dtype = dtype_of(x, op);
  return {dtype, dtype == DType::f32 && convolution_tf32()};
}

View view_of(const Tensor& t) {
  // The stride of a dimension of size 1 says nothing; as it stands it could spoil wide accesses.
  const auto stride = [&](int d) { return t.size(d) == 1 ? (d == 1 ? 1 : 0) : t.stride(d); };
  return {const_cast<void*>(t.const_data_ptr()), stride(0), stride(1), stride(2), stride(3)};
}
View view_of(const MaybeTensor& t) { return t ? view_of(*t) : View{}; }

struct Shape {
  int batch, in_channels, out_channels, height, width, kernel;
};

Shape check(const Tensor& x, const Tensor& weight, const char* op) {
  FASTDA_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(1) == x.size(1) &&
                   weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1 &&
                   weight.scalar_type() == x.scalar_type(),
               op,
               ": x must be (N, C, H, W) and weight (K, C, k, k) with odd k, of the same dtype");
  constexpr int64_t most = int64_t(1) << 30;
  FASTDA_CHECK(x.size(0) * x.size(2) * x.size(3) < 2 * most && x.size(1) < most &&
                   weight.size(0) < most && weight.size(2) < (1 << 12) && x.size(0) < most &&
                   x.size(2) < most && x.size(3) < most,
               op, ": x may have at most 2^31 pixels, and a filter at most 4095 x 4095");
  return {int(x.size(0)), int(x.size(1)), int(weight.size(0)),
          int(x.size(2)), int(x.size(3)), int(weight.size(2))};
}
void check_image(const MaybeTensor& t, const Tensor& x, int64_t channels, const char* op) {
  if (t)
    FASTDA_CHECK(
        t->dim() == 4 && t->size(0) == x.size(0) && t->size(1) == channels &&
            t->size(2) == x.size(2) && t->size(3) == x.size(3) &&
            t->scalar_type() == x.scalar_type(),
        op, ": every image must have the shape of the convolution's result and the dtype of x");
}
MaybeTensor check_bias(const MaybeTensor& bias, const Tensor& x, int64_t channels, const char* op) {
  if (!bias) return std::nullopt;
  FASTDA_CHECK(
      bias->dim() == 1 && bias->size(0) == channels && bias->scalar_type() == x.scalar_type(), op,
      ": bias must be (K,) in the dtype of x");
  return torch::stable::contiguous(*bias);
}

// One call of an operator: how it computes, where, and for what layout.
struct Call {
  Arithmetic arithmetic;
  void* stream;
  bool channels_last;
};

Tensor empty_image(const Tensor& x, int64_t channels, const Call& call) {
  return fastda::empty_image(x, channels, x.scalar_type(), call.channels_last);
}
Tensor nothing(const Tensor& like) { return fastda::nothing(like, like.scalar_type()); }
Tensor empty_filter(const Tensor& weight) {
  return empty(weight, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)},
               weight.scalar_type());
}
Tensor workspace(const Tensor& like, int64_t bytes) {
  return empty(like, {bytes}, ScalarType::Byte);
}

// Everything that a convolution is fused with.
struct Fusion {
  MaybeTensor x_gate, bias, residual, residual_gate, out_gate;
  bool relu = false;
};

// out = the convolution of x with weight, or, `rotate`d, its transpose: then x is a gradient with
// weight.size(0) channels and out has weight.size(1).
void convolve(const Tensor& x, const Tensor& weight, bool rotate, const Fusion& fusion,
              const Tensor& out, const Call& call) {
  if (out.numel() == 0) return;
  Conv p{};
  p.arithmetic = call.arithmetic;
  p.batch = int(x.size(0)), p.in_channels = int(x.size(1)), p.out_channels = int(out.size(1));
  p.height = int(x.size(2)), p.width = int(x.size(3)), p.kernel = int(weight.size(2));
  p.x = view_of(x), p.x_gate = view_of(fusion.x_gate);
  p.residual = view_of(fusion.residual), p.residual_gate = view_of(fusion.residual_gate);
  p.out_gate = view_of(fusion.out_gate), p.out = view_of(out);
  p.bias = fusion.bias ? fusion.bias->const_data_ptr() : nullptr;
  p.relu = fusion.relu;
  p.filter = {const_cast<void*>(weight.const_data_ptr()), weight.stride(0), weight.stride(1),
              weight.stride(2), weight.stride(3)};
  if (rotate) {
    const int64_t last =
        (p.kernel - 1) * (p.filter.h + p.filter.w) * int64_t(weight.element_size());
    p.filter = {static_cast<char*>(p.filter.data) + last, p.filter.c, p.filter.n, -p.filter.h,
                -p.filter.w};
  }
  const Tensor prepared = workspace(x, prepared_bytes(p));
  p.prepared = prepared.mutable_data_ptr();
  convolve(p, call.stream);
}

// The gradients of weight and bias: each a tensor, or empty where not wanted.
void filter_gradient(const Tensor& x, const Tensor& grad, const MaybeTensor& gate, Tensor d_weight,
                     Tensor d_bias, const Call& call) {
  const bool want_weight = d_weight.dim() == 4, want_bias = d_bias.numel() > 0;
  if (!want_weight && !want_bias) return;
  if (x.size(0) * x.size(2) * x.size(3) == 0) {
    torch::stable::zero_(d_weight);
    torch::stable::zero_(d_bias);
    return;
  }
  FilterGrad p{};
  p.arithmetic = call.arithmetic;
  p.batch = int(x.size(0)), p.in_channels = int(x.size(1)), p.out_channels = int(grad.size(1));
  p.height = int(x.size(2)), p.width = int(x.size(3));
  p.kernel = want_weight ? int(d_weight.size(2)) : 1;
  p.x = view_of(x), p.grad = view_of(grad), p.gate = view_of(gate);
  p.d_weight = want_weight && d_weight.numel() > 0 ? d_weight.mutable_data_ptr() : nullptr;
  p.d_bias = want_bias ? d_bias.mutable_data_ptr() : nullptr;
  if (p.d_weight == nullptr && p.d_bias == nullptr) return;
  const Tensor sums = workspace(x, sum_bytes(p));
  p.sums = sums.mutable_data_ptr();
  filter_gradient(p, call.stream);
}

Tensor conv_same(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                 const MaybeTensor& residual, bool relu) {
  const char* op = "conv_same";
  const Device device(op, x, weight, bias, residual);
  const Shape s = check(x, weight, op);
  check_image(residual, x, s.out_channels, op);
  const Call call{arithmetic_of(x, op), device.stream(), prefers_channels_last(x)};
  Fusion fusion;
  fusion.bias = check_bias(bias, x, s.out_channels, op);
  fusion.residual = residual;
  fusion.relu = relu;
  const Tensor out = empty_image(x, s.out_channels, call);
  convolve(x, weight, false, fusion, out, call);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> conv_same_backward(const Tensor& grad, const Tensor& x,
                                                      const Tensor& weight,
                                                      const MaybeTensor& output, bool need_x,
                                                      bool need_weight, bool need_bias) {
  const char* op = "conv_same_backward";
  const Device device(op, x, grad, weight, output);
  const Shape s = check(x, weight, op);
  check_image(grad, x, s.out_channels, op);
  check_image(output, x, s.out_channels, op);
  const Call call{arithmetic_of(x, op), device.stream(), prefers_channels_last(x)};
  Tensor d_x = nothing(x), d_weight = nothing(x), d_bias = nothing(x);
  if (need_x) {
    Fusion fusion;
    fusion.x_gate = output;
    d_x = empty_image(x, s.in_channels, call);
    convolve(grad, weight, true, fusion, d_x, call);
  }
  if (need_weight) d_weight = empty_filter(weight);
  if (need_bias) d_bias = empty(x, {s.out_channels}, x.scalar_type());
  filter_gradient(x, grad, output, d_weight, d_bias, call);
  return {d_x, d_weight, d_bias};
}

Tensor inner_activation(const Tensor& x, const Tensor& weight1, const MaybeTensor& bias1,
                        const Call& call) {
  Fusion fusion;
  fusion.bias = bias1;
  fusion.relu = true;
  const Tensor inner = empty_image(x, weight1.size(0), call);
  convolve(x, weight1, false, fusion, inner, call);
  return inner;
}

// Of weight1 and weight2 and the block's x.
Shape check_block(const Tensor& x, const Tensor& weight1, const Tensor& weight2, const char* op) {
  const Shape s = check(x, weight1, op);
  FASTDA_CHECK(weight2.dim() == 4 && weight2.size(0) == s.in_channels &&
                   weight2.size(1) == s.out_channels && weight2.size(2) == weight2.size(3) &&
                   weight2.size(2) % 2 == 1 && weight2.size(2) < (1 << 12) &&
                   weight2.scalar_type() == x.scalar_type(),
               op, ": weight2 must be (C, K, k, k) with odd k, in the dtype of x");
  return s;
}

std::tuple<Tensor, Tensor> refiner_block(const Tensor& x, const Tensor& weight1,
                                         const MaybeTensor& bias1_any, const Tensor& weight2,
                                         const MaybeTensor& bias2_any, bool keep_inner) {
  const char* op = "refiner_block";
  const Device device(op, x, weight1, bias1_any, weight2, bias2_any);
  const Shape s = check_block(x, weight1, weight2, op);
  const Call call{arithmetic_of(x, op), device.stream(), prefers_channels_last(x)};
  const MaybeTensor bias1 = check_bias(bias1_any, x, s.out_channels, op);
  const MaybeTensor bias2 = check_bias(bias2_any, x, s.in_channels, op);
  const Tensor out = empty_image(x, s.in_channels, call);

  BlockConv p{};
  p.arithmetic = call.arithmetic;
  p.batch = s.batch, p.channels = s.in_channels, p.inner_channels = s.out_channels;
  p.height = s.height, p.width = s.width, p.kernel1 = s.kernel, p.kernel2 = int(weight2.size(2));
  if (out.numel() > 0 && block_fits(p)) {
    const Tensor inner = keep_inner ? empty_image(x, s.out_channels, call) : nothing(x);
    p.x = view_of(x), p.filter1 = view_of(weight1), p.filter2 = view_of(weight2),
    p.out = view_of(out);
    if (keep_inner) p.inner = view_of(inner);
    p.bias1 = bias1 ? bias1->const_data_ptr() : nullptr;
    p.bias2 = bias2 ? bias2->const_data_ptr() : nullptr;
    const Tensor prepared = workspace(x, prepared_bytes(p));
    p.prepared = prepared.mutable_data_ptr();
    convolve_block(p, call.stream);
    return {out, inner};
  }
  const Tensor inner = inner_activation(x, weight1, bias1, call);
  Fusion fusion;
  fusion.bias = bias2;
  fusion.residual = x;
  fusion.relu = true;
  convolve(inner, weight2, false, fusion, out, call);
  return {out, keep_inner ? inner : nothing(x)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> refiner_block_backward(
    const Tensor& grad, const Tensor& x, const MaybeTensor& inner_any, const Tensor& output,
    const Tensor& weight1, const MaybeTensor& bias1, const Tensor& weight2, bool need_x,
    bool need_weight1, bool need_bias1, bool need_weight2, bool need_bias2) {
  const char* op = "refiner_block_backward";
  const Device device(op, x, grad, inner_any, output, weight1, bias1, weight2);
  const Shape s = check_block(x, weight1, weight2, op);
  check_image(grad, x, s.in_channels, op);
  check_image(output, x, s.in_channels, op);
  check_image(inner_any, x, s.out_channels, op);
  const Call call{arithmetic_of(x, op), device.stream(), prefers_channels_last(x)};
  const Tensor inner =
      inner_any ? *inner_any
                : inner_activation(x, weight1, check_bias(bias1, x, s.out_channels, op), call);
  Tensor d_x = nothing(x), d_weight1 = nothing(x), d_bias1 = nothing(x), d_weight2 = nothing(x),
         d_bias2 = nothing(x);
  if (need_weight2) d_weight2 = empty_filter(weight2);
  if (need_bias2) d_bias2 = empty(x, {s.in_channels}, x.scalar_type());
  filter_gradient(inner, grad, output, d_weight2, d_bias2, call);
  if (need_x || need_weight1 || need_bias1) {
    Fusion fusion;
    fusion.x_gate = output;
    fusion.out_gate = inner;
    const Tensor d_inner = empty_image(x, s.out_channels, call);
    convolve(grad, weight2, true, fusion, d_inner, call);
    if (need_weight1) d_weight1 = empty_filter(weight1);
    if (need_bias1) d_bias1 = empty(x, {s.out_channels}, x.scalar_type());
    filter_gradient(x, d_inner, std::nullopt, d_weight1, d_bias1, call);
    if (need_x) {
      Fusion shortcut;
      shortcut.residual = grad;
      shortcut.residual_gate = output;
      d_x = empty_image(x, s.in_channels, call);
      convolve(d_inner, weight1, true, shortcut, d_x, call);
    }
  }
  return {d_x, d_weight1, d_bias1, d_weight2, d_bias2};
}

}  // namespace

FASTDA_CUDA_LIBRARY(m) {
  m.impl("conv_same", TORCH_BOX(&conv_same));
  m.impl("conv_same_backward", TORCH_BOX(&conv_same_backward));
  m.impl("refiner_block", TORCH_BOX(&refiner_block));
  m.impl("refiner_block_backward", TORCH_BOX(&refiner_block_backward));
}

}  // namespace fastda::cuda
