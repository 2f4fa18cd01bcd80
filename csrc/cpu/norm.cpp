#include "host/norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/device.h"
#include "cpu/kernels/norm.h"

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

// One value a channel as double; what is not given is `otherwise`.
std::vector<double> doubles(const MaybeTensor& t, int64_t count, double otherwise) {
  if (!t) return std::vector<double>(size_t(count), otherwise);
  if (t->scalar_type() == ScalarType::Float) {
    const float* p = const_data<float>(*t);
    return {p, p + count};
  }
  const Tensor wide = torch::stable::to(*t, ScalarType::Double);
  const double* p = const_data<double>(wide);
  return {p, p + count};
}

Norm norm_of(const Tensor& x, const NormLayout& l, std::optional<double> negative_slope,
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
void two_passes(const NormLayout& l, First&& first, Settle&& settle, Second&& second) {
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

struct NormAct : Device {
  using Device::Device;

  void forward(const NormForward& f) const {
    const NormLayout& l = f.layout;
    Norm norm = norm_of(f.x, l, f.negative_slope, f.op);
    norm.residual = f.residual ? f.residual->const_data_ptr() : nullptr;
    norm.y = f.y.mutable_data_ptr();

    const std::vector<double> w = doubles(f.weight, l.channels, 1);
    const std::vector<double> b = doubles(f.bias, l.channels, 0);
    const bool given = bool(f.running_mean);
    double *means = data<double>(f.mean), *variances = data<double>(f.variance);
    if (given) {
      const std::vector<double> m = doubles(f.running_mean, l.channels, 0);
      const std::vector<double> v = doubles(f.running_var, l.channels, 0);
      std::copy(m.begin(), m.end(), means);
      std::copy(v.begin(), v.end(), variances);
    }
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
            if (!given) {
              means[s] = total.mean[i];
              variances[s] = total.squares[i] / double(l.rows());
            }
            const double factor = w[c] / std::sqrt(variances[s] + f.eps);
            const double rest = constants.set(center, s, means[s]);
            constants.set(scale, s, factor);
            constants.set(shift, s, rest == 0 ? b[c] : b[c] - rest * factor);
          }
        },
        [&](const NormRun& run) { cpu::norm_kernels().normalize(norm, run); });
  }

  void backward(const NormBackward& g) const {
    const NormLayout& l = g.layout;
    Norm norm = norm_of(g.x, l, g.negative_slope, g.op);
    norm.grad = g.grad.const_data_ptr();
    norm.output = g.output ? g.output->const_data_ptr() : nullptr;
    norm.d_x = g.need_x ? g.d_x.mutable_data_ptr() : nullptr;
    norm.d_residual = g.need_residual ? g.d_residual.mutable_data_ptr() : nullptr;
    norm.through_statistics = g.through_statistics;

    const std::vector<double> w = doubles(g.weight, l.channels, 1);
    const std::vector<double> b = doubles(g.bias, l.channels, 0);
    const std::vector<double> means = doubles(g.mean, l.statistics(), 0);
    const std::vector<double> variances = doubles(g.variance, l.statistics(), 0);
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
      inverse[s] = 1 / std::sqrt(variances[s] + g.eps);
      const double factor = w[c] / std::sqrt(variances[s] + g.eps);
      rest[s] = constants.set(center, int64_t(s), means[s]);
      constants.set(scale, int64_t(s), factor);
      constants.set(shift, int64_t(s), rest[s] == 0 ? b[c] : b[c] - rest[s] * factor);
    }
    const bool sums =
        g.need_weight || g.need_bias || g.need_residual || (g.need_x && g.through_statistics);
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
          if (g.need_x) cpu::norm_kernels().input_gradient(norm, run);
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
    write(g.d_weight, by_weight);
    write(g.d_bias, by_bias);
  }
};

}  // namespace

FASTDA_CPU_LIBRARY(m) { register_norm<NormAct>(m); }

}  // namespace fastda::cpu
