// Convolutions against double loops, each way of convolving.
#pragma once
#include <initializer_list>
#include <map>
#include <string>

#include "checks.h"

namespace fastda::harness {

using namespace cpu;

constexpr double slope = 0.25;  // of every ReLU
inline double masked(double value, const Image* mask, int64_t n, int64_t c, int64_t h, int64_t w) {
  return mask == nullptr || mask->at(n, c, h, w) > 0 ? value : slope * value;
}

// sum over c and taps of filter(k, c, i, j) x(n, c, s h + i - p, s w + j - p), s the stride
template <typename F, typename X>
inline double convolved(const ConvProblem& p, F&& filter, X&& x, int64_t n, int64_t k, int64_t h,
                        int64_t w) {
  double sum = 0;
  for (int64_t i = 0; i < p.kernel; ++i) {
    for (int64_t j = 0; j < p.kernel; ++j) {
      const int64_t y = p.stride * h + i - p.padding, z = p.stride * w + j - p.padding;
      if (y < 0 || y >= p.height || z < 0 || z >= p.width) continue;
      for (int64_t c = 0; c < p.in_channels; ++c) sum += filter(k, c, i, j) * x(n, c, y, z);
    }
  }
  return sum;
}

inline bool run(const ConvKernels& kernels, ConvArgs args) {
  const Memory prepared(kernels.prepared_bytes(args));
  kernels.prepare(args, prepared.get());
  args.prepared = prepared.get();
  const Memory scratch(kernels.conv_scratch_bytes(args));
  bool finite = true;
  for (int64_t task = 0; task < kernels.conv_tasks(args); ++task)
    finite &= kernels.conv(args, task, scratch.get());
  return finite;
}

inline bool run(const ConvKernels& kernels, FilterGradArgs args, void* d_bias) {
  const Memory prepared(kernels.grad_prepared_bytes ? kernels.grad_prepared_bytes(args) : 0);
  if (kernels.prepare_grad) kernels.prepare_grad(args, prepared.get());
  args.prepared = prepared.get();
  const int64_t bytes = kernels.sum_bytes(args), chunks = kernels.chunks(args);
  const Memory sums(bytes * chunks), scratch(kernels.filter_grad_scratch_bytes(args));
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    kernels.filter_grad(args, chunk, static_cast<char*>(sums.get()) + chunk * bytes, scratch.get());
  return kernels.combine(args, sums.get(), d_bias);
}

struct Method {
  const char* name;
  const ConvKernels* kernels;
};
inline std::vector<Method> methods_for(const ConvProblem& p, bool contiguous) {
  std::vector<Method> serving;
  if (p.stride > 1) {
    const ConvKernels& kernels = winograd_stride2_kernels();
    if (kernels.serves && kernels.serves(p)) serving.push_back({"winograd_stride2", &kernels});
    return serving;
  }
  for (const Method& m :
       {Method{"direct", &direct_kernels()}, Method{"winograd_tiles", &winograd_tiles_kernels()},
        Method{"winograd_panels", &winograd_panels_kernels()},
        Method{"winograd_large", &winograd_large_kernels()},
        Method{"winograd_5x5", &winograd_5x5_kernels()},
        Method{"winograd_5x5_transposed", &winograd_5x5_transposed_kernels()},
        Method{"winograd_2x2", &winograd_2x2_kernels()}, Method{"first_3x3", &first_3x3_kernels()},
        Method{"first_5x5", &first_5x5_kernels()}, Method{"first_large", &first_large_kernels()},
        Method{"narrow", &narrow_kernels()}})
    if (m.kernels->serves && m.kernels->serves(p)) serving.push_back(m);
  for (const Method& m :
       {Method{"planes", &planes_kernels()}, Method{"pointwise", &pointwise_kernels()}})
    if (contiguous && m.kernels->serves(p)) serving.push_back(m);
  return serving;
}

inline std::map<std::string, int> served;

inline void check_convolution(const ConvProblem& p, bool x_channels_last, bool out_channels_last,
                              bool fused, bool rotated) {
  const int64_t height = p.out_height(), width = p.out_width();
  const auto input = [&] {
    return Image(p.dtype, p.batch, p.in_channels, p.height, p.width, x_channels_last);
  };
  const auto output = [&] {
    return Image(p.dtype, p.batch, p.out_channels, height, width, out_channels_last);
  };
  Image x = input(), x_mask = input();
  Image residual = output(), residual_mask = output(), out_mask = output(), out = output();
  Image filter(p.dtype, p.out_channels, p.in_channels, p.kernel, p.kernel);
  Image bias(p.dtype, 1, p.out_channels, 1, 1);
  for (Image* i : {&x, &x_mask, &residual, &residual_mask, &out_mask, &bias}) i->fill();
  filter.fill(1 / std::sqrt(double(p.in_channels * p.kernel * p.kernel)));

  ConvArgs args{};
  static_cast<ConvProblem&>(args) = p;
  args.x_channels_last = x_channels_last;
  args.out_channels_last = out_channels_last;
  args.x = x.view();
  args.filter = filter.view();
  args.out = out.view();
  const int64_t last = p.kernel - 1;
  if (rotated) {
    const View& f = filter.view();
    char* end = static_cast<char*>(f.data) + last * (f.h + f.w) * size_of(p.dtype);
    args.filter = {end, f.n, f.c, -f.h, -f.w};
  }
  if (fused) {
    args.x_mask = x_mask.view();
    args.bias = bias.data();
    args.residual = residual.view();
    args.residual_mask = residual_mask.view();
    args.relu = true;
    args.negative_slope = slope;
    args.out_mask = out_mask.view();
  }
  std::vector<double> expected;
  for (int64_t n = 0; n < p.batch; ++n) {
    for (int64_t k = 0; k < p.out_channels; ++k) {
      for (int64_t h = 0; h < height; ++h) {
        for (int64_t w = 0; w < width; ++w) {
          double y = convolved(
              p,
              [&](int64_t k, int64_t c, int64_t i, int64_t j) {
                return rotated ? filter.at(k, c, last - i, last - j) : filter.at(k, c, i, j);
              },
              [&](int64_t n, int64_t c, int64_t h, int64_t w) {
                return masked(x.at(n, c, h, w), fused ? &x_mask : nullptr, n, c, h, w);
              },
              n, k, h, w);
          if (fused) {
            y += bias.entry(k) + masked(residual.at(n, k, h, w), &residual_mask, n, k, h, w);
            y = masked(y > 0 ? y : slope * y, &out_mask, n, k, h, w);
          }
          expected.push_back(y);
        }
      }
    }
  }
  for (const Method& method : methods_for(p, !x_channels_last && !out_channels_last)) {
    char what[200];
    std::snprintf(what, sizeof what, "%s %s (%d, %d -> %d, %d, %d x %d, padding %d) %d%d%d%d",
                  method.name, name_of(p.dtype), int(p.batch), int(p.in_channels),
                  int(p.out_channels), int(p.kernel), int(p.height), int(p.width), int(p.padding),
                  x_channels_last, out_channels_last, fused, rotated);
    for (int64_t i = 0; i < out.size(); ++i) out.put(i, 7);
    require("a finite convolution came out as not finite", run(*method.kernels, args));
    compare(what, out.values(), expected, tolerance_of(p.dtype));
    ++served[method.name];
    if (method.kernels->tile == nullptr) continue;
    const double kept = x.entry(0);
    x.put(0, std::numeric_limits<double>::infinity());
    if (!fused) require("what is not finite went by unseen", !run(*method.kernels, args));
    x.put(0, kept);
  }
}

inline void check_filter_gradient(const ConvProblem& p, bool x_channels_last,
                                  bool grad_channels_last, bool with_mask) {
  Image x(p.dtype, p.batch, p.in_channels, p.height, p.width, x_channels_last);
  const int64_t height = p.out_height(), width = p.out_width();
  Image grad(p.dtype, p.batch, p.out_channels, height, width, grad_channels_last);
  Image mask(p.dtype, p.batch, p.out_channels, height, width, grad_channels_last);
  Image d_filter(p.dtype, p.out_channels, p.in_channels, p.kernel, p.kernel);
  Image d_bias(p.dtype, 1, p.out_channels, 1, 1);
  for (Image* i : {&x, &grad, &mask}) i->fill();
  FilterGradArgs args{};
  static_cast<ConvProblem&>(args) = p;
  args.x_channels_last = x_channels_last;
  args.grad_channels_last = grad_channels_last;
  args.x = x.view();
  args.grad = grad.view();
  if (with_mask) args.grad_mask = mask.view();
  args.negative_slope = slope;
  args.d_filter = d_filter.view();

  std::vector<double> filter(size_t(d_filter.size()));
  std::vector<double> bias(size_t(p.out_channels)), magnitudes = bias;
  const Image* m = with_mask ? &mask : nullptr;
  for (int64_t n = 0; n < p.batch; ++n) {
    for (int64_t k = 0; k < p.out_channels; ++k) {
      for (int64_t h = 0; h < height; ++h) {
        for (int64_t w = 0; w < width; ++w) {
          const double g = masked(grad.at(n, k, h, w), m, n, k, h, w);
          bias[size_t(k)] += g;
          magnitudes[size_t(k)] += std::abs(g);
          double* to = filter.data() + k * p.in_channels * p.kernel * p.kernel;
          for (int64_t c = 0; c < p.in_channels; ++c) {
            for (int64_t i = 0; i < p.kernel; ++i) {
              for (int64_t j = 0; j < p.kernel; ++j, ++to) {
                const int64_t y = p.stride * h + i - p.padding, z = p.stride * w + j - p.padding;
                if (y >= 0 && y < p.height && z >= 0 && z < p.width) *to += g * x.at(n, c, y, z);
              }
            }
          }
        }
      }
    }
  }
  for (const Method& method : methods_for(p, !x_channels_last && !grad_channels_last)) {
    if (method.kernels->chunks == nullptr) continue;
    char what[200];
    std::snprintf(what, sizeof what,
                  "%s gradient %s (%d, %d -> %d, %d, %d x %d, padding %d) %d%d%d", method.name,
                  name_of(p.dtype), int(p.batch), int(p.in_channels), int(p.out_channels),
                  int(p.kernel), int(p.height), int(p.width), int(p.padding), x_channels_last,
                  grad_channels_last, with_mask);
    require("a finite gradient came out as not finite", run(*method.kernels, args, d_bias.data()));
    compare(what, d_filter.values(), filter, 2 * tolerance_of(p.dtype));
    compare(what, d_bias.values(), bias, tolerance_of(p.dtype), magnitudes);
  }
}

// The data gradient with a stride.
inline void check_data_gradient(const ConvProblem& p, bool channels_last) {
  const ConvKernels& kernels = winograd_stride2_data_kernels();
  if (kernels.serves == nullptr || !kernels.serves(p)) return;
  const int64_t height = p.out_height(), width = p.out_width();
  Image grad(p.dtype, p.batch, p.out_channels, height, width, channels_last);
  Image d_x(p.dtype, p.batch, p.in_channels, p.height, p.width, channels_last);
  Image filter(p.dtype, p.out_channels, p.in_channels, p.kernel, p.kernel);
  grad.fill();
  filter.fill(1 / std::sqrt(double(p.out_channels * p.kernel * p.kernel / 4)));
  ConvArgs args{};
  static_cast<ConvProblem&>(args) = p;
  args.x_channels_last = args.out_channels_last = channels_last;
  args.x = grad.view();
  args.filter = filter.view();
  args.out = d_x.view();
  std::vector<double> expected;
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t c = 0; c < p.in_channels; ++c)
      for (int64_t h = 0; h < p.height; ++h)
        for (int64_t w = 0; w < p.width; ++w) {
          double sum = 0;
          for (int64_t i = 0; i < p.kernel; ++i)
            for (int64_t j = 0; j < p.kernel; ++j) {
              const int64_t y = h + p.padding - i, z = w + p.padding - j;
              if (y < 0 || z < 0 || y % 2 || z % 2 || y / 2 >= height || z / 2 >= width) continue;
              for (int64_t k = 0; k < p.out_channels; ++k)
                sum += grad.at(n, k, y / 2, z / 2) * filter.at(k, c, i, j);
            }
          expected.push_back(sum);
        }
  for (int64_t i = 0; i < d_x.size(); ++i) d_x.put(i, 7);
  require("a finite data gradient came out as not finite", run(kernels, args));
  compare("winograd_stride2_data", d_x.values(), expected, tolerance_of(p.dtype));
  ++served["winograd_stride2_data"];
}

