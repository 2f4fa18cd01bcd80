#include "host/norm.h"

#include "cuda/device.h"
#include "cuda/kernels/norm.h"

namespace fastda::cuda {
namespace {

NormVector vector_of(const MaybeTensor& t, const char* op) {
  return t ? NormVector{t->const_data_ptr(), dtype_of(*t, op)} : NormVector{};
}
// What begins within 16 bytes, as part of another tensor may, is copied.
Tensor aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 ? torch::stable::clone(t) : t;
}
MaybeTensor aligned(const MaybeTensor& t) { return t ? MaybeTensor(aligned(*t)) : std::nullopt; }
const void* read(const MaybeTensor& t) { return t ? t->const_data_ptr() : nullptr; }
void* written(const Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; }

template <typename Call>
Norm norm_of(const Call& call, const Tensor& x) {
  FASTDA_CHECK(call.layout.pixels < int64_t(1) << 31, call.op,
               ": an image must have fewer than 2^31 pixels");
  Norm p;
  static_cast<NormLayout&>(p) = call.layout;
  p.dtype = dtype_of(call.x, call.op);
  p.eps = call.eps;
  p.negative_slope = call.negative_slope.value_or(1.0);
  p.x = x.const_data_ptr();
  p.weight = vector_of(call.weight, call.op);
  p.bias = vector_of(call.bias, call.op);
  return p;
}

struct NormAct : Device {
  using Device::Device;

  void forward(const NormForward& f) const {
    const Tensor x = aligned(f.x);
    const MaybeTensor residual = aligned(f.residual);
    Norm p = norm_of(f, x);
    p.mean = vector_of(f.running_mean, f.op);
    p.variance = vector_of(f.running_var, f.op);
    p.residual = read(residual);
    p.y = written(f.y);
    p.own_mean = data<double>(f.mean);
    p.own_variance = data<double>(f.variance);
    const Tensor partial = empty(f.x, {norm_partials(p)}, ScalarType::Double);
    p.partial = data<double>(partial);
    norm_forward(p, stream());
  }

  void backward(const NormBackward& g) const {
    const Tensor x = aligned(g.x), grad = aligned(g.grad);
    const MaybeTensor output = aligned(g.output);
    Norm p = norm_of(g, x);
    p.mean = vector_of(g.mean, g.op);
    p.variance = vector_of(g.variance, g.op);
    p.grad = grad.const_data_ptr();
    p.output = read(output);
    p.d_x = written(g.d_x);
    p.d_residual = written(g.d_residual);
    p.d_weight = written(g.d_weight);
    p.d_bias = written(g.d_bias);
    p.through_statistics = g.through_statistics;
    const Tensor partial = empty(g.x, {norm_partials(p)}, ScalarType::Double);
    p.partial = data<double>(partial);
    norm_backward(p, stream());
  }
};

}  // namespace

FASTDA_CUDA_LIBRARY(m) { register_norm<NormAct>(m); }

}  // namespace fastda::cuda
