// Host side of the patch losses.
#pragma once

#include "common/patch_term.h"
#include "host/tensor.h"

namespace fastda {

// The one of `names` that is `name`, as the enumerator at its place.
template <typename E, size_t N>
E named(const char* what, const std::string& name, const char* const (&names)[N]) {
  for (size_t i = 0; i < N; ++i)
    if (name == names[i]) return E(i);
  std::string known;
  for (const char* other : names) known += (known.empty() ? "" : ", ") + std::string(other);
  FASTDA_CHECK(false, what, " must be one of ", known, ", got ", name);
  return E();
}
inline Kind kind_of(const std::string& name) { return named<Kind>("kind", name, kind_names); }
inline Reduction reduction_of(const std::string& name) {
  return named<Reduction>("reduction", name, reduction_names);
}

namespace {

// One side of a loss, what it is divided by, and the tensors that it points into.
struct LossSide {
  PatchView view;
  DType dtype;
  Reduction reduction;
  Tensor logits, grad;
  MaybeTensor weight;
};

// scale * |refined - synthetic|, over dense entries that stand in one order.
struct LossPair {
  DType dtype;
  Tensor refined, synthetic, refined_grad, synthetic_grad;  // a gradient is empty where not needed
  MaybeTensor scale_tensor;                                 // stands for scale where it is given
  double scale;
  double factor;  // of the reduction
};

// The last 1x1 convolution, both sides of the loss, and the tensors that they point into.
struct LossHead {
  HeadView view[2];
  DType dtype;
  Reduction reduction;
  int64_t channels;
  Tensor weight;
  MaybeTensor bias;
  Tensor weight_grad, bias_grad;
  bool need_weight, need_bias;  // whether these two are to be computed
};

struct Evaluated {
  Tensor loss;
  MaybeTensor accuracy[2];  // of the sides, float32
};

}  // namespace

// Kernels::most_patches of an image, and channels of a head.
template <typename Kernels>
void check_patches(const Tensor& t, const char* op) {
  FASTDA_CHECK(t.size(2) * t.size(3) <= Kernels::most_patches, op, ": an image may have at most ",
               Kernels::most_patches, " patches");
}

template <typename Kernels>
LossSide loss_side(const Tensor& any, const MaybeTensor& weight, const PatchTerm& term,
                   Reduction reduction, bool need_grad, const char* op) {
  FASTDA_CHECK(any.dim() == 4 && any.size(1) == (term.pair ? 2 : 1), op,
               ": logits must be (N, 2, H, W) for softmax and (N, 1, H, W) for other kinds");
  check_patches<Kernels>(any, op);
  const ScalarType accumulator = wide(any);
  LossSide s{{}, dtype_of(any, op), reduction, with_planes(any), {}, {}};
  const Tensor& logits = s.logits;
  PatchView& v = s.view;
  v.term = term;
  v.logits = logits.const_data_ptr();
  v.image = logits.stride(0);
  v.channel = logits.stride(1);
  v.patch = patch_stride(logits);
  v.images = logits.size(0);
  v.patches = logits.size(2) * logits.size(3);
  if (weight) {
    FASTDA_CHECK(weight->dim() == 4 && weight->size(0) == logits.size(0) && weight->size(1) == 1 &&
                     weight->size(2) == logits.size(2) && weight->size(3) == logits.size(3) &&
                     weight->scalar_type() == accumulator,
                 op, ": a weight must be (N, 1, H, W), float64 for float64 logits, else float32");
    s.weight = with_planes(*weight);
    v.weight = s.weight->const_data_ptr();
    v.weight_image = s.weight->stride(0);
    v.weight_patch = patch_stride(*s.weight);
  }
  s.grad = need_grad ? empty_image(logits, logits.size(1), accumulator, is_channels_last(logits))
                     : nothing(logits, accumulator);
  if (need_grad) {
    v.grad = s.grad.mutable_data_ptr();
    v.grad_image = s.grad.stride(0);
    v.grad_channel = s.grad.stride(1);
    v.grad_patch = patch_stride(s.grad);
  }
  return s;
}

inline LossPair loss_pair(const Tensor& refined, const Tensor& synthetic,
                          const MaybeTensor& scale_tensor, double scale, Reduction reduction,
                          bool refined_grad, bool synthetic_grad, const char* op) {
  bool same = refined.dim() == synthetic.dim() && refined.scalar_type() == synthetic.scalar_type();
  for (int64_t d = 0; same && d < refined.dim(); ++d) same = refined.size(d) == synthetic.size(d);
  FASTDA_CHECK(same, op, ": refined and synthetic must have one shape and dtype");
  FASTDA_CHECK(!scale_tensor || scale_tensor->dim() == 0, op, ": scale_tensor must be 0-dim");
  const bool channels_last = is_channels_last(refined) && is_channels_last(synthetic);
  const auto dense = [&](const Tensor& t) {
    return channels_last ? t : torch::stable::contiguous(t);
  };
  const auto gradient = [&](bool need) {
    if (!need) return nothing(refined, wide(refined));
    if (channels_last) return empty_image(refined, refined.size(1), wide(refined), true);
    return torch::stable::empty(refined.sizes(), wide(refined), std::nullopt, refined.device());
  };
  return {dtype_of(refined, op),
          dense(refined),
          dense(synthetic),
          gradient(refined_grad),
          gradient(synthetic_grad),
          scale_tensor,
          scale,
          factor_of(reduction, refined.dim() ? refined.size(0) : 1, double(refined.numel()))};
}

template <typename Kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> patch_discriminator_loss(
    const Tensor& real, const Tensor& fake, const MaybeTensor& real_weight,
    const MaybeTensor& fake_weight, const std::string& kind_name, const std::string& reduction_name,
    double label_smoothing, bool real_grad, bool fake_grad) {
  const char* op = "patch_discriminator_loss";
  const Kernels kernels(op, real, fake, real_weight, fake_weight);
  const Kind kind = kind_of(kind_name);
  const Reduction reduction = reduction_of(reduction_name);
  FASTDA_CHECK(real.scalar_type() == fake.scalar_type(), op, ": logits must have one dtype");
  const LossSide sides[] = {
      loss_side<Kernels>(real, real_weight, term_of(kind, true, label_smoothing), reduction,
                         real_grad, op),
      loss_side<Kernels>(fake, fake_weight, term_of(kind, false, label_smoothing), reduction,
                         fake_grad, op)};
  const Evaluated e = kernels.loss({&sides[0], &sides[1]}, nullptr, wide(real), true, op);
  return {e.loss, *e.accuracy[0], *e.accuracy[1], sides[0].grad, sides[1].grad};
}

template <typename Kernels>
std::tuple<Tensor, Tensor> patch_generator_loss(const Tensor& fake, const MaybeTensor& weight,
                                                const std::string& kind,
                                                const std::string& reduction, bool grad) {
  const char* op = "patch_generator_loss";
  const Kernels kernels(op, fake, weight);
  const LossSide side = loss_side<Kernels>(fake, weight, generator_term(kind_of(kind)),
                                           reduction_of(reduction), grad, op);
  return {kernels.loss({&side, nullptr}, nullptr, wide(fake), false, op).loss, side.grad};
}

template <typename Kernels>
std::tuple<Tensor, Tensor, Tensor> patch_loss_map(const Tensor& logits, const MaybeTensor& weight,
                                                  const std::string& kind, bool real,
                                                  double label_smoothing, bool grad) {
  const char* op = "patch_loss_map";
  const Kernels kernels(op, logits, weight);
  LossSide side = loss_side<Kernels>(logits, weight, term_of(kind_of(kind), real, label_smoothing),
                                     Reduction::sum, grad, op);
  const Tensor terms = empty_image(logits, 1, wide(logits), false);
  side.view.terms = terms.mutable_data_ptr();
  const Evaluated e = kernels.loss({&side, nullptr}, nullptr, wide(logits), true, op);
  return {terms, *e.accuracy[0], side.grad};
}

template <typename Kernels>
std::tuple<Tensor, Tensor, Tensor> self_regularization(const Tensor& refined,
                                                       const Tensor& synthetic,
                                                       const MaybeTensor& scale_tensor,
                                                       double scale, const std::string& reduction,
                                                       bool refined_grad, bool synthetic_grad) {
  const char* op = "self_regularization";
  const Kernels kernels(op, refined, synthetic, scale_tensor);
  const LossPair pair = loss_pair(refined, synthetic, scale_tensor, scale, reduction_of(reduction),
                                  refined_grad, synthetic_grad, op);
  return {kernels.loss({}, &pair, wide(refined), false, op).loss, pair.refined_grad,
          pair.synthetic_grad};
}

template <typename Kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor> refiner_loss(
    const Tensor& fake, const Tensor& refined, const Tensor& synthetic,
    const MaybeTensor& scale_tensor, double scale, const std::string& kind,
    const std::string& reduction_name, bool fake_grad, bool refined_grad, bool synthetic_grad) {
  const char* op = "refiner_loss";
  const Kernels kernels(op, fake, refined, synthetic, scale_tensor);
  const Reduction reduction = reduction_of(reduction_name);
  const LossSide side =
      loss_side<Kernels>(fake, {}, generator_term(kind_of(kind)), reduction, fake_grad, op);
  const LossPair pair = loss_pair(refined, synthetic, scale_tensor, scale, reduction, refined_grad,
                                  synthetic_grad, op);
  const ScalarType dtype = wide(fake) == ScalarType::Double ? wide(fake) : wide(refined);
  return {kernels.loss({&side, nullptr}, &pair, dtype, false, op).loss, side.grad,
          pair.refined_grad, pair.synthetic_grad};
}

template <typename Kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> patch_head_discriminator_loss(
    const Tensor& real, const Tensor& fake, const Tensor& weight, const MaybeTensor& bias,
    const std::string& kind_name, const std::string& reduction, double label_smoothing,
    bool real_grad, bool fake_grad, bool weight_grad) {
  const char* op = "patch_head_discriminator_loss";
  const Kernels kernels(op, real, fake, weight, bias);
  const Kind kind = kind_of(kind_name);
  const int64_t channels = real.dim() == 4 ? real.size(1) : -1;
  const int64_t rows = kind == Kind::softmax ? 2 : 1;
  FASTDA_CHECK(
      channels >= 0 && channels <= Kernels::most_patches && fake.dim() == 4 &&
          fake.size(1) == channels && weight.dim() == 4 && weight.size(0) == rows &&
          weight.size(1) == channels && weight.size(2) == 1 && weight.size(3) == 1 &&
          (!bias || (bias->dim() == 1 && bias->size(0) == rows &&
                     bias->scalar_type() == real.scalar_type())) &&
          fake.scalar_type() == real.scalar_type() && weight.scalar_type() == real.scalar_type(),
      op, ": features must be (N, C, H, W), weight (2 or 1, C, 1, 1), bias (2 or 1), of one dtype");
  const ScalarType accumulator = wide(real);
  const auto none = [&] { return nothing(real, accumulator); };
  LossHead head{{},
                dtype_of(real, op),
                reduction_of(reduction),
                channels,
                torch::stable::contiguous(weight),
                bias ? MaybeTensor(torch::stable::contiguous(*bias)) : std::nullopt,
                weight_grad ? empty(weight, {rows, channels, 1, 1}, accumulator) : none(),
                weight_grad && bias ? empty(weight, {rows}, accumulator) : none(),
                weight_grad,
                weight_grad && bias};
  const Tensor x[] = {Kernels::features(real), Kernels::features(fake)};
  Tensor grads[] = {none(), none()};
  for (int i = 0; i < 2; ++i) {
    check_patches<Kernels>(x[i], op);
    const bool channels_last = is_channels_last(x[i]);
    HeadView& v = head.view[i];
    v.term = term_of(kind, i == 0, label_smoothing);
    v.x = x[i].const_data_ptr();
    v.image = x[i].stride(0);
    v.channel = x[i].stride(1);
    v.patch = channels_last ? channels : 1;
    v.images = x[i].size(0);
    v.patches = x[i].size(2) * x[i].size(3);
    if (i == 0 ? real_grad : fake_grad) {
      grads[i] = empty_image(x[i], channels, accumulator, channels_last);
      v.grad = grads[i].mutable_data_ptr();
      v.grad_image = grads[i].stride(0);
      v.grad_channel = grads[i].stride(1);
      v.grad_patch = v.patch;
    }
  }
  const Evaluated e = kernels.head(head, op);
  return {e.loss,   *e.accuracy[0],   *e.accuracy[1], grads[0],
          grads[1], head.weight_grad, head.bias_grad};
}

template <typename Kernels>
void patch_loss_scale_(const Tensor& first, const Tensor& second, const Tensor& factor) {
  const char* op = "patch_loss_scale_";
  const Kernels kernels(op, factor, first, second);
  FASTDA_CHECK(first.scalar_type() == wide(first) && second.scalar_type() == wide(second), op,
               ": tensors must be float32 or float64");
  kernels.scale({&first, &second}, factor, op);
}

template <typename Kernels, typename Library>
void register_patch_loss(Library& m) {
  m.impl("patch_discriminator_loss", TORCH_BOX(&patch_discriminator_loss<Kernels>));
  m.impl("patch_generator_loss", TORCH_BOX(&patch_generator_loss<Kernels>));
  m.impl("patch_loss_map", TORCH_BOX(&patch_loss_map<Kernels>));
  m.impl("self_regularization", TORCH_BOX(&self_regularization<Kernels>));
  m.impl("refiner_loss", TORCH_BOX(&refiner_loss<Kernels>));
  m.impl("patch_head_discriminator_loss", TORCH_BOX(&patch_head_discriminator_loss<Kernels>));
  m.impl("patch_loss_scale_", TORCH_BOX(&patch_loss_scale_<Kernels>));
}

}  // namespace fastda