// What one convolution's gradient makes of another's, in a window of rows, against the two whole.
inline void check_band(DType dtype) {
  const ConvProblem p{dtype, 1, 16, 20, 1400, 20, 3, 1}, back{dtype, 1, 20, 16, 1400, 20, 3, 1};
  const ConvKernels& kernels = winograd_tiles_kernels();
  if (kernels.band == nullptr || !kernels.serves(p)) return;
  Image grad(dtype, 1, 16, p.height, p.width), x(dtype, 1, 16, p.height, p.width);
  Image inner_mask(dtype, 1, 20, p.height, p.width, true);
  Image inner(dtype, 1, 20, p.height, p.width, true);
  Image weight1(dtype, 20, 16, 3, 3), weight2(dtype, 16, 20, 3, 3);
  for (Image* i : {&grad, &x, &inner_mask}) i->fill();
  for (Image* i : {&weight1, &weight2}) i->fill(0.1);
  const auto args_of = [&](const ConvProblem& problem, const Image& filter, bool last) {
    ConvArgs args{};
    static_cast<ConvProblem&>(args) = problem;
    args.x_channels_last = !last;
    args.out_channels_last = last;
    args.filter = filter.view();
    return args;
  };
  ConvArgs between = args_of(p, weight1, true), to_input = args_of(back, weight2, false);
  between.x = grad.view();
  between.out_mask = inner_mask.view();
  FilterGradArgs to_filter{};
  static_cast<ConvProblem&>(to_filter) = p;
  to_filter.grad_channels_last = true;
  to_filter.x = x.view();
  std::vector<double> results[2][3];
  for (const bool band : {false, true}) {
    Image d_x(dtype, 1, 16, p.height, p.width), d_bias(dtype, 1, 20, 1, 1);
    Image d_filter(dtype, 20, 16, 3, 3);
    to_input.out = d_x.view();
    to_filter.d_filter = d_filter.view();
    if (band) {
      const int64_t bytes = kernels.band_scratch_bytes(between, to_input, to_filter);
      require("the window of rows is not worthwhile here: nothing was checked", bytes > 0);
      if (bytes == 0) return;
      const Memory first(kernels.prepared_bytes(between)), second(kernels.prepared_bytes(to_input));
      kernels.prepare(between, first.get());
      kernels.prepare(to_input, second.get());
      between.prepared = first.get();
      to_input.prepared = second.get();
      const int64_t chunks = kernels.chunks(to_filter), sum = kernels.sum_bytes(to_filter);
      const Memory sums(chunks * sum), scratch(bytes);
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        require("a finite window came out as not finite",
                kernels.band(between, to_input, to_filter, chunk,
                             static_cast<char*>(sums.get()) + chunk * sum, scratch.get()));
      kernels.combine(to_filter, sums.get(), d_bias.data());
    } else {
      ConvArgs made = between, passed = to_input;
      made.out = inner.view();
      passed.x = inner.view();
      FilterGradArgs summed = to_filter;
      summed.grad = inner.view();
      run(direct_kernels(), made);
      run(direct_kernels(), passed);
      run(direct_kernels(), summed, d_bias.data());
    }
    results[band][0] = d_x.values();
    results[band][1] = d_filter.values();
    results[band][2] = d_bias.values();
  }
  for (int i = 0; i < 3; ++i)
    compare("window of rows", results[1][i], results[0][i], 3 * tolerance_of(dtype));
}

}  // namespace fastda::harness
