#include <cmath>
#include <vector>

#include "cpu/kernels/norm.h"
#include "host/tensor.h"

namespace fastda::cpu {
namespace {

// Rows of channels are taken up in pieces of this many, and their sums added in the order of the
// pieces, so that they are the same bit for bit at any number of threads.
constexpr int64_t piece_rows = 1024;
constexpr int64_t grain = 1 << 15;  // entries that are worth another thread
// Results of so many bytes go past the cache (measured with a reader behind them), where few lines
// are written half: rows that begin with a line each, planes of some lines.
constexpr int64_t large = 6 << 20;
constexpr int64_t lines_apart = 16, least_plane = 128;

// How the statistics lie in the images: `groups` times `channels` of them, each over `rows` values.
// An image's own statistics make a group of every image.
struct Layout {
  bool by_rows;  // rows of all channels; otherwise planes of one
  int64_t groups, images, channels, pixels;
  int64_t rows() const { return images * pixels; }
  int64_t statistics() const { return groups * channels; }
};

Tensor dense(const Tensor& t, bool channels_last) {
  return torch::stable::contiguous(
      t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}
Layout layout_of(const Tensor& x, bool channels_last, bool per_image) {
  const int64_t n = x.size(0);
  // One pixel: both formats are the same, and rows are longer.
  return {.by_rows = x.size(1) > 1 && (channels_last || x.size(2) * x.size(3) == 1),
          .groups = per_image ? n : 1,
          .images = per_image ? 1 : n,
          .channels = x.size(1),
          .pixels = x.size(2) * x.size(3)};
}
void check_image(const Tensor& t, const Tensor& x, const char* op) {
  bool same = t.dim() == 4 && t.scalar_type() == x.scalar_type();
  for (int64_t d = 0; same && d < 4; ++d) same = t.size(d) == x.size(d);
  FASTDA_CHECK(same, op, ": every image must have the shape and dtype of x");
}

// One value a channel as double; what is not given is `otherwise`.
std::vector<double> per_channel(const MaybeTensor& t, int64_t count, double otherwise,
                                const char* op) {
  if (!t) return std::vector<double>(size_t(count), otherwise);
  FASTDA_CHECK(t->dim() == 1 && t->size(0) == count, op,
               ": what is given for channels must have one value of each");
  const Tensor dense = torch::stable::contiguous(*t);
  if (t->scalar_type() == ScalarType::Float) {
    const float* p = const_data<float>(dense);
    return {p, p + count};
  }
  const Tensor wide = torch::stable::to(dense, ScalarType::Double);
  const double* p = const_data<double>(wide);
  return {p, p + count};
}

Norm norm_of(const Tensor& x, const Layout& l, std::optional<double> negative_slope,
             const char* op) {
  Norm norm{};
  norm.dtype = dtype_of(x, op);
  norm.activation = !negative_slope        ? Activation::none
                    : *negative_slope == 0 ? Activation::relu
                                           : Activation::leaky_relu;
  norm.negative_slope = negative_slope.value_or(1.0);
  norm.x = x.const_data_ptr();
  norm.past_the_cache = x.numel() * x.element_size() >= large &&
                        (l.by_rows ? l.channels % lines_apart == 0 : l.pixels >= least_plane);
  return norm;
}

// Constants in the accumulator type, so that each kind lies behind the other.
class Constants {
 public:
  Constants(DType dtype, int64_t kinds, int64_t count)
      : double_(dtype == DType::f64),
        count_(count),
        bytes_(size_t(kinds * count * (double_ ? 8 : 4))) {}
  const void* of(int64_t kind) const { return bytes_.data() + size_t(kind * count_ * width()); }
  // Returns what is left of the value by rounding it.
  double set(int64_t kind, int64_t i, double value) {
    char* p = bytes_.data() + size_t((kind * count_ + i) * width());
    if (double_) {
      *reinterpret_cast<double*>(p) = value;
      return 0;
    }
    const float rounded = float(value);
    *reinterpret_cast<float*>(p) = rounded;
    return std::isfinite(rounded) ? value - double(rounded) : 0;
  }

 private:
  int64_t width() const { return double_ ? 8 : 4; }
  bool double_;
  int64_t count_;
  std::vector<char> bytes_;
};

// first(run, piece) over everything that a statistic is taken of, settle(first statistic, count),
// then second(run): for planes statistic by statistic, since one's images may fit the cache; for rows
// a group at a time, the second time from the end, which the cache still has.
template <typename Sums, typename First, typename Settle, typename Second>
void two_passes(const Layout& l, First&& first, Settle&& settle, Second&& second) {
  const int64_t rows = l.rows();
  if (!l.by_rows) {
    torch::stable::parallel_for(
        0, l.statistics(), 1 + grain / (1 + rows), [&](int64_t begin, int64_t end) {
          Sums total(1);
          for (int64_t s = begin; s < end; ++s) {
            const int64_t group = s / l.channels, channel = s % l.channels;
            const int64_t plane = group * l.images * l.channels + channel;
            const NormRun run{plane * l.pixels, l.pixels, 1, s, l.images, l.channels * l.pixels};
            total.clear();
            first(run, total);
            settle(s, total);
            second(run);
          }
        });
    return;
  }
  const int64_t pieces = (rows + piece_rows - 1) / piece_rows;
  const int64_t a_thread = 1 + grain / (1 + piece_rows * l.channels);
  const auto run = [&](int64_t group, int64_t piece) -> NormRun {
    const int64_t row = piece * piece_rows;
    return {(group * rows + row) * l.channels,
            rows - row < piece_rows ? rows - row : piece_rows,
            l.channels,
            group * l.channels,
            1,
            0};
  };
  const auto do_group = [&](int64_t group) {
    std::vector<Sums> parts(size_t(pieces), Sums(l.channels));
    torch::stable::parallel_for(0, pieces, a_thread, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) first(run(group, i), parts[size_t(i)]);
    });
    for (int64_t i = 1; i < pieces; ++i) parts[0].add(parts[size_t(i)]);
    settle(group * l.channels, parts[0]);
    torch::stable::parallel_for(0, pieces, a_thread, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) second(run(group, pieces - 1 - i));
    });
  };
  if (pieces == 1)
    torch::stable::parallel_for(0, l.groups, 1 + grain / (1 + rows * l.channels),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t group = begin; group < end; ++group) do_group(group);
                                });
  else
    for (int64_t group = 0; group < l.groups; ++group) do_group(group);
}

