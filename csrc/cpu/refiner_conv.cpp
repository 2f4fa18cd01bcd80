#include "host/refiner_conv.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

#include "cpu/conv/problem.h"
#include "cpu/pool.h"

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

// `contiguous`: both images.
const ConvKernels& kernels_for(const ConvProblem& problem, bool contiguous) {
  for (const ConvKernels* kernels :
       {&winograd_panels_kernels(), &winograd_tiles_kernels(), &winograd_large_kernels(),
        &winograd_5x5_kernels(), &winograd_2x2_kernels(), &first_3x3_kernels(),
        &first_5x5_kernels(), &first_large_kernels(), &narrow_kernels()})
    if (kernels->serves && kernels->serves(problem)) return *kernels;
  for (const ConvKernels* kernels : {&planes_kernels(), &pointwise_kernels()})
    if (contiguous && kernels->serves(problem)) return *kernels;
  return direct_kernels();
}
const ConvKernels& kernels_for(const ConvArgs& args) {
  const bool contiguous = !args.x_channels_last && !args.out_channels_last;
  // There the tiles' sums would have to be turned, for fewer products saved than with larger filters.
  if (contiguous && args.kernel == 3 && planes_kernels().serves(args)) return planes_kernels();
  return kernels_for(args, contiguous);
}
const ConvKernels& kernels_for(const FilterGradArgs& args) {
  return kernels_for(args, !args.x_channels_last && !args.grad_channels_last);
}

// The filter's gradient to a few output channels is one from them, with the operands in each other's
// place: that fills the vectors. The bias' is made by itself.
FilterGradArgs turned(const FilterGradArgs& args) {
  FilterGradArgs t = args;
  t.in_channels = args.out_channels;
  t.out_channels = args.in_channels;
  t.height = args.out_height();
  t.width = args.out_width();
  t.padding = args.kernel - 1 - args.padding;
  t.x_channels_last = args.grad_channels_last;
  t.grad_channels_last = args.x_channels_last;
  t.x = args.grad;
  t.grad = args.x;
  const View& f = args.d_filter;
  const int64_t last = (args.kernel - 1) * (f.h + f.w) * size_of(args.dtype);
  t.d_filter = {static_cast<char*>(f.data) + last, f.c, f.n, -f.h, -f.w};
  return t;
}
FilterGradArgs bias_alone(const FilterGradArgs& args) {
  FilterGradArgs b = args;
  b.height = args.out_height();
  b.width = args.out_width();
  b.kernel = 1;
  b.padding = 0;
  b.x = b.d_filter = {};
  return b;
}

// The tensor is what args.prepared points into.
Tensor prepare(const ConvKernels& kernels, ConvArgs& args, const Tensor& like) {
  Tensor prepared = workspace_of(like, kernels.prepared_bytes(args));
  kernels.prepare(args, prepared.mutable_data_ptr());
  args.prepared = prepared.const_data_ptr();
  return prepared;
}

// f(task, scratch) for every task, on all threads. False where one of them is.
template <typename F>
bool each_task(int64_t tasks, int64_t scratch_bytes, F&& f) {
  std::atomic<bool> right = true;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    char* scratch = workspace.reserve(scratch_bytes);
    for (int64_t task = begin; task < end; ++task)
      if (!f(task, scratch)) right = false;
  });
  return right.load();
}

