#include <vector>

#include "cpu/device.h"
#include "cpu/kernels/patch_loss.h"
#include "host/patch_loss.h"

namespace fastda::cpu {
namespace {

// Sums are taken over chunks of this many patches (or pixels) and added in their order, so that
// they are the same bit for bit at any number of threads.
constexpr int64_t chunk = 4096, chunks_per_thread = 4;

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

struct Value {
  double loss, accuracy;
};

Value value_of(const LossSide& side) {
  PatchSide s{side.view, side.dtype, 0};
  const int64_t total = s.images * s.patches;
  double count = double(total);
  if (s.weight) {
    count = 0;
    for (double part : chunk_sums<double>(total, [&](int64_t begin, int64_t end) {
           return patch_loss_kernels().weight_sum(s, begin, end);
         }))
      count += part;
  }
  s.factor = factor_of(side.reduction, s.images, count);
  double loss = 0, right = 0;
  for (const PatchSums& part : chunk_sums<PatchSums>(total, [&](int64_t begin, int64_t end) {
         return patch_loss_kernels().side(s, begin, end);
       })) {
    loss += part.loss;
    right += part.right;
  }
  return {loss * s.factor, right / count};
}

double value_of(const LossPair& p) {
  const double factor = (p.scale_tensor ? scalar_value(*p.scale_tensor) : p.scale) * p.factor;
  const auto pointer = [](const Tensor& grad) {
    return grad.numel() ? grad.mutable_data_ptr() : nullptr;
  };
  void *a = pointer(p.refined_grad), *b = pointer(p.synthetic_grad);
  const void *x = p.refined.const_data_ptr(), *y = p.synthetic.const_data_ptr();
  double loss = 0;
  for (double part : chunk_sums<double>(p.refined.numel(), [&](int64_t begin, int64_t end) {
         return patch_loss_kernels().l1(p.dtype, x, y, a, b, factor, begin, end);
       }))
    loss += part;
  return loss * factor;
}

// The filter whose convolution gives the score.
template <typename S>
std::vector<S> filter(const LossHead& head) {
  const Tensor w = torch::stable::to(head.weight, wide(head.weight));
  const S* p = const_data<S>(w);
  std::vector<S> out(static_cast<size_t>(head.channels));
  for (int64_t c = 0; c < head.channels; ++c)
    out[size_t(c)] = head.view[0].term.pair ? p[head.channels + c] - p[c] : p[c];
  return out;
}

// The sums of all chunks' d filter or d bias, n of them; of two classes the first gets the negative.
void spread(const double* sums, int64_t n, bool pair, const Tensor& out) {
  const auto fill = [&](auto* p) {
    using S = std::remove_pointer_t<decltype(p)>;
    for (int64_t i = 0; i < n; ++i) {
      if (pair) p[i] = S(-sums[i]);
      p[pair ? n + i : i] = S(sums[i]);
    }
  };
  if (out.scalar_type() == ScalarType::Double)
    fill(data<double>(out));
  else
    fill(data<float>(out));
}

struct PatchLoss : Device {
  using Device::Device;

  static constexpr int64_t most_patches = INT64_MAX;

  Evaluated loss(const LossSide* const (&sides)[2], const LossPair* pair, ScalarType dtype,
                 bool accuracies, const char*) const {
    const Tensor& like = sides[0] ? sides[0]->logits : pair->refined;
    double loss = -0.0;  // to which a first summand is added as it is
    MaybeTensor accuracy[2];
    for (int i = 0; i < 2; ++i) {
      if (!sides[i]) continue;
      const Value value = value_of(*sides[i]);
      loss += value.loss;
      if (accuracies) accuracy[i] = scalar(value.accuracy, like, ScalarType::Float);
    }
    if (pair) loss += value_of(*pair);
    return {scalar(loss, like, dtype), {accuracy[0], accuracy[1]}};
  }

  // Channel by channel or patch by patch in memory, images without gaps between patches.
  static Tensor features(const Tensor& x) {
    if (is_channels_last(x)) return x;
    const bool planes = x.size(2) <= 1 || x.size(3) <= 1 || x.stride(2) == x.stride(3) * x.size(3);
    return planes && (x.size(2) * x.size(3) == 1 || patch_stride(x) == 1)
               ? x
               : torch::stable::contiguous(x);
  }

  Evaluated head(const LossHead& head, const char*) const {
    const bool pair = head.view[0].term.pair;
    std::vector<float> filter32;
    std::vector<double> filter64;
    if (head.dtype == DType::f64)
      filter64 = filter<double>(head);
    else
      filter32 = filter<float>(head);
    double offset = 0;
    if (head.bias) {
      const Tensor b = torch::stable::to(*head.bias, ScalarType::Double);
      const double* p = const_data<double>(b);
      offset = pair ? p[1] - p[0] : p[0];
    }
    const size_t width = size_t(head.channels) + 1;
    std::vector<double> total(head.need_weight ? width : 0, 0.0);
    double loss = 0;
    MaybeTensor accuracy[2];
    for (int i = 0; i < 2; ++i) {
      PatchHead h{head.view[i]};
      h.dtype = head.dtype;
      h.weight =
          h.dtype == DType::f64 ? static_cast<const void*>(filter64.data()) : filter32.data();
      h.bias = offset;
      h.channels = head.channels;
      const int64_t patches = h.images * h.patches;
      h.factor = factor_of(head.reduction, h.images, double(patches));
      std::vector<double> parts(head.need_weight ? size_t(chunks(patches)) * width : 0, 0.0);
      double part_loss = 0, right = 0;
      for (const PatchSums& part : chunk_sums<PatchSums>(patches, [&](int64_t begin, int64_t end) {
             double* row = parts.empty() ? nullptr : parts.data() + size_t(begin / chunk) * width;
             return patch_loss_kernels().head(h, begin, end, row);
           })) {
        part_loss += part.loss;
        right += part.right;
      }
      for (size_t j = 0; j < parts.size(); ++j) total[j % width] += parts[j];
      loss += part_loss * h.factor;
      accuracy[i] = scalar(right / double(patches), head.weight, ScalarType::Float);
    }
    if (head.need_weight) spread(total.data(), head.channels, pair, head.weight_grad);
    if (head.need_bias) spread(total.data() + head.channels, 1, pair, head.bias_grad);
    return {scalar(loss, head.weight, wide(head.weight)), {accuracy[0], accuracy[1]}};
  }

  void scale(const Tensor* const (&tensors)[2], const Tensor& factor, const char* op) const {
    const double by = scalar_value(factor);
    if (by == 1.0) return;
    for (const Tensor* t : tensors) {
      const int64_t n = t->numel();
      if (n == 0) continue;
      const DType dtype = dtype_of(*t, op);
      void* x = t->mutable_data_ptr();
      torch::stable::parallel_for(0, n, chunk * chunks_per_thread, [&](int64_t begin, int64_t end) {
        patch_loss_kernels().scale(dtype, x, by, begin, end);
      });
    }
  }
};

}  // namespace

FASTDA_CPU_LIBRARY(m) { register_patch_loss<PatchLoss>(m); }

}  // namespace fastda::cpu