// Of the channels of a run.
struct Moments {
  std::vector<double> mean, squares;
  int64_t count = 0;
  explicit Moments(int64_t channels) : mean(size_t(channels)), squares(size_t(channels)) {}
  void clear() { count = 0; }
  void add(const Moments& other) {
    const Merge merge(count, other.count);
    for (size_t c = 0; c < mean.size(); ++c)
      merge(mean[c], squares[c], other.mean[c], other.squares[c]);
    count += other.count;
  }
};
struct Gradients {
  std::vector<double> grads, products;
  explicit Gradients(int64_t channels) : grads(size_t(channels)), products(size_t(channels)) {}
  void clear() {
    for (double& g : grads) g = 0;
    for (double& p : products) p = 0;
  }
  void add(const Gradients& other) {
    for (size_t c = 0; c < grads.size(); ++c) {
      grads[c] += other.grads[c];
      products[c] += other.products[c];
    }
  }
};

enum ForwardConstant { center, scale, shift, forward_constants };
enum BackwardConstant { slope = forward_constants, offset, backward_constants };

std::tuple<Tensor, Tensor, Tensor> norm_act(const Tensor& x_any, const MaybeTensor& weight,
                                            const MaybeTensor& bias,
                                            const MaybeTensor& running_mean,
                                            const MaybeTensor& running_var,
                                            const MaybeTensor& residual_any, bool per_image,
                                            double eps, std::optional<double> negative_slope) {
  const char* op = "norm_act";
  FASTDA_CHECK(
      x_any.dim() == 4 && bool(running_mean) == bool(running_var) && !(per_image && running_mean),
      op, ": x must be (N, C, H, W), with both running statistics or none");
  const bool last = prefers_channels_last(x_any);
  const Tensor x = dense(x_any, last);
  const Layout l = layout_of(x, last, per_image);
  MaybeTensor residual;
  if (residual_any) {
    check_image(*residual_any, x, op);
    residual = dense(*residual_any, last);
  }
  Tensor y = empty_image(x, x.size(1), x.scalar_type(), last);
  Norm norm = norm_of(x, l, negative_slope, op);
  norm.residual = residual ? residual->const_data_ptr() : nullptr;
  norm.y = y.mutable_data_ptr();

  const std::vector<double> w = per_channel(weight, l.channels, 1, op);
  const std::vector<double> b = per_channel(bias, l.channels, 0, op);
  const bool given = bool(running_mean);
  const std::vector<double> given_mean = per_channel(running_mean, l.channels, 0, op);
  const std::vector<double> given_var = per_channel(running_var, l.channels, 0, op);
  Tensor mean = empty(x, {l.statistics()}, ScalarType::Double);
  Tensor variance = empty(x, {l.statistics()}, ScalarType::Double);
  double *means = data<double>(mean), *variances = data<double>(variance);
  const auto set_all = [&](int64_t s, double m, double v) {
    means[s] = m;
    variances[s] = v;
  };
  if (given || x.numel() == 0)
    for (int64_t s = 0; s < l.statistics(); ++s)
      set_all(s, given_mean[size_t(s % l.channels)], given_var[size_t(s % l.channels)]);
  if (x.numel() == 0) return {y, mean, variance};

  Constants constants(norm.dtype, forward_constants, l.statistics());
  norm.center = constants.of(center);
  norm.scale = constants.of(scale);
  norm.shift = constants.of(shift);
  two_passes<Moments>(
      l,
      [&](const NormRun& run, Moments& total) {
        if (given) return;
        cpu::norm_kernels().moments(norm, run, total.mean.data(), total.squares.data());
        total.count = run.positions * run.planes;
      },
      [&](int64_t first, const Moments& total) {
        for (size_t i = 0; i < total.mean.size(); ++i) {
          const int64_t s = first + int64_t(i);
          const size_t c = size_t(s % l.channels);
          if (!given) set_all(s, total.mean[i], total.squares[i] / double(l.rows()));
          const double factor = w[c] / std::sqrt(variances[s] + eps);
          const double rest = constants.set(center, s, means[s]);
          constants.set(scale, s, factor);
          constants.set(shift, s, rest == 0 ? b[c] : b[c] - rest * factor);
        }
      },
      [&](const NormRun& run) { cpu::norm_kernels().normalize(norm, run); });
  return {y, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_backward(
    const Tensor& grad_any, const Tensor& x_any, const MaybeTensor& weight, const MaybeTensor& bias,
    const Tensor& mean, const Tensor& variance, const MaybeTensor& output_any, bool per_image,
    bool through_statistics, double eps, std::optional<double> negative_slope, bool need_x,
    bool need_weight, bool need_bias, bool need_residual) {
  const char* op = "norm_act_backward";
  FASTDA_CHECK(x_any.dim() == 4, op, ": x must be (N, C, H, W)");
  check_image(grad_any, x_any, op);
  const bool last = prefers_channels_last(x_any);
  const Tensor x = dense(x_any, last), grad = dense(grad_any, last);
  const Layout l = layout_of(x, last, per_image);
  MaybeTensor output;
  if (output_any) {
    check_image(*output_any, x, op);
    output = dense(*output_any, last);
  }
  const auto image = [&](bool need) {
    return need ? empty_image(x, x.size(1), x.scalar_type(), last) : empty(x, {0}, x.scalar_type());
  };
  Tensor d_x = image(need_x), d_residual = image(need_residual);
  Tensor d_weight = empty(x, {need_weight ? l.channels : 0}, wide(x));
  Tensor d_bias = empty(x, {need_bias ? l.channels : 0}, wide(x));
  Norm norm = norm_of(x, l, negative_slope, op);
  norm.grad = grad.const_data_ptr();
  norm.output = output ? output->const_data_ptr() : nullptr;
  norm.d_x = need_x ? d_x.mutable_data_ptr() : nullptr;
  norm.d_residual = need_residual ? d_residual.mutable_data_ptr() : nullptr;
  norm.through_statistics = through_statistics;

  const std::vector<double> w = per_channel(weight, l.channels, 1, op);
  const std::vector<double> b = per_channel(bias, l.channels, 0, op);
  const std::vector<double> means = per_channel(mean, l.statistics(), 0, op);
  const std::vector<double> variances = per_channel(variance, l.statistics(), 0, op);
  Constants constants(norm.dtype, backward_constants, l.statistics());
  norm.center = constants.of(center);
  norm.scale = constants.of(scale);
  norm.shift = constants.of(shift);
  norm.slope = constants.of(slope);
  norm.offset = constants.of(offset);
  std::vector<double> inverse(means.size()), rest(means.size());
  std::vector<double> by_weight(means.size()), by_bias(means.size());
  for (size_t s = 0; s < means.size(); ++s) {
    const size_t c = s % size_t(l.channels);
    inverse[s] = 1 / std::sqrt(variances[s] + eps);
    const double factor = w[c] / std::sqrt(variances[s] + eps);
    rest[s] = constants.set(center, int64_t(s), means[s]);
    constants.set(scale, int64_t(s), factor);
    constants.set(shift, int64_t(s), rest[s] == 0 ? b[c] : b[c] - rest[s] * factor);
  }
  const bool sums = need_weight || need_bias || need_residual || (need_x && through_statistics);
  if (x.numel() > 0)
    two_passes<Gradients>(
        l,
        [&](const NormRun& run, Gradients& total) {
          if (sums) cpu::norm_kernels().sums(norm, run, total.grads.data(), total.products.data());
        },
        [&](int64_t first, const Gradients& total) {
          for (size_t i = 0; i < total.grads.size(); ++i) {
            const size_t s = size_t(first) + i, c = s % size_t(l.channels);
            const double count = double(l.rows());
            by_bias[s] = total.grads[i];
            by_weight[s] = (total.products[i] - rest[s] * total.grads[i]) * inverse[s];
            const double factor = w[c] * inverse[s];
            const double tilt = -factor * (by_weight[s] / count) * inverse[s];
            constants.set(slope, int64_t(s), tilt);
            constants.set(offset, int64_t(s), -factor * (by_bias[s] / count) - tilt * rest[s]);
          }
        },
        [&](const NormRun& run) {
          if (need_x) cpu::norm_kernels().input_gradient(norm, run);
        });
  const auto write = [&](const Tensor& t, const std::vector<double>& by_group) {
    for (int64_t c = 0; c < t.numel(); ++c) {
      double sum = 0;
      for (int64_t s = c; s < l.statistics(); s += l.channels) sum += by_group[size_t(s)];
      if (t.scalar_type() == ScalarType::Double)
        data<double>(t)[c] = sum;
      else
        data<float>(t)[c] = float(sum);
    }
  };
  write(d_weight, by_weight);
  write(d_bias, by_bias);
  return {d_x, d_weight, d_bias, d_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastda, CPU, m) {
  m.impl("norm_act", TORCH_BOX(&norm_act));
  m.impl("norm_act_backward", TORCH_BOX(&norm_act_backward));
}

}  // namespace fastda::cpu
