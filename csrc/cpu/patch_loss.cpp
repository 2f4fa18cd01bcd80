#include <optional>
#include <vector>

#include "cpu/device.h"
#include "cpu/kernels/patch_loss.h"

namespace fastda::cpu {
namespace {

// Sums are taken over chunks of this many patches (or pixels) and added in their order, so that
// they are the same bit for bit at any number of threads.
constexpr int64_t chunk = 4096, chunks_per_thread = 4;

Tensor nothing(const Tensor& like) { return fastda::nothing(like, wide(like)); }
Tensor scalar(double value, const Tensor& like, ScalarType dtype) {
  Tensor t = tiny(like, 0, dtype);
  if (dtype == ScalarType::Double)
    *data<double>(t) = value;
  else
    *data<float>(t) = float(value);
  return t;
}
double scalar_value(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return *const_data<double>(t);
    case ScalarType::Float: return *const_data<float>(t);
    default: return *const_data<double>(torch::stable::to(t, ScalarType::Double));
  }
}
int64_t chunks(int64_t total) { return (total + chunk - 1) / chunk; }

// Calls run(first, last) -> sums for every chunk of [0, total) and returns those sums.
template <typename Sums, typename F>
std::vector<Sums> chunk_sums(int64_t total, F&& run) {
  std::vector<Sums> sums(size_t(chunks(total)));
  if (total <= chunk) {
    if (total > 0) sums[0] = run(0, total);
    return sums;
  }
  torch::stable::parallel_for(0, chunks(total), chunks_per_thread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * chunk;
      sums[size_t(i)] = run(first, first + chunk < total ? first + chunk : total);
    }
  });
  return sums;
}

Tensor empty_image(const Tensor& like, bool channels_last) {
  return fastda::empty_image(like, like.size(1), wide(like), channels_last);
}

struct Evaluated {
  double loss, accuracy;
  Tensor grad;
};

