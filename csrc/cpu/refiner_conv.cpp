#include <atomic>
#include <cstdlib>
#include <new>
#include <optional>
#include <vector>

#include "cpu/conv/problem.h"
#include "cpu/device.h"

namespace fastda::cpu {
namespace {

// Workspace of a thread, kept from call to call: mapping fresh pages costs as much as a small
// convolution.
class Workspace {
 public:
  ~Workspace() { std::free(data_); }
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ =
          static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64)));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0;
};
thread_local Workspace workspace;

Tensor empty(std::initializer_list<int64_t> size, ScalarType dtype) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(size.begin(), size.size()),
                              dtype);
}
Tensor empty_image(int64_t n, int64_t c, int64_t h, int64_t w, ScalarType dtype,
                   bool channels_last) {
  const int64_t size[] = {n, c, h, w};
  return torch::stable::empty(
      torch::headeronly::IntHeaderOnlyArrayRef(size, 4), dtype, std::nullopt, std::nullopt,
      std::nullopt, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// `t` as the kernels want it: unit stride along the channels or along the columns. Copies only
// where neither is so.
Tensor with_unit_stride(const Tensor& t, bool channels_last) {
  const int d = channels_last ? 1 : 3;
  if (t.size(d) == 1 || t.stride(d) == 1) return t;
  return torch::stable::contiguous(
      t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}
View view_of(const Tensor& t) {
  const auto stride = [&](int d) { return t.size(d) == 1 ? 1 : t.stride(d); };
  return {const_cast<void*>(t.const_data_ptr()), stride(0), stride(1), stride(2), stride(3)};
}
View view_of(const MaybeTensor& t) { return t ? view_of(*t) : View{}; }

ConvProblem check(const Tensor& x, const Tensor& weight, const char* op) {
  FASTDA_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(1) == x.size(1) &&
                   weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1 &&
                   weight.scalar_type() == x.scalar_type(),
               op,
               ": x must be (N, C, H, W) and weight (K, C, k, k) with odd k, of the same dtype");
  return {.dtype = dtype_of(x, op),
          .batch = x.size(0),
          .in_channels = x.size(1),
          .out_channels = weight.size(0),
          .height = x.size(2),
          .width = x.size(3),
          .kernel = weight.size(2),
          .padding = weight.size(2) / 2};
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

const ConvKernels& kernels_for(const ConvProblem& problem) {
  for (const ConvKernels* kernels :
       {&winograd_panels_kernels(), &winograd_tiles_kernels(), &winograd_large_kernels(),
        &winograd_5x5_kernels(), &winograd_2x2_kernels()})
    if (kernels->serves && kernels->serves(problem)) return *kernels;
  return direct_kernels();
}

// Everything that a convolution is fused with.
struct Fusion {
  MaybeTensor x_mask, bias, residual, residual_mask, out_mask;
  bool relu = false;
};

// out = the convolution of x with weight, or, `rotate`d, its transpose: then x is a gradient with
// weight.size(0) channels and out has weight.size(1). `like` has their batch, height, width and
// dtype. channels_last: of x; out_channels_last: of out and of what it is fused with.
ConvArgs conv_args(const Tensor& like, const View& x, bool channels_last, const Tensor& weight,
                   bool rotate, const Fusion& fusion, const View& out, bool out_channels_last) {
  const int64_t k = weight.size(2);
  ConvArgs args{};
  args.dtype = dtype_of(like, "conv_same");
  args.x_channels_last = channels_last;
  args.out_channels_last = out_channels_last;
  args.batch = like.size(0);
  args.height = like.size(2);
  args.width = like.size(3);
  args.kernel = k;
  args.padding = k / 2;
  args.in_channels = weight.size(rotate ? 0 : 1);
  args.out_channels = weight.size(rotate ? 1 : 0);
  args.x = x;
  args.x_mask = view_of(fusion.x_mask);
  args.bias = fusion.bias ? fusion.bias->const_data_ptr() : nullptr;
  args.residual = view_of(fusion.residual);
  args.residual_mask = view_of(fusion.residual_mask);
  args.out_mask = view_of(fusion.out_mask);
  args.out = out;
  args.relu = fusion.relu;

  View& filter = args.filter;
  filter = {const_cast<void*>(weight.const_data_ptr()), weight.stride(0), weight.stride(1),
            weight.stride(2), weight.stride(3)};
  if (rotate) {
    filter.data = static_cast<char*>(filter.data) +
                  (k - 1) * (filter.h + filter.w) * int64_t(weight.element_size());
    filter = {filter.data, filter.c, filter.n, -filter.h, -filter.w};
  }
  return args;
}

// The tensor is what args.prepared points into.
Tensor prepare(const ConvKernels& kernels, ConvArgs& args) {
  Tensor prepared = empty({kernels.prepared_bytes(args)}, ScalarType::Byte);
  kernels.prepare(args, prepared.mutable_data_ptr());
  args.prepared = prepared.const_data_ptr();
  return prepared;
}

void convolve(const Tensor& x, bool channels_last, const Tensor& weight, bool rotate,
              const Fusion& fusion, const Tensor& out, bool out_channels_last) {
  if (out.numel() == 0) return;
  ConvArgs args = conv_args(x, view_of(x), channels_last, weight, rotate, fusion, view_of(out),
                            out_channels_last);
  const auto run = [&](const ConvKernels& kernels) {
    const Tensor prepared = prepare(kernels, args);
    const int64_t bytes = kernels.conv_scratch_bytes(args);
    std::atomic<bool> right = true;
    torch::stable::parallel_for(0, kernels.conv_tasks(args), 1, [&](int64_t begin, int64_t end) {
      char* scratch = workspace.reserve(bytes);
      for (int64_t task = begin; task < end; ++task)
        if (!kernels.conv(args, task, scratch)) right = false;
    });
    return right.load();
  };
  if (!run(kernels_for(args))) run(direct_kernels());
}

// channels_last: of x; grad_channels_last: of grad and its mask. d_weight: empty where not wanted.
FilterGradArgs filter_grad_args(const Tensor& x, bool channels_last, const View& grad,
                                const View& mask, bool grad_channels_last, int64_t out_channels,
                                const Tensor& d_weight) {
  const bool want_weight = d_weight.dim() == 4;
  FilterGradArgs args{};
  args.dtype = dtype_of(x, "conv_same_backward");
  args.x_channels_last = channels_last;
  args.grad_channels_last = grad_channels_last;
  args.batch = x.size(0);
  args.in_channels = x.size(1);
  args.out_channels = out_channels;
  args.height = x.size(2);
  args.width = x.size(3);
  args.kernel = want_weight ? d_weight.size(2) : 1;
  args.padding = args.kernel / 2;
  if (want_weight) args.x = view_of(x);
  args.grad = grad;
  args.grad_mask = mask;
  if (want_weight) args.d_filter = view_of(d_weight);
  return args;
}

// f(chunk, where it sums, scratch) for every chunk; then they are combined. False where that is not
// finite.
template <typename F>
bool sum_chunks(const ConvKernels& kernels, const FilterGradArgs& args, int64_t scratch_bytes,
                const Tensor& d_bias, F&& f) {
  const int64_t chunks = kernels.chunks(args), sum_bytes = kernels.sum_bytes(args);
  const Tensor sums = empty({chunks * sum_bytes}, ScalarType::Byte);
  char* sum = static_cast<char*>(sums.mutable_data_ptr());
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    char* scratch = workspace.reserve(scratch_bytes);
    for (int64_t chunk = begin; chunk < end; ++chunk) f(chunk, sum + chunk * sum_bytes, scratch);
  });
  return kernels.combine(args, sum, d_bias.numel() > 0 ? d_bias.mutable_data_ptr() : nullptr);
}

void filter_gradient(const Tensor& x, bool channels_last, const Tensor& grad,
                     const MaybeTensor& mask, bool grad_channels_last, const Tensor& d_weight,
                     const Tensor& d_bias) {
  if (d_weight.dim() != 4 && d_bias.numel() == 0) return;
  if (grad.numel() == 0) {
    Tensor zeros[] = {d_weight, d_bias};
    for (Tensor& t : zeros) torch::stable::zero_(t);
    return;
  }
  FilterGradArgs args = filter_grad_args(x, channels_last, view_of(grad), view_of(mask),
                                         grad_channels_last, grad.size(1), d_weight);
  const auto run = [&](const ConvKernels& kernels) {
    const Tensor prepared =
        empty({kernels.prepare_grad ? kernels.grad_prepared_bytes(args) : 0}, ScalarType::Byte);
    if (kernels.prepare_grad) kernels.prepare_grad(args, prepared.mutable_data_ptr());
    args.prepared = prepared.const_data_ptr();
    return sum_chunks(kernels, args, kernels.filter_grad_scratch_bytes(args), d_bias,
                      [&](int64_t chunk, void* sum, void* scratch) {
                        kernels.filter_grad(args, chunk, sum, scratch);
                      });
  };
  if (!run(kernels_for(args))) run(direct_kernels());
}

// The gradients of a block's first convolution and of its input, by way of that of its inner
// activation, of which there are never more than some rows. False where that cannot be done, or
// came out not finite.
bool backward_in_bands(ConvArgs inner, ConvArgs input, const FilterGradArgs& filter,
                       const Tensor& d_bias) {
  const ConvKernels& kernels = kernels_for(inner);
  if (&kernels != &kernels_for(input) || &kernels != &kernels_for(filter) ||
      kernels.band == nullptr)
    return false;
  if (int64_t(torch::stable::get_num_threads()) > kernels.chunks(filter)) return false;
  const int64_t bytes = kernels.band_scratch_bytes(inner, input, filter);
  if (bytes == 0) return false;
  const Tensor prepared[] = {prepare(kernels, inner), prepare(kernels, input)};
  std::atomic<bool> right = true;
  const bool finite =
      sum_chunks(kernels, filter, bytes, d_bias, [&](int64_t chunk, void* sum, void* scratch) {
        if (!kernels.band(inner, input, filter, chunk, sum, scratch)) right = false;
      });
  return finite && right;
}

Tensor nothing(const Tensor& like) { return empty({0}, like.scalar_type()); }
Tensor empty_filter(const Tensor& weight) {
  return empty({weight.size(0), weight.size(1), weight.size(2), weight.size(3)},
               weight.scalar_type());
}

MaybeTensor laid_out(const MaybeTensor& t, bool channels_last) {
  return t ? MaybeTensor(with_unit_stride(*t, channels_last)) : std::nullopt;
}

Tensor conv_same(const Tensor& x_any, const Tensor& weight, const MaybeTensor& bias,
                 const MaybeTensor& residual, bool relu) {
  const ConvProblem s = check(x_any, weight, "conv_same");
  check_image(residual, x_any, s.out_channels, "conv_same");
  const bool channels_last = prefers_channels_last(x_any);
  const Tensor x = with_unit_stride(x_any, channels_last);
  Fusion fusion;
  fusion.bias = check_bias(bias, x, s.out_channels, "conv_same");
  fusion.residual = laid_out(residual, channels_last);
  fusion.relu = relu;
  Tensor out =
      empty_image(s.batch, s.out_channels, s.height, s.width, x.scalar_type(), channels_last);
  convolve(x, channels_last, weight, false, fusion, out, channels_last);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> conv_same_backward(const Tensor& grad_any, const Tensor& x_any,
                                                      const Tensor& weight,
                                                      const MaybeTensor& output, bool need_x,
                                                      bool need_weight, bool need_bias) {
  const ConvProblem s = check(x_any, weight, "conv_same_backward");
  check_image(grad_any, x_any, s.out_channels, "conv_same_backward");
  check_image(output, x_any, s.out_channels, "conv_same_backward");
  const bool channels_last = prefers_channels_last(x_any);
  const Tensor x = with_unit_stride(x_any, channels_last),
               grad = with_unit_stride(grad_any, channels_last);
  Fusion fusion;
  fusion.x_mask = laid_out(output, channels_last);
  Tensor d_x = nothing(x), d_weight = nothing(x), d_bias = nothing(x);
  if (need_x) {
    d_x = empty_image(s.batch, s.in_channels, s.height, s.width, x.scalar_type(), channels_last);
    convolve(grad, channels_last, weight, true, fusion, d_x, channels_last);
  }
  if (need_weight) d_weight = empty_filter(weight);
  if (need_bias) d_bias = empty({s.out_channels}, x.scalar_type());
  filter_gradient(x, channels_last, grad, fusion.x_mask, channels_last, d_weight, d_bias);
  return {d_x, d_weight, d_bias};
}

// Between the convolutions of a block all is channels_last, whatever x is: the kernels need not
// turn it.
Tensor empty_inner(const ConvProblem& s, ScalarType dtype) {
  return empty_image(s.batch, s.out_channels, s.height, s.width, dtype, true);
}

Tensor inner_activation(const Tensor& x, const Tensor& weight1, const MaybeTensor& bias1,
                        bool channels_last, const char* op) {
  const ConvProblem s = check(x, weight1, op);
  Fusion fusion;
  fusion.bias = check_bias(bias1, x, s.out_channels, op);
  fusion.relu = true;
  Tensor inner = empty_inner(s, x.scalar_type());
  convolve(x, channels_last, weight1, false, fusion, inner, true);
  return inner;
}

std::tuple<Tensor, Tensor> refiner_block(const Tensor& x_any, const Tensor& weight1,
                                         const MaybeTensor& bias1, const Tensor& weight2,
                                         const MaybeTensor& bias2, bool keep_inner) {
  const bool channels_last = prefers_channels_last(x_any);
  const Tensor x = with_unit_stride(x_any, channels_last);
  const Tensor inner = inner_activation(x, weight1, bias1, channels_last, "refiner_block");
  const ConvProblem s = check(inner, weight2, "refiner_block");
  FASTDA_CHECK(s.out_channels == x.size(1),
               "refiner_block: weight2 must have as many output channels as x has channels");
  Fusion fusion;
  fusion.bias = check_bias(bias2, x, s.out_channels, "refiner_block");
  fusion.residual = x;
  fusion.relu = true;
  Tensor out =
      empty_image(s.batch, s.out_channels, s.height, s.width, x.scalar_type(), channels_last);
  convolve(inner, true, weight2, false, fusion, out, channels_last);
  return {out, keep_inner ? inner : nothing(x)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> refiner_block_backward(
    const Tensor& grad_any, const Tensor& x_any, const MaybeTensor& inner_any,
    const Tensor& output_any, const Tensor& weight1, const MaybeTensor& bias1,
    const Tensor& weight2, bool need_x, bool need_weight1, bool need_bias1, bool need_weight2,
    bool need_bias2) {
  const char* op = "refiner_block_backward";
  const ConvProblem s = check(x_any, weight1, op);
  check_image(grad_any, x_any, s.in_channels, op);
  check_image(output_any, x_any, s.in_channels, op);
  check_image(inner_any, x_any, s.out_channels, op);
  const bool channels_last = prefers_channels_last(x_any);
  const Tensor x = with_unit_stride(x_any, channels_last),
               grad = with_unit_stride(grad_any, channels_last);
  const Tensor output = with_unit_stride(output_any, channels_last);
  Tensor inner = inner_any ? with_unit_stride(*inner_any, true)
                           : inner_activation(x, weight1, bias1, channels_last, op);
  FASTDA_CHECK(check(inner, weight2, op).out_channels == s.in_channels, op,
               ": weight2 does not fit x");
  Tensor d_x = nothing(x), d_weight1 = nothing(x), d_bias1 = nothing(x), d_weight2 = nothing(x),
         d_bias2 = nothing(x);
  if (need_weight2) d_weight2 = empty_filter(weight2);
  if (need_bias2) d_bias2 = empty({s.in_channels}, x.scalar_type());
  filter_gradient(inner, true, grad, output, channels_last, d_weight2, d_bias2);
  if (need_weight1) d_weight1 = empty_filter(weight1);
  if (need_bias1) d_bias1 = empty({s.out_channels}, x.scalar_type());
  Fusion fusion, shortcut;
  fusion.x_mask = output;
  fusion.out_mask = std::move(inner);
  shortcut.residual = grad;
  shortcut.residual_mask = output;
  const auto empty_like_x = [&] {
    return empty_image(s.batch, s.in_channels, s.height, s.width, x.scalar_type(), channels_last);
  };
  if (need_x && need_weight1 && x.numel() > 0) {
    d_x = empty_like_x();
    if (backward_in_bands(
            conv_args(x, view_of(grad), channels_last, weight2, true, fusion, {}, true),
            conv_args(x, {}, true, weight1, true, shortcut, view_of(d_x), channels_last),
            filter_grad_args(x, channels_last, {}, {}, true, s.out_channels, d_weight1), d_bias1))
      return {d_x, d_weight1, d_bias1, d_weight2, d_bias2};
  }
  d_x = nothing(x);
  if (need_x || need_weight1 || need_bias1) {
    const Tensor d_inner = empty_inner(s, x.scalar_type());
    convolve(grad, channels_last, weight2, true, fusion, d_inner, true);
    fusion.out_mask.reset();  // a recomputed inner activation is freed before d_x is made
    filter_gradient(x, channels_last, d_inner, std::nullopt, true, d_weight1, d_bias1);
    if (need_x) {
      d_x = empty_like_x();
      convolve(d_inner, true, weight1, true, shortcut, d_x, channels_last);
    }
  }
  return {d_x, d_weight1, d_bias1, d_weight2, d_bias2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastda, CPU, m) {
  m.impl("conv_same", TORCH_BOX(&conv_same));
  m.impl("conv_same_backward", TORCH_BOX(&conv_same_backward));
  m.impl("refiner_block", TORCH_BOX(&refiner_block));
  m.impl("refiner_block_backward", TORCH_BOX(&refiner_block_backward));
}

}  // namespace fastda::cpu
