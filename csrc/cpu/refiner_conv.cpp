#include "host/refiner_conv.h"

#include <atomic>
#include <cstdlib>
#include <new>

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

Tensor workspace_of(const Tensor& like, int64_t bytes) {
  return empty(like, {bytes}, ScalarType::Byte);
}

const ConvKernels& kernels_for(const ConvProblem& problem) {
  for (const ConvKernels* kernels :
       {&winograd_panels_kernels(), &winograd_tiles_kernels(), &winograd_large_kernels(),
        &winograd_5x5_kernels(), &winograd_2x2_kernels()})
    if (kernels->serves && kernels->serves(problem)) return *kernels;
  return direct_kernels();
}

// The tensor is what args.prepared points into.
Tensor prepare(const ConvKernels& kernels, ConvArgs& args, const Tensor& like) {
  Tensor prepared = workspace_of(like, kernels.prepared_bytes(args));
  kernels.prepare(args, prepared.mutable_data_ptr());
  args.prepared = prepared.const_data_ptr();
  return prepared;
}

// f(chunk, where it sums, scratch) for every chunk; then they are combined. False where that is not
// finite.
template <typename F>
bool sum_chunks(const ConvKernels& kernels, const FilterGradArgs& args, int64_t scratch_bytes,
                const Tensor& d_bias, const Tensor& like, F&& f) {
  const int64_t chunks = kernels.chunks(args), sum_bytes = kernels.sum_bytes(args);
  const Tensor sums = workspace_of(like, chunks * sum_bytes);
  char* sum = static_cast<char*>(sums.mutable_data_ptr());
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    char* scratch = workspace.reserve(scratch_bytes);
    for (int64_t chunk = begin; chunk < end; ++chunk) f(chunk, sum + chunk * sum_bytes, scratch);
  });
  return kernels.combine(args, sum, d_bias.numel() > 0 ? d_bias.mutable_data_ptr() : nullptr);
}

struct RefinerConv : Device {
  using Device::Device;
  static constexpr bool any_strides = false;
  static constexpr bool inner_channels_last = true;  // the kernels need not turn it
  static constexpr bool has_window = true;

  static void check(const ConvProblem&, const char*) {}

  void convolve(ConvArgs args, const Tensor& like) const {
    const auto run = [&](const ConvKernels& kernels) {
      const Tensor prepared = prepare(kernels, args, like);
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

  void filter_gradient(FilterGradArgs args, const Tensor& d_bias, const Tensor& like) const {
    const auto run = [&](const ConvKernels& kernels) {
      const Tensor prepared =
          workspace_of(like, kernels.prepare_grad ? kernels.grad_prepared_bytes(args) : 0);
      if (kernels.prepare_grad) kernels.prepare_grad(args, prepared.mutable_data_ptr());
      args.prepared = prepared.const_data_ptr();
      return sum_chunks(kernels, args, kernels.filter_grad_scratch_bytes(args), d_bias, like,
                        [&](int64_t chunk, void* sum, void* scratch) {
                          kernels.filter_grad(args, chunk, sum, scratch);
                        });
    };
    if (!run(kernels_for(args))) run(direct_kernels());
  }

  static constexpr bool in_one_launch(const ConvArgs&, const ConvArgs&) { return false; }
  void convolve_block(const ConvArgs&, const ConvArgs&, const Tensor&) const {}

  // The gradients of a block's first convolution and of its input, by way of that of its inner
  // activation, of which there are never more than some rows. False where that cannot be done, or
  // came out not finite.
  bool backward_in_window(ConvArgs inner, ConvArgs input, const FilterGradArgs& filter,
                          const Tensor& d_bias, const Tensor& like) const {
    const ConvKernels& kernels = kernels_for(inner);
    if (&kernels != &kernels_for(input) || &kernels != &kernels_for(filter) ||
        kernels.band == nullptr)
      return false;
    if (int64_t(torch::stable::get_num_threads()) > kernels.chunks(filter)) return false;
    const int64_t bytes = kernels.band_scratch_bytes(inner, input, filter);
    if (bytes == 0) return false;
    const Tensor prepared[] = {prepare(kernels, inner, like), prepare(kernels, input, like)};
    std::atomic<bool> right = true;
    const bool finite = sum_chunks(kernels, filter, bytes, d_bias, like,
                                   [&](int64_t chunk, void* sum, void* scratch) {
                                     if (!kernels.band(inner, input, filter, chunk, sum, scratch))
                                       right = false;
                                   });
    return finite && right;
  }
};

}  // namespace

FASTDA_CPU_LIBRARY(m) {
  register_refiner_conv<RefinerConv>(m);
  m.impl("conv2d", TORCH_BOX(&conv2d<RefinerConv>));
  m.impl("conv2d_backward", TORCH_BOX(&conv2d_backward<RefinerConv>));
}

}  // namespace fastda::cpu