Evaluated evaluate(const Tensor& logits_any, const MaybeTensor& weight_any, const PatchTerm& term,
                   int64_t reduction, bool need_grad, const char* op,
                   const Tensor* terms = nullptr) {
  FASTDA_CHECK(logits_any.dim() == 4 && logits_any.size(1) == (term.pair ? 2 : 1), op,
               ": logits must be (N, 2, H, W) for softmax and (N, 1, H, W) for other kinds");
  const Tensor logits = with_planes(logits_any);
  PatchSide s{};
  s.dtype = dtype_of(logits, op);
  s.term = term;
  s.logits = logits.const_data_ptr();
  s.image = logits.stride(0);
  s.channel = logits.stride(1);
  s.patch = patch_stride(logits);
  s.images = logits.size(0);
  s.patches = logits.size(2) * logits.size(3);
  const int64_t total = s.images * s.patches;
  double count = double(total);
  MaybeTensor weight;
  if (weight_any) {
    FASTDA_CHECK(weight_any->dim() == 4 && weight_any->size(0) == logits.size(0) &&
                     weight_any->size(1) == 1 && weight_any->size(2) == logits.size(2) &&
                     weight_any->size(3) == logits.size(3) &&
                     weight_any->scalar_type() == wide(logits),
                 op, ": a weight must be (N, 1, H, W), float64 for float64 logits, else float32");
    weight = with_planes(*weight_any);
    s.weight = weight->const_data_ptr();
    s.weight_image = weight->stride(0);
    s.weight_patch = patch_stride(*weight);
    count = 0;
    for (double part : chunk_sums<double>(total, [&](int64_t begin, int64_t end) {
           return patch_loss_kernels().weight_sum(s, begin, end);
         }))
      count += part;
  }
  s.factor = factor_of(reduction, s.images, count);
  Tensor grad = nothing(logits);
  if (need_grad) {
    grad = empty_image(logits, is_channels_last(logits));
    s.grad = grad.mutable_data_ptr();
    s.grad_image = grad.stride(0);
    s.grad_channel = grad.stride(1);
    s.grad_patch = patch_stride(grad);
  }
  if (terms) s.terms = terms->mutable_data_ptr();
  double loss = 0, right = 0;
  for (const PatchSums& part : chunk_sums<PatchSums>(total, [&](int64_t begin, int64_t end) {
         return patch_loss_kernels().side(s, begin, end);
       })) {
    loss += part.loss;
    right += part.right;
  }
  return {loss * s.factor, right / count, grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> patch_discriminator_loss(
    const Tensor& real, const Tensor& fake, const MaybeTensor& real_weight,
    const MaybeTensor& fake_weight, int64_t kind, int64_t reduction, double label_smoothing,
    bool real_grad, bool fake_grad) {
  const char* op = "patch_discriminator_loss";
  FASTDA_CHECK(real.scalar_type() == fake.scalar_type(), op, ": logits must have one dtype");
  const Evaluated r =
      evaluate(real, real_weight, term_of(kind, true, label_smoothing), reduction, real_grad, op);
  const Evaluated f =
      evaluate(fake, fake_weight, term_of(kind, false, label_smoothing), reduction, fake_grad, op);
  return {scalar(r.loss + f.loss, real, wide(real)), scalar(r.accuracy, real, ScalarType::Float),
          scalar(f.accuracy, real, ScalarType::Float), r.grad, f.grad};
}

std::tuple<Tensor, Tensor> patch_generator_loss(const Tensor& fake, const MaybeTensor& weight,
                                                int64_t kind, int64_t reduction, bool grad) {
  const Evaluated e =
      evaluate(fake, weight, generator_term(kind), reduction, grad, "patch_generator_loss");
  return {scalar(e.loss, fake, wide(fake)), e.grad};
}

std::tuple<Tensor, Tensor, Tensor> patch_loss_map(const Tensor& logits, const MaybeTensor& weight,
                                                  int64_t kind, bool real, double label_smoothing,
                                                  bool grad) {
  FASTDA_CHECK(logits.dim() == 4, "patch_loss_map: logits must be (N, C, H, W)");
  const Tensor terms = fastda::empty_image(logits, 1, wide(logits), false);
  const Evaluated e = evaluate(logits, weight, term_of(kind, real, label_smoothing), sum, grad,
                               "patch_loss_map", &terms);
  return {terms, scalar(e.accuracy, logits, ScalarType::Float), e.grad};
}

struct L1 {
  double loss;
  Tensor refined, synthetic;
};

L1 evaluate_l1(Tensor refined, Tensor synthetic, const MaybeTensor& scale_tensor, double scale,
               int64_t reduction, bool refined_grad, bool synthetic_grad, const char* op) {
  bool same = refined.dim() == synthetic.dim() && refined.scalar_type() == synthetic.scalar_type();
  for (int64_t d = 0; same && d < refined.dim(); ++d) same = refined.size(d) == synthetic.size(d);
  FASTDA_CHECK(same, op, ": refined and synthetic must have one shape and dtype");
  const DType dtype = dtype_of(refined, op);
  const bool channels_last = is_channels_last(refined) && is_channels_last(synthetic);
  if (!channels_last) {
    refined = torch::stable::contiguous(refined);
    synthetic = torch::stable::contiguous(synthetic);
  }
  const auto make_grad = [&](bool need) {
    if (!need) return nothing(refined);
    if (channels_last) return empty_image(refined, true);
    std::vector<int64_t> size;
    for (int64_t d = 0; d < refined.dim(); ++d) size.push_back(refined.size(d));
    return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(size.data(), size.size()),
                                wide(refined));
  };
  const int64_t total = refined.numel(), images = refined.dim() ? refined.size(0) : 1;
  const double factor = (scale_tensor ? scalar_value(*scale_tensor) : scale) *
                        factor_of(reduction, images, double(total));
  L1 out{0, make_grad(refined_grad), make_grad(synthetic_grad)};
  void* a = refined_grad ? out.refined.mutable_data_ptr() : nullptr;
  void* b = synthetic_grad ? out.synthetic.mutable_data_ptr() : nullptr;
  const void *x = refined.const_data_ptr(), *y = synthetic.const_data_ptr();
  for (double part : chunk_sums<double>(total, [&](int64_t begin, int64_t end) {
         return patch_loss_kernels().l1(dtype, x, y, a, b, factor, begin, end);
       }))
    out.loss += part;
  out.loss *= factor;
  return out;
}

std::tuple<Tensor, Tensor, Tensor> self_regularization(const Tensor& refined,
                                                       const Tensor& synthetic,
                                                       const MaybeTensor& scale_tensor,
                                                       double scale, int64_t reduction,
                                                       bool refined_grad, bool synthetic_grad) {
  const L1 e = evaluate_l1(refined, synthetic, scale_tensor, scale, reduction, refined_grad,
                           synthetic_grad, "self_regularization");
  return {scalar(e.loss, refined, wide(refined)), e.refined, e.synthetic};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> refiner_loss(const Tensor& fake, const Tensor& refined,
                                                        const Tensor& synthetic,
                                                        const MaybeTensor& scale_tensor,
                                                        double scale, int64_t kind,
                                                        int64_t reduction, bool fake_grad,
                                                        bool refined_grad, bool synthetic_grad) {
  const char* op = "refiner_loss";
  const Evaluated g = evaluate(fake, std::nullopt, generator_term(kind), reduction, fake_grad, op);
  const L1 r = evaluate_l1(refined, synthetic, scale_tensor, scale, reduction, refined_grad,
                           synthetic_grad, op);
  const ScalarType dtype = wide(fake) == ScalarType::Double ? wide(fake) : wide(refined);
  return {scalar(g.loss + r.loss, fake, dtype), g.grad, r.refined, r.synthetic};
}

// Channel by channel or patch by patch in memory, images without gaps between patches.
Tensor with_unit_stride(const Tensor& x, bool channels_last) {
  if (channels_last) return x;
  const bool planes = x.size(2) <= 1 || x.size(3) <= 1 || x.stride(2) == x.stride(3) * x.size(3);
  return planes && (x.size(2) * x.size(3) == 1 || patch_stride(x) == 1)
             ? x
             : torch::stable::contiguous(x);
}

template <typename S>
std::vector<S> filter(const Tensor& weight, int64_t channels, bool pair) {
  const Tensor w = torch::stable::to(torch::stable::contiguous(weight), wide(weight));
  const S* p = const_data<S>(w);
  std::vector<S> out(static_cast<size_t>(channels));
  for (int64_t c = 0; c < channels; ++c) out[size_t(c)] = pair ? p[channels + c] - p[c] : p[c];
  return out;
}

// The sums of all chunks' d filter and d bias; of two classes the first gets the negative.
Tensor spread(const std::vector<double>& sums, size_t begin, size_t end, const Tensor& like,
              bool pair) {
  const bool is_bias = like.dim() == 1;
  const int64_t n = int64_t(end - begin), rows = pair ? 2 : 1;
  Tensor out = is_bias ? empty(like, {rows}, wide(like)) : empty(like, {rows, n, 1, 1}, wide(like));
  const auto fill = [&](auto* p) {
    using S = std::remove_pointer_t<decltype(p)>;
    for (int64_t i = 0; i < n; ++i) {
      const double g = sums[begin + size_t(i)];
      if (pair) p[i] = S(-g);
      p[pair ? n + i : i] = S(g);
    }
  };
  if (out.scalar_type() == ScalarType::Double)
    fill(data<double>(out));
  else
    fill(data<float>(out));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> patch_head_discriminator_loss(
    const Tensor& real, const Tensor& fake, const Tensor& weight, const MaybeTensor& bias,
    int64_t kind, int64_t reduction, double label_smoothing, bool real_grad, bool fake_grad,
    bool weight_grad) {
  const char* op = "patch_head_discriminator_loss";
  const bool pair = kind == softmax;
  const int64_t channels = real.dim() == 4 ? real.size(1) : -1, rows = pair ? 2 : 1;
  FASTDA_CHECK(
      channels >= 0 && fake.dim() == 4 && fake.size(1) == channels && weight.dim() == 4 &&
          weight.size(0) == rows && weight.size(1) == channels && weight.size(2) == 1 &&
          weight.size(3) == 1 &&
          (!bias || (bias->dim() == 1 && bias->size(0) == rows &&
                     bias->scalar_type() == real.scalar_type())) &&
          fake.scalar_type() == real.scalar_type() && weight.scalar_type() == real.scalar_type(),
      op, ": features must be (N, C, H, W), weight (2 or 1, C, 1, 1), bias (2 or 1), of one dtype");
  const DType dtype = dtype_of(real, op);
  std::vector<float> filter32;
  std::vector<double> filter64;
  if (dtype == DType::f64)
    filter64 = filter<double>(weight, channels, pair);
  else
    filter32 = filter<float>(weight, channels, pair);
  double offset = 0;
  if (bias) {
    const Tensor b = torch::stable::to(torch::stable::contiguous(*bias), ScalarType::Double);
    offset = pair ? const_data<double>(b)[1] - const_data<double>(b)[0] : const_data<double>(b)[0];
  }
  const size_t width = size_t(channels) + 1;
  std::vector<double> total(weight_grad ? width : 0, 0.0);
  double loss = 0, accuracy[2];
  Tensor grads[2] = {nothing(real), nothing(real)};
  for (int i = 0; i < 2; ++i) {
    const Tensor& any = i == 0 ? real : fake;
    const bool channels_last = is_channels_last(any);
    const Tensor x = with_unit_stride(any, channels_last);
    PatchHead h{};
    h.dtype = dtype;
    h.term = term_of(kind, i == 0, label_smoothing);
    h.x = x.const_data_ptr();
    h.image = x.stride(0);
    h.channel = x.stride(1);
    h.patch = channels_last ? channels : 1;
    h.weight = dtype == DType::f64 ? static_cast<const void*>(filter64.data()) : filter32.data();
    h.bias = offset;
    h.images = x.size(0);
    h.patches = x.size(2) * x.size(3);
    h.channels = channels;
    const int64_t patches = h.images * h.patches;
    h.factor = factor_of(reduction, h.images, double(patches));
    if (i == 0 ? real_grad : fake_grad) {
      grads[i] = empty_image(x, channels_last);
      h.grad = grads[i].mutable_data_ptr();
      h.grad_image = grads[i].stride(0), h.grad_channel = grads[i].stride(1),
      h.grad_patch = h.patch;
    }
    std::vector<double> parts(weight_grad ? size_t(chunks(patches)) * width : 0, 0.0);
    double part_loss = 0, right = 0;
    for (const PatchSums& part : chunk_sums<PatchSums>(patches, [&](int64_t begin, int64_t end) {
           double* row = weight_grad ? parts.data() + size_t(begin / chunk) * width : nullptr;
           return patch_loss_kernels().head(h, begin, end, row);
         })) {
      part_loss += part.loss;
      right += part.right;
    }
    for (size_t j = 0; j < parts.size(); ++j) total[j % width] += parts[j];
    loss += part_loss * h.factor;
    accuracy[i] = right / double(patches);
  }
  Tensor grad_weight = nothing(weight), grad_bias = nothing(weight);
  if (weight_grad) {
    grad_weight = spread(total, 0, width - 1, weight, pair);
    if (bias) grad_bias = spread(total, width - 1, width, *bias, pair);
  }
  return {scalar(loss, real, wide(real)),
          scalar(accuracy[0], real, ScalarType::Float),
          scalar(accuracy[1], real, ScalarType::Float),
          grads[0],
          grads[1],
          grad_weight,
          grad_bias};
}

void patch_loss_scale_(const Tensor& first, const Tensor& second, const Tensor& factor) {
  const double by = scalar_value(factor);
  if (by == 1.0) return;
  for (const Tensor* t : {&first, &second}) {
    const int64_t n = t->numel();
    if (n == 0) continue;
    FASTDA_CHECK(t->scalar_type() == wide(*t),
                 "patch_loss_scale_: tensors must be float32 or float64");
    const DType dtype = dtype_of(*t, "patch_loss_scale_");
    void* x = t->mutable_data_ptr();
    torch::stable::parallel_for(0, n, chunk * chunks_per_thread, [&](int64_t begin, int64_t end) {
      patch_loss_kernels().scale(dtype, x, by, begin, end);
    });
  }
}

}  // namespace

FASTDA_CPU_LIBRARY(m) {
  m.impl("patch_discriminator_loss", TORCH_BOX(&patch_discriminator_loss));
  m.impl("patch_generator_loss", TORCH_BOX(&patch_generator_loss));
  m.impl("patch_loss_map", TORCH_BOX(&patch_loss_map));
  m.impl("self_regularization", TORCH_BOX(&self_regularization));
  m.impl("refiner_loss", TORCH_BOX(&refiner_loss));
  m.impl("patch_head_discriminator_loss", TORCH_BOX(&patch_head_discriminator_loss));
  m.impl("patch_loss_scale_", TORCH_BOX(&patch_loss_scale_));
}

}  // namespace fastda::cpu