// The images with values beyond the limit of their range.
struct Beyond {
  std::vector<uint8_t> images;
  explicit Beyond(int64_t batch) : images(size_t(batch)) {}
  bool any() const { return std::find(images.begin(), images.end(), 1) != images.end(); }
  static int64_t rows_of(const ConvProblem& p, Tile tile) {
    return (p.out_height() + tile.size - 1) / tile.size;
  }
  int64_t rows(const ConvProblem& p, Tile tile) const {
    return std::count(images.begin(), images.end(), 1) * rows_of(p, tile);
  }
  // f(number, image, row of tiles, scratch) for all of these images' rows.
  template <typename F>
  void each_row(const ConvProblem& p, Tile tile, int64_t scratch_bytes, F&& f) const {
    std::vector<int64_t> which;
    for (size_t i = 0; i < images.size(); ++i)
      if (images[i]) which.push_back(int64_t(i));
    const int64_t rows = rows_of(p, tile);
    each_task(int64_t(which.size()) * rows, scratch_bytes, [&](int64_t i, char* scratch) {
      f(i, which[size_t(i / rows)], i % rows, scratch);
      return true;
    });
  }
};

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
  static constexpr bool reflects = true;
  using Pool = cpu::Pool;

  static void check(const ConvProblem&, const char*) {}

  // False: see ConvKernels::conv.
  static bool run(const ConvKernels& kernels, ConvArgs args, const Tensor& like) {
    const Tensor prepared = prepare(kernels, args, like);
    return each_task(
        kernels.conv_tasks(args), kernels.conv_scratch_bytes(args),
        [&](int64_t task, char* scratch) { return kernels.conv(args, task, scratch); });
  }
  static bool run(const ConvKernels& kernels, FilterGradArgs args, const Tensor& d_bias,
                  const Tensor& like) {
    const Tensor prepared =
        workspace_of(like, kernels.prepare_grad ? kernels.grad_prepared_bytes(args) : 0);
    if (kernels.prepare_grad) kernels.prepare_grad(args, prepared.mutable_data_ptr());
    args.prepared = prepared.const_data_ptr();
    return sum_chunks(kernels, args, kernels.filter_grad_scratch_bytes(args), d_bias, like,
                      [&](int64_t chunk, void* sum, void* scratch) {
                        kernels.filter_grad(args, chunk, sum, scratch);
                      });
  }

  void convolve(ConvArgs args, const Tensor& like) const {
    const ConvKernels& transposed = winograd_5x5_transposed_kernels();
    if (transposed.serves(args)) {
      Beyond beyond(args.batch);
      args.range.beyond = beyond.images.data();
      outliers_kernels().set_range(args);
      if (run(transposed, args, like) && !beyond.any()) return;
    }
    const ConvKernels& kernels = kernels_for(args);
    if (kernels.tile == nullptr) {
      run(kernels, args, like);
      return;
    }
    Beyond beyond(args.batch);
    args.range.beyond = beyond.images.data();
    outliers_kernels().set_range(args);
    if (!run(kernels, args, like)) {
      run(direct_kernels(), args, like);
    } else if (beyond.any()) {
      mend(args, kernels.tile(args), beyond, like);
    }
  }

  // The pooled result of a convolution: by images, so many of which a thread makes at once that what it pools
  // is still in its cache. y: [batch, out_height, out_width, channels], or contiguous, as `pool` says.
  void convolve_pooled(ConvArgs args, const PoolProblem& pool, void* y, uint8_t* indices,
                       const Tensor& like) const {
    const int64_t size = size_of(args.dtype), image = pool.height * pool.width * pool.channels,
                  pooled = pool.out_height * pool.out_width * pool.channels;
    const int64_t fit = std::max<int64_t>(1, in_cache / (image * size)),
                  shared = std::min(fit, (args.batch + least_parts - 1) / least_parts);
    const ConvKernels& kernels = kernels_for(args);
    // Which prepare all of x, not the filter.
    const bool whole = &kernels == &winograd_panels_kernels();
    const int64_t together = whole ? args.batch : shared;
    // f(images, their results) for images from the first on.
    const auto part = [&](ConvArgs& some, int64_t first, void* result) {
      some.batch = std::min(together, args.batch - first);
      some.x.data = static_cast<char*>(args.x.data) + first * args.x.n * size;
      some.out = {result, image, 1, pool.width * pool.channels, pool.channels};
      if (args.range.beyond) some.range.beyond = args.range.beyond + first;
    };
    const auto pool_part = [&](int64_t first, int64_t images, const void* result, void* scratch) {
      PoolProblem p = pool;
      p.images = images;
      pool_kernels().forward(p, result, static_cast<char*>(y) + first * pooled * size,
                             indices ? indices + first * pooled : nullptr, 0, images * p.out_height,
                             scratch);
    };
    Beyond beyond(args.batch);
    if (whole) std::fill(beyond.images.begin(), beyond.images.end(), 1);
    const Tensor prepared = whole ? nothing(like) : prepare(kernels, args, like);
    if (kernels.tile && !whole) {
      args.range.beyond = beyond.images.data();
      outliers_kernels().set_range(args);
    }
    ConvArgs most = args;
    most.by_one_thread = true;
    const int64_t parts = whole ? 0 : (args.batch + together - 1) / together;
    ConvArgs last = most;  // which may have fewer images
    part(last, std::max<int64_t>(0, parts - 1) * together, nullptr);
    part(most, 0, nullptr);
    const auto aligned = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
    const int64_t result_bytes = aligned(together * image * size),
                  conv_bytes = aligned(
                      std::max(kernels.conv_scratch_bytes(most), kernels.conv_scratch_bytes(last)));
    each_task(parts, result_bytes + conv_bytes + pool_kernels().scratch_bytes(pool),
              [&](int64_t i, char* scratch) {
                const int64_t first = i * together;
                ConvArgs some = most;
                part(some, first, scratch);
                bool right = true;
                for (int64_t task = 0; task < kernels.conv_tasks(some); ++task)
                  right &= kernels.conv(some, task, scratch + result_bytes);
                pool_part(first, some.batch, scratch, scratch + result_bytes + conv_bytes);
                for (int64_t n = first; !right && n < first + some.batch; ++n)
                  beyond.images[size_t(n)] = 1;
                return right;
              });
    if (!beyond.any()) return;
    // Those are made by themselves, with all that convolve() looks at.
    for (int64_t first = 0; first < args.batch; first += together) {
      const int64_t images = std::min(together, args.batch - first);
      const auto from = beyond.images.begin() + first;
      if (std::find(from, from + images, 1) == from + images) continue;
      const Tensor result = workspace_of(like, images * image * size),
                   scratch = workspace_of(like, pool_kernels().scratch_bytes(pool));
      ConvArgs some = args;
      part(some, first, result.mutable_data_ptr());
      some.range = {};
      convolve(some, like);
      pool_part(first, images, result.const_data_ptr(), scratch.mutable_data_ptr());
    }
  }
  static constexpr int64_t in_cache = 512 << 10, least_parts = 16;

  static bool reads_winners(const ConvArgs& args) { return kernels_for(args).reads_winners; }
  static bool reads_winners(const FilterGradArgs& args) { return kernels_for(args).reads_winners; }

  void mend(ConvArgs args, Tile tile, const Beyond& beyond, const Tensor& like) const {
    const OutlierKernels& outliers = outliers_kernels();
    const Tensor prepared = prepare(direct_kernels(), args, like);
    beyond.each_row(args, tile, outliers.mend_scratch_bytes(args, tile),
                    [&](int64_t, int64_t image, int64_t row, char* scratch) {
                      outliers.mend(args, tile, image, row, scratch);
                    });
  }

  void filter_gradient(FilterGradArgs args, const Tensor& d_bias, const Tensor& like) const {
    const ConvKernels& kernels = kernels_for(args);
    if (kernels.chunks == nullptr) {
      if (args.x.data == nullptr || args.grad_mask.data != nullptr || args.reflect) {
        run(direct_kernels(), args, d_bias, like);
        return;
      }
      if (d_bias.numel() > 0) filter_gradient(bias_alone(args), d_bias, like);
      filter_gradient(turned(args), nothing(like), like);
      return;
    }
    if (kernels.tile == nullptr) {
      run(kernels, args, d_bias, like);
      return;
    }
    Beyond beyond(args.batch);
    args.range.beyond = args.grad_range.beyond = beyond.images.data();
    outliers_kernels().set_ranges(args, kernels.tile(args));
    const bool right = run(kernels, args, d_bias, like);
    if (!right || (beyond.any() && !keeps_promise(args, kernels.tile(args), beyond)))
      run(direct_kernels(), args, d_bias, like);
  }

  bool keeps_promise(const FilterGradArgs& args, Tile tile, const Beyond& beyond) const {
    const OutlierKernels& outliers = outliers_kernels();
    const int64_t taps = args.kernel * args.kernel, row_sums = 1 + taps;
    std::vector<double> sums(size_t(beyond.rows(args, tile) * row_sums));
    beyond.each_row(args, tile, outliers.weigh_scratch_bytes(args, tile),
                    [&](int64_t i, int64_t image, int64_t row, char* scratch) {
                      double* to = sums.data() + i * row_sums;
                      outliers.weigh(args, tile, image, row, to, to + 1, scratch);
                    });
    for (size_t i = size_t(row_sums); i < sums.size(); ++i) sums[i % size_t(row_sums)] += sums[i];
    for (int64_t t = 1; t <= taps; ++t)
      if (!(sums[0] <= outliers.most * sums[size_t(t)])) return false;
    return true;
  }

  static constexpr bool in_one_launch(const ConvArgs&, const ConvArgs&) { return false; }
  void convolve_block(const ConvArgs&, const ConvArgs&, const Tensor&) const {}

  // The gradients of a block's first convolution and of its input, by way of that of its inner
  // activation, of which there are never more than some rows. False where that cannot be done, or
  // came out not finite, or where some value is so large that the gradients must be looked at.
  bool backward_in_window(ConvArgs inner, ConvArgs input, FilterGradArgs filter,
                          const Tensor& d_bias, const Tensor& like) const {
    const ConvKernels& kernels = kernels_for(inner);
    if (&kernels != &kernels_for(input) || &kernels != &kernels_for(filter) ||
        kernels.band == nullptr)
      return false;
    if (int64_t(torch::stable::get_num_threads()) > kernels.chunks(filter)) return false;
    const int64_t bytes = kernels.band_scratch_bytes(inner, input, filter);
    if (bytes == 0) return false;
    const Tensor prepared[] = {prepare(kernels, inner, like), prepare(kernels, input, like)};
    Beyond beyond(inner.batch);
    inner.range.beyond = input.range.beyond = filter.range.beyond = filter.grad_range.beyond =
        beyond.images.data();
    outliers_kernels().set_range(inner);
    outliers_kernels().set_ranges(filter, kernels.tile(filter));
    std::atomic<bool> right = true;
    const bool finite = sum_chunks(kernels, filter, bytes, d_bias, like,
                                   [&](int64_t chunk, void* sum, void* scratch) {
                                     if (!kernels.band(inner, input, filter, chunk, sum, scratch))
                                       right = false;
                                   });
    return finite && right && !beyond.any();
  }
};

