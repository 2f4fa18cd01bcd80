#include "cuda/kernels/patch_loss.h"

#include <algorithm>

#include "cuda/device.h"
#include "host/patch_loss.h"

namespace fastda::cuda {
namespace {

Side side_of(const LossSide& side) {
  Side s{side.view};
  s.total = s.images * s.patches;
  s.patches = std::max<int64_t>(1, s.patches);
  s.part.blocks = loss_blocks(s.total);
  s.part.factor = factor_of(side.reduction, s.images, double(s.total));
  s.part.share = 1.0 / double(s.total);
  if (s.weight) {
    s.part.weight_blocks = weight_blocks(s.total);
    s.part.divide_by_weight = side.reduction == Reduction::mean;
  }
  return s;
}

L1 l1_of(const LossPair& pair, const char* op) {
  L1 p;
  p.total = pair.refined.numel();
  p.part.blocks = loss_blocks(p.total);
  p.part.factor = pair.factor;
  if (pair.scale_tensor) {
    p.part.scale = pair.scale_tensor->const_data_ptr();
    p.part.scale_dtype = dtype_of(*pair.scale_tensor, op);
  } else {
    p.part.factor *= pair.scale;
  }
  p.a = pair.refined.const_data_ptr();
  p.b = pair.synthetic.const_data_ptr();
  if (pair.refined_grad.numel()) p.grad_a = pair.refined_grad.mutable_data_ptr();
  if (pair.synthetic_grad.numel()) p.grad_b = pair.synthetic_grad.mutable_data_ptr();
  return p;
}

struct PatchLoss : Device {
  using Device::Device;

  static constexpr int64_t most_patches = int64_t(1) << 30;

  // The sides and the pair in one launch, the pair in one of its own if its dtype is another; then
  // what adds up their sums.
  Evaluated loss(const LossSide* const (&sides)[2], const LossPair* pair, ScalarType loss_dtype,
                 bool accuracies, const char* op) const {
    const Tensor& like = sides[0] ? sides[0]->logits : pair->refined;
    Evaluated out{empty(like, {}, loss_dtype), {}};
    Losses p;
    for (int i = 0; i < 2; ++i) {
      if (!sides[i]) continue;
      p.side[i] = side_of(*sides[i]);
      if (!accuracies) continue;
      out.accuracy[i] = empty(like, {}, ScalarType::Float);
      p.side[i].part.accuracy = data<float>(*out.accuracy[i]);
    }
    if (pair) p.l1 = l1_of(*pair, op);
    Part* parts[loss_parts] = {&p.side[0].part, &p.side[1].part, &p.l1.part};
    int blocks = 0, weights = 0;
    for (Part* part : parts) {
      part->first = blocks;
      blocks += part->blocks;
      weights += part->weight_blocks;
    }
    // Sums of losses, of right patches, and of weights.
    const Tensor partial = empty(like, {2 * blocks + weights}, ScalarType::Double);
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
    const DType pair_dtype = pair ? pair->dtype : sides[0]->dtype;
    const DType dtype = sides[0] ? sides[0]->dtype : pair_dtype;
    sum_weights(dtype, p.side, sums, stream());
    if (dtype == pair_dtype) {
      run_losses(dtype, p, stream());
    } else {
      Losses first = p, rest = p;
      first.l1 = {};
      rest.side[0] = rest.side[1] = {};
      run_losses(dtype, first, stream());
      run_losses(pair_dtype, rest, stream());
    }
    const Part all[loss_parts] = {p.side[0].part, p.side[1].part, p.l1.part};
    finish_losses(all, p.losses, p.rights, out.loss.mutable_data_ptr(), dtype_of(out.loss, op),
                  stream());
    return out;
  }

  // Channel by channel or patch by patch in memory, without gaps.
  static Tensor features(const Tensor& x) {
    return is_channels_last(x) ? x : torch::stable::contiguous(x);
  }

  Evaluated head(const LossHead& head, const char* op) const {
    const Tensor& like = head.weight;
    Evaluated out{empty(like, {}, wide(like)),
                  {empty(like, {}, ScalarType::Float), empty(like, {}, ScalarType::Float)}};
    Head p;
    p.weight = head.weight.const_data_ptr();
    p.bias = head.bias ? head.bias->const_data_ptr() : nullptr;
    p.channels = int(head.channels);
    int64_t total = 0;
    for (int i = 0; i < 2; ++i) {
      HeadSide& s = p.side[i];
      static_cast<HeadView&>(s) = head.view[i];
      s.total = s.images * s.patches;
      s.patches = std::max<int64_t>(1, s.patches);
      s.part.factor = factor_of(head.reduction, s.images, double(s.total));
      s.part.share = 1.0 / double(s.total);
      s.part.accuracy = data<float>(*out.accuracy[i]);
      total += s.total;
    }
    p.groups = head_groups(total);
    int blocks = 0, rows = 0;
    for (HeadSide& s : p.side) {
      s.part.first = blocks;
      s.part.blocks = head_blocks(s.total, p.groups);
      blocks += s.part.blocks;
      rows += head_rows(s.total, p.groups);
    }
    const Tensor partial = empty(like, {2 * blocks}, ScalarType::Double);
    double *losses = data<double>(partial), *rights = losses + blocks;
    MaybeTensor sums;
    if (head.need_weight) {
      sums = empty(like, {rows, head.channels + 1}, wide(like));
      p.sums = sums->mutable_data_ptr();
    }
    run_head(head.dtype, p, losses, rights, stream());
    const Part parts[loss_parts] = {p.side[0].part, p.side[1].part, {}};
    finish_losses(parts, losses, rights, out.loss.mutable_data_ptr(), dtype_of(out.loss, op),
                  stream());
    if (head.need_weight)
      finish_head(head.dtype, p.sums, rows, p.channels, p.side[0].term.pair,
                  head.weight_grad.mutable_data_ptr(),
                  head.need_bias ? head.bias_grad.mutable_data_ptr() : nullptr, stream());
    return out;
  }

  void scale(const Tensor* const (&tensors)[2], const Tensor& factor, const char* op) const {
    const Tensor &first = *tensors[0], &second = *tensors[1];
    scale_both({first.mutable_data_ptr(), second.mutable_data_ptr()},
               {dtype_of(first, op), dtype_of(second, op)}, {first.numel(), second.numel()},
               factor.const_data_ptr(), dtype_of(factor, op), stream());
  }
};

}  // namespace

FASTDA_CUDA_LIBRARY(m) { register_patch_loss<PatchLoss>(m); }

}  // namespace fastda::cuda
