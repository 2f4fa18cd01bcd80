#include "cuda/kernels/patch_loss.h"

#include <vector>

#include "cuda/device.h"

namespace fastda::cuda {
namespace {

Tensor nothing(const Tensor& like) { return fastda::nothing(like, wide(like)); }
Tensor scalar(const Tensor& like, ScalarType dtype) { return empty(like, {}, dtype); }

Tensor empty_image(const Tensor& like, bool channels_last) {
  return fastda::empty_image(like, like.size(1), wide(like), channels_last);
}

void check_patches(const Tensor& t, const char* op) {
  FASTDA_CHECK(t.size(2) * t.size(3) <= (int64_t(1) << 30), op,
               ": an image may have at most 2^30 patches");
}

// The tensors that a Side points into.
struct Prepared {
  Tensor logits, grad;
  MaybeTensor weight;
};

Prepared prepare(Side& s, const Tensor& logits_any, const MaybeTensor& weight_any,
                 const PatchTerm& term, int64_t reduction, bool need_grad, const char* op) {
  FASTDA_CHECK(logits_any.dim() == 4 && logits_any.size(1) == (term.pair ? 2 : 1), op,
               ": logits must be (N, 2, H, W) for softmax and (N, 1, H, W) for other kinds");
  check_patches(logits_any, op);
  Prepared t{with_planes(logits_any), nothing(logits_any), std::nullopt};
  const Tensor& logits = t.logits;
  s.term = term;
  s.logits = logits.const_data_ptr();
  s.image = logits.stride(0), s.channel = logits.stride(1), s.patch = patch_stride(logits);
  s.patches = std::max<int64_t>(1, logits.size(2) * logits.size(3));
  s.total = logits.size(0) * logits.size(2) * logits.size(3);
  s.part.blocks = loss_blocks(s.total);
  s.part.factor = factor_of(reduction, logits.size(0), s.total);
  s.part.share = 1.0 / double(s.total);
  if (weight_any) {
    FASTDA_CHECK(weight_any->dim() == 4 && weight_any->size(0) == logits.size(0) &&
                     weight_any->size(1) == 1 && weight_any->size(2) == logits.size(2) &&
                     weight_any->size(3) == logits.size(3) &&
                     weight_any->scalar_type() == wide(logits),
                 op, ": a weight must be (N, 1, H, W), float64 for float64 logits, else float32");
    t.weight = with_planes(*weight_any);
    s.weight = t.weight->const_data_ptr();
    s.weight_image = t.weight->stride(0), s.weight_patch = patch_stride(*t.weight);
    s.part.weight_blocks = weight_blocks(s.total);
    s.part.divide_by_weight = reduction == mean;
  }
  if (need_grad) {
    t.grad = empty_image(logits, is_channels_last(logits));
    s.grad = t.grad.mutable_data_ptr();
    s.grad_image = t.grad.stride(0), s.grad_channel = t.grad.stride(1),
    s.grad_patch = patch_stride(t.grad);
  }
  return t;
}

struct PreparedPair {
  Tensor refined, synthetic, refined_grad, synthetic_grad;
  MaybeTensor scale;
};

PreparedPair prepare(L1& p, const Tensor& refined, const Tensor& synthetic,
                     const MaybeTensor& scale_tensor, double scale, int64_t reduction,
                     bool refined_grad, bool synthetic_grad, const char* op) {
  bool same = refined.dim() == synthetic.dim() && refined.scalar_type() == synthetic.scalar_type();
  for (int64_t d = 0; same && d < refined.dim(); ++d) same = refined.size(d) == synthetic.size(d);
  FASTDA_CHECK(same, op, ": refined and synthetic must have one shape and dtype");
  FASTDA_CHECK(!scale_tensor || scale_tensor->dim() == 0, op, ": scale_tensor must be 0-dim");
  const bool channels_last = is_channels_last(refined) && is_channels_last(synthetic);
  PreparedPair t{refined, synthetic, nothing(refined), nothing(refined), scale_tensor};
  if (!channels_last) {
    t.refined = torch::stable::contiguous(refined);
    t.synthetic = torch::stable::contiguous(synthetic);
  }
  const auto make_grad = [&] {
    if (channels_last) return empty_image(refined, true);
    std::vector<int64_t> size;
    for (int64_t d = 0; d < refined.dim(); ++d) size.push_back(refined.size(d));
    return torch::stable::new_empty(
        refined, torch::headeronly::IntHeaderOnlyArrayRef(size.data(), size.size()), wide(refined));
  };
  p.total = refined.numel();
  p.part.blocks = loss_blocks(p.total);
  p.part.factor = factor_of(reduction, refined.dim() ? refined.size(0) : 1, p.total);
  if (scale_tensor) {
    p.part.scale = scale_tensor->const_data_ptr();
    p.part.scale_dtype = dtype_of(*scale_tensor, op);
  } else {
    p.part.factor *= scale;
  }
  p.a = t.refined.const_data_ptr(), p.b = t.synthetic.const_data_ptr();
  if (refined_grad) {
    t.refined_grad = make_grad();
    p.grad_a = t.refined_grad.mutable_data_ptr();
  }
  if (synthetic_grad) {
    t.synthetic_grad = make_grad();
    p.grad_b = t.synthetic_grad.mutable_data_ptr();
  }
  return t;
}

// Runs what is set of `p`, l1 in a launch of its own if its dtype is another, and adds up the loss.
Tensor run(Losses& p, const Tensor& logits_or_image, const Tensor& l1_image, ScalarType loss_dtype,
           void* stream, const char* op) {
  Part* parts[loss_parts] = {&p.side[0].part, &p.side[1].part, &p.l1.part};
  int blocks = 0, weights = 0;
  for (Part* part : parts) {
    part->first = blocks;
    blocks += part->blocks;
    weights += part->weight_blocks;
  }
  // Sums of losses, of right patches, and of weights.
  const Tensor partial = empty(logits_or_image, {2 * blocks + weights}, ScalarType::Double);
  p.losses = data<double>(partial);
  p.rights = p.losses + blocks;
  double* sums[2] = {};
  double* next = p.rights + blocks;
  for (int i = 0; i < 2; ++i) {
    if (p.side[i].weight == nullptr) continue;
    sums[i] = next;
    p.side[i].part.weight_sums = next;
    next += p.side[i].part.weight_blocks;
  }
  const DType dtype = dtype_of(logits_or_image, op), l1_dtype = dtype_of(l1_image, op);
  sum_weights(dtype, p.side, sums, stream);
  if (dtype == l1_dtype) {
    run_losses(dtype, p, stream);
  } else {
    Losses sides = p, rest = p;
    sides.l1 = {};
    rest.side[0] = rest.side[1] = {};
    run_losses(dtype, sides, stream);
    run_losses(l1_dtype, rest, stream);
  }
  Tensor loss = scalar(logits_or_image, loss_dtype);
  const Part all[loss_parts] = {p.side[0].part, p.side[1].part, p.l1.part};
  finish_losses(all, p.losses, p.rights, loss.mutable_data_ptr(), dtype_of(loss, op), stream);
  return loss;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> patch_discriminator_loss(
    const Tensor& real, const Tensor& fake, const MaybeTensor& real_weight,
    const MaybeTensor& fake_weight, int64_t kind, int64_t reduction, double label_smoothing,
    bool real_grad, bool fake_grad) {
  const char* op = "patch_discriminator_loss";
  const Device device(op, real, fake, real_weight, fake_weight);
  FASTDA_CHECK(real.scalar_type() == fake.scalar_type(), op, ": logits must have one dtype");
  Losses p;
  const Prepared r = prepare(p.side[0], real, real_weight, term_of(kind, true, label_smoothing),
                             reduction, real_grad, op);
  const Prepared f = prepare(p.side[1], fake, fake_weight, term_of(kind, false, label_smoothing),
                             reduction, fake_grad, op);
  const Tensor accuracies[2] = {scalar(real, ScalarType::Float), scalar(real, ScalarType::Float)};
  for (int i = 0; i < 2; ++i) p.side[i].part.accuracy = data<float>(accuracies[i]);
  const Tensor loss = run(p, real, real, wide(real), device.stream(), op);
  return {loss, accuracies[0], accuracies[1], r.grad, f.grad};
}

std::tuple<Tensor, Tensor> patch_generator_loss(const Tensor& fake, const MaybeTensor& weight,
                                                int64_t kind, int64_t reduction, bool grad) {
  const char* op = "patch_generator_loss";
  const Device device(op, fake, weight);
  Losses p;
  const Prepared f = prepare(p.side[0], fake, weight, generator_term(kind), reduction, grad, op);
  return {run(p, fake, fake, wide(fake), device.stream(), op), f.grad};
}

std::tuple<Tensor, Tensor, Tensor> patch_loss_map(const Tensor& logits, const MaybeTensor& weight,
                                                  int64_t kind, bool real, double label_smoothing,
                                                  bool grad) {
  const char* op = "patch_loss_map";
  const Device device(op, logits, weight);
  Losses p;
  const Prepared t =
      prepare(p.side[0], logits, weight, term_of(kind, real, label_smoothing), sum, grad, op);
  const Tensor terms = fastda::empty_image(logits, 1, wide(logits), false);
  const Tensor accuracy = scalar(logits, ScalarType::Float);
  p.side[0].terms = terms.mutable_data_ptr();
  p.side[0].part.accuracy = data<float>(accuracy);
  run(p, logits, logits, wide(logits), device.stream(), op);
  return {terms, accuracy, t.grad};
}

std::tuple<Tensor, Tensor, Tensor> self_regularization(const Tensor& refined,
                                                       const Tensor& synthetic,
                                                       const MaybeTensor& scale_tensor,
                                                       double scale, int64_t reduction,
                                                       bool refined_grad, bool synthetic_grad) {
  const char* op = "self_regularization";
  const Device device(op, refined, synthetic, scale_tensor);
  Losses p;
  const PreparedPair t = prepare(p.l1, refined, synthetic, scale_tensor, scale, reduction,
                                 refined_grad, synthetic_grad, op);
  const Tensor loss = run(p, refined, refined, wide(refined), device.stream(), op);
  return {loss, t.refined_grad, t.synthetic_grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> refiner_loss(const Tensor& fake, const Tensor& refined,
                                                        const Tensor& synthetic,
                                                        const MaybeTensor& scale_tensor,
                                                        double scale, int64_t kind,
                                                        int64_t reduction, bool fake_grad,
                                                        bool refined_grad, bool synthetic_grad) {
  const char* op = "refiner_loss";
  const Device device(op, fake, refined, synthetic, scale_tensor);
  Losses p;
  const Prepared f =
      prepare(p.side[0], fake, std::nullopt, generator_term(kind), reduction, fake_grad, op);
  const PreparedPair t = prepare(p.l1, refined, synthetic, scale_tensor, scale, reduction,
                                 refined_grad, synthetic_grad, op);
  const ScalarType dtype = wide(fake) == ScalarType::Double ? wide(fake) : wide(refined);
  const Tensor loss = run(p, fake, refined, dtype, device.stream(), op);
  return {loss, f.grad, t.refined_grad, t.synthetic_grad};
}

// Channel by channel or patch by patch in memory, images without gaps between patches.
Tensor dense(const Tensor& x) { return is_channels_last(x) ? x : torch::stable::contiguous(x); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> patch_head_discriminator_loss(
    const Tensor& real, const Tensor& fake, const Tensor& weight, const MaybeTensor& bias,
    int64_t kind, int64_t reduction, double label_smoothing, bool real_grad, bool fake_grad,
    bool weight_grad) {
  const char* op = "patch_head_discriminator_loss";
  const Device device(op, real, fake, weight, bias);
  const bool pair = kind == softmax;
  const int64_t channels = real.dim() == 4 ? real.size(1) : -1, rows = pair ? 2 : 1;
  FASTDA_CHECK(
      channels >= 0 && channels < (1 << 30) && fake.dim() == 4 && fake.size(1) == channels &&
          weight.dim() == 4 && weight.size(0) == rows && weight.size(1) == channels &&
          weight.size(2) == 1 && weight.size(3) == 1 &&
          (!bias || (bias->dim() == 1 && bias->size(0) == rows &&
                     bias->scalar_type() == real.scalar_type())) &&
          fake.scalar_type() == real.scalar_type() && weight.scalar_type() == real.scalar_type(),
      op, ": features must be (N, C, H, W), weight (2 or 1, C, 1, 1), bias (2 or 1), of one dtype");
  const DType dtype = dtype_of(real, op);
  const Tensor filter = torch::stable::contiguous(weight);
  const MaybeTensor offset = bias ? MaybeTensor(torch::stable::contiguous(*bias)) : std::nullopt;
  Head p;
  p.weight = filter.const_data_ptr();
  p.bias = offset ? offset->const_data_ptr() : nullptr;
  p.channels = int(channels);
  const Tensor x[2] = {dense(real), dense(fake)};
  Tensor grads[2] = {nothing(real), nothing(real)};
  const Tensor accuracies[2] = {scalar(real, ScalarType::Float), scalar(real, ScalarType::Float)};
  int64_t total = 0;
  for (int i = 0; i < 2; ++i) {
    HeadSide& s = p.side[i];
    check_patches(x[i], op);
    s.term = term_of(kind, i == 0, label_smoothing);
    s.x = x[i].const_data_ptr();
    s.image = x[i].stride(0), s.channel = x[i].stride(1), s.patch = patch_stride(x[i]);
    s.patches = std::max<int64_t>(1, x[i].size(2) * x[i].size(3));
    s.total = x[i].size(0) * x[i].size(2) * x[i].size(3);
    s.part.factor = factor_of(reduction, x[i].size(0), s.total);
    s.part.share = 1.0 / double(s.total);
    s.part.accuracy = data<float>(accuracies[i]);
    if (i == 0 ? real_grad : fake_grad) {
      grads[i] = empty_image(x[i], is_channels_last(x[i]));
      s.grad = grads[i].mutable_data_ptr();
    }
    total += s.total;
  }
  p.groups = head_groups(total);
  int blocks = 0, sum_rows = 0;
  for (HeadSide& s : p.side) {
    s.part.first = blocks;
    s.part.blocks = head_blocks(s.total, p.groups);
    blocks += s.part.blocks;
    sum_rows += head_rows(s.total, p.groups);
  }
  const Tensor partial = empty(real, {2 * blocks}, ScalarType::Double);
  Tensor d_weight = nothing(weight), d_bias = nothing(weight);
  Tensor sums = nothing(real);
  if (weight_grad) {
    sums = empty(real, {sum_rows, channels + 1}, wide(real));
    p.sums = sums.mutable_data_ptr();
    d_weight = empty(weight, {rows, channels, 1, 1}, wide(weight));
    if (bias) d_bias = empty(weight, {rows}, wide(weight));
  }
  run_head(dtype, p, data<double>(partial), data<double>(partial) + blocks, device.stream());
  Tensor loss = scalar(real, wide(real));
  const Part parts[loss_parts] = {p.side[0].part, p.side[1].part, {}};
  finish_losses(parts, data<double>(partial), data<double>(partial) + blocks,
                loss.mutable_data_ptr(), dtype_of(loss, op), device.stream());
  if (weight_grad)
    finish_head(dtype, sums.const_data_ptr(), sum_rows, p.channels, pair,
                d_weight.mutable_data_ptr(), bias ? d_bias.mutable_data_ptr() : nullptr,
                device.stream());
  return {loss, accuracies[0], accuracies[1], grads[0], grads[1], d_weight, d_bias};
}

void patch_loss_scale_(Tensor first, Tensor second, const Tensor& factor) {
  const char* op = "patch_loss_scale_";
  const Device device(op, factor, first, second);
  const auto wide_or_fail = [&](const Tensor& t) {
    const DType dtype = dtype_of(t, op);
    FASTDA_CHECK(dtype == DType::f32 || dtype == DType::f64, op,
                 ": tensors must be float32 or float64");
    return dtype;
  };
  scale_both({first.mutable_data_ptr(), second.mutable_data_ptr()},
             {wide_or_fail(first), wide_or_fail(second)}, {first.numel(), second.numel()},
             factor.const_data_ptr(), dtype_of(factor, op), device.stream());
}

}  // namespace

FASTDA_CUDA_LIBRARY(m) {
  m.impl("patch_discriminator_loss", TORCH_BOX(&patch_discriminator_loss));
  m.impl("patch_generator_loss", TORCH_BOX(&patch_generator_loss));
  m.impl("patch_loss_map", TORCH_BOX(&patch_loss_map));
  m.impl("self_regularization", TORCH_BOX(&self_regularization));
  m.impl("refiner_loss", TORCH_BOX(&refiner_loss));
  m.impl("patch_head_discriminator_loss", TORCH_BOX(&patch_head_discriminator_loss));
  m.impl("patch_loss_scale_", TORCH_BOX(&patch_loss_scale_));
}

}  // namespace fastda::cuda