// --- 4 x 4 filters with a stride of 2. Where the kernels do not serve, where a result is not finite or
// some value is so large that it might break the promise of outliers.h, PyTorch's own convolution does.

using Ints = std::vector<int64_t>;
using Flags = torch::headeronly::HeaderOnlyArrayRef<bool>;
using torch::stable::detail::from;

ConvProblem check_stride2(const Tensor& x, const Tensor& weight, int64_t padding, const char* op) {
  ConvProblem problem = check<RefinerConv>(x, weight, op, padding);
  FASTDA_CHECK(problem.kernel == 4 && problem.dtype == DType::f32, op,
               ": weight must be (K, C, 4, 4), in float32");
  problem.stride = 2;
  return problem;
}
bool served(const ConvProblem& p) {
  const ConvKernels& kernels = winograd_stride2_kernels();
  return p.batch > 0 && kernels.serves && kernels.serves(p);
}
Tensor as_laid_out(const Tensor& t, bool channels_last) {
  return torch::stable::contiguous(
      t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// False where PyTorch's is wanted. `read`: the image that x is.
bool convolve_stride2(const ConvKernels& kernels, ConvArgs args, const ConvProblem& read,
                      const Tensor& like) {
  Beyond beyond(args.batch);
  ConvArgs range = args;
  static_cast<ConvProblem&>(range) = read;
  outliers_kernels().set_range(range);
  args.range = range.range;
  args.range.beyond = beyond.images.data();
  return RefinerConv::run(kernels, args, like) && !beyond.any();
}

Tensor conv2d_stride2(const Tensor& x_any, const Tensor& weight, const MaybeTensor& bias_any,
                      int64_t padding) {
  const char* op = "conv2d_stride2";
  const RefinerConv device(op, false, x_any, weight, bias_any);
  const ConvProblem problem = check_stride2(x_any, weight, padding, op);
  const bool channels_last = prefers_channels_last(x_any);
  const MaybeTensor bias = check_bias(bias_any, x_any, problem.out_channels, op);
  if (served(problem)) {
    const Tensor x = laid_out<RefinerConv>(x_any, channels_last);
    const Tensor out =
        empty(x, {problem.batch, problem.out_channels, problem.out_height(), problem.out_width()},
              x.scalar_type(), channels_last);
    Fusion fusion;
    fusion.bias = bias;
    ConvArgs args = conv_args(x, view_of(x), channels_last, weight, false, fusion, view_of(out),
                              channels_last, padding);
    args.stride = problem.stride;
    if (convolve_stride2(winograd_stride2_kernels(), args, args, x)) return out;
  }
  StableIValue stack[] = {from(x_any),
                          from(weight),
                          from(bias),
                          from(Ints{2, 2}),
                          from(Ints{padding, padding}),
                          from(Ints{1, 1}),
                          from(false),
                          from(Ints{0, 0}),
                          from(int64_t(1))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack, TORCH_ABI_VERSION));
  return as_laid_out(torch::stable::detail::to<Tensor>(stack[0]), channels_last);
}

std::tuple<Tensor, Tensor, Tensor> conv2d_stride2_backward(const Tensor& grad_any,
                                                           const Tensor& x_any,
                                                           const Tensor& weight, int64_t padding,
                                                           bool need_x, bool need_weight,
                                                           bool need_bias) {
  const char* op = "conv2d_stride2_backward";
  const RefinerConv device(op, false, x_any, grad_any, weight);
  const ConvProblem problem = check_stride2(x_any, weight, padding, op);
  check_image(grad_any, x_any, problem, problem.out_channels, op);
  const bool channels_last = prefers_channels_last(x_any);
  Tensor grads[] = {nothing(x_any), nothing(x_any), nothing(x_any)};
  bool wanted[] = {need_x, need_weight, need_bias};
  if (served(problem)) {
    const Tensor grad = laid_out<RefinerConv>(grad_any, channels_last);
    if (need_x) {
      const Tensor d_x = empty_image(x_any, problem.in_channels, channels_last);
      ConvArgs args = conv_args(x_any, view_of(grad), channels_last, weight, false, {},
                                view_of(d_x), channels_last, padding);
      args.stride = problem.stride;
      ConvProblem read = problem;
      read.in_channels = problem.out_channels;
      read.height = problem.out_height();
      read.width = problem.out_width();
      if (convolve_stride2(winograd_stride2_data_kernels(), args, read, grad)) {
        grads[0] = d_x;
        wanted[0] = false;
      }
    }
    if (need_weight) {
      const Tensor x = laid_out<RefinerConv>(x_any, channels_last);
      const Tensor d_weight = empty_filter(weight, true);
      const Tensor d_bias = empty_bias(x, problem.out_channels, need_bias);
      const ConvKernels& kernels = winograd_stride2_kernels();
      FilterGradArgs args = filter_grad_args(x, channels_last, view_of(grad), {}, 0, channels_last,
                                             problem.out_channels, d_weight, padding);
      args.stride = problem.stride;
      Beyond beyond(args.batch);
      args.range.beyond = args.grad_range.beyond = beyond.images.data();
      outliers_kernels().set_ranges(args, kernels.tile(args));
      if (RefinerConv::run(kernels, args, d_bias, x) && !beyond.any()) {
        grads[1] = d_weight;
        grads[2] = d_bias;
        wanted[1] = wanted[2] = false;
      }
    }
  }
  if (wanted[0] || wanted[1] || wanted[2]) {
    StableIValue stack[] = {from(grad_any),        from(x_any),
                            from(weight),          from(std::optional(Ints{problem.out_channels})),
                            from(Ints{2, 2}),      from(Ints{padding, padding}),
                            from(Ints{1, 1}),      from(false),
                            from(Ints{0, 0}),      from(int64_t(1)),
                            from(Flags(wanted, 3))};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::convolution_backward", "", stack, TORCH_ABI_VERSION));
    for (int i = 0; i < 3; ++i) {
      const Tensor made = torch::stable::detail::to<Tensor>(stack[i]);
      if (wanted[i]) grads[i] = i == 2 ? made : as_laid_out(made, i == 0 && channels_last);
    }
  }
  return {grads[0], grads[1], grads[2]};
}

}  // namespace

FASTDA_CPU_LIBRARY(m) {
  register_refiner_conv<RefinerConv>(m);
  m.impl("conv2d", TORCH_BOX(&conv2d<RefinerConv>));
  m.impl("conv2d_backward", TORCH_BOX(&conv2d_backward<RefinerConv>));
  m.impl("conv2d_max_pool", TORCH_BOX(&conv2d_max_pool<RefinerConv>));
  m.impl("conv2d_max_pool_backward", TORCH_BOX(&conv2d_max_pool_backward<RefinerConv>));
  m.impl("conv2d_stride2", TORCH_BOX(&conv2d_stride2));
  m.impl("conv2d_stride2_backward", TORCH_BOX(&conv2d_stride2_backward));
}

}  // namespace fastda::cpu
