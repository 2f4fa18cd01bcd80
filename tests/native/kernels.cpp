// The CPU kernels without torch, every table of one instruction set against double loops. Which one
// FASTDA_CPU_ISA says; no argument, one line for each check that fails, and the count of all.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "common/isa.h"
#include "cpu/conv/problem.h"
#include "cpu/kernels/grad_reverse.h"
#include "cpu/kernels/patch_loss.h"
#include "cpu/kernels/peak.h"

using namespace fastda;
using namespace fastda::cpu;

namespace {

int checks = 0, failures = 0;

// Relative to the norm of what is expected.
void compare(const char* what, const std::vector<double>& got, const std::vector<double>& expected,
             double tolerance) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double d = got[i] - expected[i];
    error += d * d;
    norm += expected[i] * expected[i];
  }
  ++checks;
  if (got.size() == expected.size() && std::sqrt(error) <= tolerance * std::sqrt(norm)) return;
  ++failures;
  std::printf("%s: relative error %.2e, allowed %.2e\n", what, std::sqrt(error / norm), tolerance);
}
void require(const char* what, bool right) {
  ++checks;
  failures += !right;
  if (!right) std::printf("%s\n", what);
}

double tolerance_of(DType dtype) {
  switch (dtype) {
    case DType::f64: return 3e-15;
    case DType::bf16: return 8e-3;
    case DType::f16: return 1e-3;
    default: return 2e-6;
  }
}
const char* name_of(DType dtype) {
  constexpr const char* names[] = {"float32", "float64", "bfloat16", "float16"};
  return names[int(dtype)];
}
constexpr DType dtypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

uint64_t state = 1;
double random_number() {  // about normal: the sum of four uniform ones
  double sum = 0;
  for (int i = 0; i < 4; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    sum += double(state >> 11) * 0x1p-53 - 0.5;
  }
  return sum * 1.7;
}

// Memory at the start of a cache line.
class Memory {
 public:
  explicit Memory(int64_t bytes) : data_(std::aligned_alloc(64, size_t((bytes + 127) / 64 * 64))) {
    std::memset(data_, 0xff, size_t((bytes + 127) / 64 * 64));  // NaN in every type
  }
  Memory(const Memory&) = delete;
  Memory(Memory&& other) : data_(other.data_) { other.data_ = nullptr; }
  ~Memory() { std::free(data_); }
  void* get() const { return data_; }

 private:
  void* data_;
};

// A tensor (n, c, h, w) in an element type and a layout.
class Image {
 public:
  Image(DType dtype, int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last = false)
      : dtype_(dtype), n_(n), c_(c), h_(h), w_(w), memory_(n * c * h * w * size_of(dtype)) {
    if (channels_last) {
      view_ = {memory_.get(), h * w * c, 1, w * c, c};
    } else {
      view_ = {memory_.get(), c * h * w, h * w, w, 1};
    }
  }
  Image& fill(double gain = 1) {
    for (int64_t i = 0; i < size(); ++i) put(i, gain * random_number());
    decode();
    return *this;
  }
  // Reads all of it, once, for at().
  void decode() {
    decoded_.resize(size_t(size()));
    for (int64_t i = 0; i < size(); ++i) decoded_[size_t(i)] = entry(i);
  }
  int64_t size() const { return n_ * c_ * h_ * w_; }
  const View& view() const { return view_; }
  void* data() const { return memory_.get(); }
  void put(int64_t i, double value) {
    dispatch(dtype_, [&]<typename T>() {
      store(static_cast<T*>(memory_.get()) + i, typename Acc<T>::type(value));
    });
  }
  double at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return decoded_[size_t(n * view_.n + c * view_.c + h * view_.h + w * view_.w)];
  }
  double entry(int64_t i) const {
    double value = 0;
    dispatch(dtype_,
             [&]<typename T>() { value = double(load(static_cast<const T*>(memory_.get()) + i)); });
    return value;
  }
  std::vector<double> values() {  // in the order (n, c, h, w)
    decode();
    std::vector<double> all;
    all.reserve(size_t(size()));
    for (int64_t n = 0; n < n_; ++n)
      for (int64_t c = 0; c < c_; ++c)
        for (int64_t h = 0; h < h_; ++h)
          for (int64_t w = 0; w < w_; ++w) all.push_back(at(n, c, h, w));
    return all;
  }

 private:
  DType dtype_;
  int64_t n_, c_, h_, w_;
  Memory memory_;
  View view_;
  std::vector<double> decoded_;
};

double masked(double value, const Image* mask, int64_t n, int64_t c, int64_t h, int64_t w) {
  return mask == nullptr || mask->at(n, c, h, w) > 0 ? value : 0;
}

// sum over c and taps of filter(k, c, i, j) x(n, c, h + i - p, w + j - p)
template <typename F, typename X>
double convolved(const ConvProblem& p, F&& filter, X&& x, int64_t n, int64_t k, int64_t h,
                 int64_t w) {
  double sum = 0;
  for (int64_t i = 0; i < p.kernel; ++i) {
    for (int64_t j = 0; j < p.kernel; ++j) {
      const int64_t y = h + i - p.padding, z = w + j - p.padding;
      if (y < 0 || y >= p.height || z < 0 || z >= p.width) continue;
      for (int64_t c = 0; c < p.in_channels; ++c) sum += filter(k, c, i, j) * x(n, c, y, z);
    }
  }
  return sum;
}

bool run(const ConvKernels& kernels, ConvArgs args) {
  const Memory prepared(kernels.prepared_bytes(args));
  kernels.prepare(args, prepared.get());
  args.prepared = prepared.get();
  const Memory scratch(kernels.conv_scratch_bytes(args));
  bool finite = true;
  for (int64_t task = 0; task < kernels.conv_tasks(args); ++task)
    finite &= kernels.conv(args, task, scratch.get());
  return finite;
}

bool run(const ConvKernels& kernels, FilterGradArgs args, void* d_bias) {
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
std::vector<Method> methods_for(const ConvProblem& p) {
  std::vector<Method> serving;
  for (const Method& m :
       {Method{"direct", &direct_kernels()}, Method{"winograd_tiles", &winograd_tiles_kernels()},
        Method{"winograd_panels", &winograd_panels_kernels()},
        Method{"winograd_large", &winograd_large_kernels()},
        Method{"winograd_5x5", &winograd_5x5_kernels()},
        Method{"winograd_2x2", &winograd_2x2_kernels()}})
    if (m.kernels->serves && m.kernels->serves(p)) serving.push_back(m);
  return serving;
}

std::map<std::string, int> served;

void check_convolution(const ConvProblem& p, bool x_channels_last, bool out_channels_last,
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
            y = masked(y > 0 ? y : 0, &out_mask, n, k, h, w);
          }
          expected.push_back(y);
        }
      }
    }
  }
  for (const Method& method : methods_for(p)) {
    char what[200];
    std::snprintf(what, sizeof what, "%s %s (%d, %d -> %d, %d, %d x %d, padding %d) %d%d%d%d",
                  method.name, name_of(p.dtype), int(p.batch), int(p.in_channels),
                  int(p.out_channels), int(p.kernel), int(p.height), int(p.width), int(p.padding),
                  x_channels_last, out_channels_last, fused, rotated);
    for (int64_t i = 0; i < out.size(); ++i) out.put(i, 7);
    require("a finite convolution came out as not finite", run(*method.kernels, args));
    compare(what, out.values(), expected, tolerance_of(p.dtype));
    ++served[method.name];
    if (method.kernels == &direct_kernels()) continue;
    const double kept = x.entry(0);
    x.put(0, std::numeric_limits<double>::infinity());
    if (!fused) require("what is not finite went by unseen", !run(*method.kernels, args));
    x.put(0, kept);
  }
}

void check_filter_gradient(const ConvProblem& p, bool x_channels_last, bool grad_channels_last,
                           bool with_mask) {
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
  args.d_filter = d_filter.view();

  std::vector<double> filter(size_t(d_filter.size())), bias(size_t(p.out_channels));
  const Image* m = with_mask ? &mask : nullptr;
  for (int64_t n = 0; n < p.batch; ++n) {
    for (int64_t k = 0; k < p.out_channels; ++k) {
      for (int64_t h = 0; h < height; ++h) {
        for (int64_t w = 0; w < width; ++w) {
          const double g = masked(grad.at(n, k, h, w), m, n, k, h, w);
          bias[size_t(k)] += g;
          double* to = filter.data() + k * p.in_channels * p.kernel * p.kernel;
          for (int64_t c = 0; c < p.in_channels; ++c) {
            for (int64_t i = 0; i < p.kernel; ++i) {
              for (int64_t j = 0; j < p.kernel; ++j, ++to) {
                const int64_t y = h + i - p.padding, z = w + j - p.padding;
                if (y >= 0 && y < p.height && z >= 0 && z < p.width) *to += g * x.at(n, c, y, z);
              }
            }
          }
        }
      }
    }
  }
  for (const Method& method : methods_for(p)) {
    char what[200];
    std::snprintf(what, sizeof what,
                  "%s gradient %s (%d, %d -> %d, %d, %d x %d, padding %d) %d%d%d", method.name,
                  name_of(p.dtype), int(p.batch), int(p.in_channels), int(p.out_channels),
                  int(p.kernel), int(p.height), int(p.width), int(p.padding), x_channels_last,
                  grad_channels_last, with_mask);
    require("a finite gradient came out as not finite", run(*method.kernels, args, d_bias.data()));
    compare(what, d_filter.values(), filter, 2 * tolerance_of(p.dtype));
    compare(what, d_bias.values(), bias, tolerance_of(p.dtype));
  }
}

// What one convolution's gradient makes of another's, in a window of rows, against the two whole.
void check_band(DType dtype) {
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

double softplus(double y) { return std::fmax(y, 0) + std::log1p(std::exp(-std::fabs(y))); }
double sigmoid(double y) { return 1 / (1 + std::exp(-y)); }

struct Term {
  double loss, slope, right;
};
Term term_at(const PatchTerm& t, double z) {
  const double y = t.sign * z;
  const double right = t.sign * (z - t.threshold) < 0 ? 1 : 0;
  switch (t.formula) {
    case Formula::log: return {softplus(y), sigmoid(y) * t.sign, right};
    case Formula::log_smooth:
      return {t.hit * softplus(y) + t.miss * softplus(-y),
              (t.hit * sigmoid(y) - t.miss * sigmoid(-y)) * t.sign, right};
    case Formula::square: return {(z - t.target) * (z - t.target), 2 * (z - t.target), right};
    case Formula::hinge: return {std::fmax(0, 1 + y), 1 + y > 0 ? t.sign : 0, right};
    default: return {y, t.sign, right};
  }
}

void check_loss(DType dtype, Kind kind, bool real, double smoothing, bool channels_last,
                bool weighted) {
  constexpr int64_t N = 3, H = 9, W = 15, P = H * W;
  const PatchTerm term = term_of(kind, real, smoothing);
  const DType wide = dtype == DType::f64 ? DType::f64 : DType::f32;
  Image logits(dtype, N, term.pair ? 2 : 1, H, W, channels_last), weight(wide, N, 1, H, W);
  Image grad(wide, N, term.pair ? 2 : 1, H, W, channels_last), terms(wide, N, 1, H, W);
  logits.fill(3);
  weight.fill();
  for (int64_t i = 0; i < weight.size(); ++i)
    weight.put(i, weight.entry(i) > 0 ? weight.entry(i) : 0);
  const double factor = 0.37;
  PatchSide side{};
  side.dtype = dtype;
  side.term = term;
  side.logits = logits.data();
  side.image = logits.view().n;
  side.channel = logits.view().c;
  side.patch = logits.view().w;
  if (weighted) {
    side.weight = weight.data();
    side.weight_image = P;
    side.weight_patch = 1;
  }
  side.terms = terms.data();
  side.grad = grad.data();
  side.grad_image = grad.view().n;
  side.grad_channel = grad.view().c;
  side.grad_patch = grad.view().w;
  side.images = N;
  side.patches = P;
  side.factor = factor;
  const PatchLossKernels& kernels = patch_loss_kernels();
  // Two chunks, the second one of no round size.
  const PatchSums first = kernels.side(side, 0, 150), second = kernels.side(side, 150, N * P);
  std::vector<double> sums(2), expected_terms, expected_grad;
  double all_weights = 0;
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t i = 0; i < P; ++i) {
      const int64_t h = i / W, w = i % W;
      const double z =
          term.pair ? logits.at(n, 1, h, w) - logits.at(n, 0, h, w) : logits.at(n, 0, h, w);
      const Term t = term_at(term, z);
      const double by = weighted ? weight.entry(n * P + i) : 1;
      all_weights += weight.entry(n * P + i);
      sums[0] += by * t.loss;
      sums[1] += by * t.right;
      expected_terms.push_back(by * t.loss);
    }
  }
  for (int64_t n = 0; n < N; ++n)
    for (int c = 0; c < (term.pair ? 2 : 1); ++c)
      for (int64_t i = 0; i < P; ++i) {
        const int64_t h = i / W, w = i % W;
        const double z =
            term.pair ? logits.at(n, 1, h, w) - logits.at(n, 0, h, w) : logits.at(n, 0, h, w);
        const double slope = term_at(term, z).slope * factor;
        const double by = weighted ? weight.entry(n * P + i) : 1;
        expected_grad.push_back(term.pair && c == 0 ? -slope * by : slope * by);
      }
  const double tolerance = dtype == DType::f64 ? 1e-14 : 1e-6;
  compare("loss, right patches", {first.loss + second.loss, first.right + second.right}, sums,
          tolerance);
  compare("terms", terms.values(), expected_terms, tolerance);
  compare("gradient of logits", grad.values(), expected_grad, tolerance);
  side.weight = weight.data();
  side.weight_image = P;
  side.weight_patch = 1;
  compare("sum of weights", {kernels.weight_sum(side, 0, N * P)}, {all_weights}, tolerance);
}

void check_head(DType dtype, int64_t channels, bool channels_last) {
  constexpr int64_t N = 3, H = 7, W = 13, P = H * W;
  const DType wide = dtype == DType::f64 ? DType::f64 : DType::f32;
  Image x(dtype, N, channels, H, W, channels_last), grad(wide, N, channels, H, W, channels_last);
  Image weight(wide, 1, channels, 1, 1);
  x.fill();
  weight.fill(1 / std::sqrt(double(channels)));
  PatchHead head{};
  head.dtype = dtype;
  head.term = term_of(Kind::softmax, true, 0.1);
  head.x = x.data();
  head.image = x.view().n;
  head.channel = x.view().c;
  head.patch = x.view().w;
  head.weight = weight.data();
  head.bias = 0.25;
  head.grad = grad.data();
  head.grad_image = grad.view().n;
  head.grad_channel = grad.view().c;
  head.grad_patch = grad.view().w;
  head.images = N;
  head.patches = P;
  head.channels = channels;
  head.factor = 0.37;
  std::vector<double> weights(size_t(channels) + 1), expected(size_t(channels) + 1);
  const PatchLossKernels& kernels = patch_loss_kernels();
  const PatchSums got = kernels.head(head, 0, N * P, weights.data());
  double loss = 0;
  std::vector<double> slopes;
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t i = 0; i < P; ++i) {
      double z = head.bias;
      for (int64_t c = 0; c < channels; ++c) z += weight.entry(c) * x.at(n, c, i / W, i % W);
      const Term t = term_at(head.term, z);
      loss += t.loss;
      slopes.push_back(t.slope * head.factor);
      for (int64_t c = 0; c < channels; ++c)
        expected[size_t(c)] += slopes.back() * x.at(n, c, i / W, i % W);
      expected[size_t(channels)] += slopes.back();
    }
  }
  std::vector<double> expected_grad;
  for (int64_t n = 0; n < N; ++n)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < P; ++i)
        expected_grad.push_back(slopes[size_t(n * P + i)] * weight.entry(c));
  const double tolerance = dtype == DType::f64 ? 1e-14 : 2e-6;
  compare("head's loss", {got.loss}, {loss}, tolerance);
  compare("gradient of features", grad.values(), expected_grad, tolerance);
  compare("gradient of the head's weight and bias", weights, expected, tolerance);
}

void check_l1_and_scale(DType dtype) {
  constexpr int64_t size = 1003;
  const DType wide = dtype == DType::f64 ? DType::f64 : DType::f32;
  Image a(dtype, 1, 1, 1, size), b(dtype, 1, 1, 1, size);
  Image grad_a(wide, 1, 1, 1, size), grad_b(wide, 1, 1, 1, size);
  a.fill();
  b.fill();
  b.put(5, a.entry(5));
  const double factor = 0.37;
  const PatchLossKernels& kernels = patch_loss_kernels();
  const double got =
      kernels.l1(dtype, a.data(), b.data(), grad_a.data(), grad_b.data(), factor, 0, size);
  double sum = 0;
  std::vector<double> slopes, negative, scaled;
  for (int64_t i = 0; i < size; ++i) {
    const double d = a.entry(i) - b.entry(i);
    sum += std::fabs(d);
    slopes.push_back(d > 0 ? factor : d < 0 ? -factor : 0);
    negative.push_back(-slopes.back());
    scaled.push_back(slopes.back() * 3);
  }
  const double tolerance = dtype == DType::f64 ? 1e-14 : 1e-6;
  compare("absolute difference", {got}, {sum}, tolerance);
  compare("its gradient", grad_a.values(), slopes, tolerance);
  compare("its negative gradient", grad_b.values(), negative, tolerance);
  kernels.scale(wide, grad_a.data(), 3, 0, size);
  compare("scaled", grad_a.values(), scaled, tolerance);

  Image out(dtype, 1, 1, 1, size);
  grad_reverse_kernels().negate_scale(dtype, a.data(), out.data(), size, 0.7);
  std::vector<double> reversed;
  for (int64_t i = 0; i < size; ++i) reversed.push_back(-0.7 * a.entry(i));
  compare("reversed gradient", out.values(), reversed, tolerance_of(dtype));
}

}  // namespace

int main() {
  // (N, C, K, H, W, kernel, padding): ragged vectors and tiles, few channels, few pixels; each way
  // of convolving serves some of them.
  const ConvProblem shapes[] = {
      {DType::f32, 1, 1, 1, 1, 1, 1, 0},     {DType::f32, 2, 3, 5, 7, 9, 3, 1},
      {DType::f32, 1, 7, 4, 3, 2, 5, 2},     {DType::f32, 1, 20, 33, 29, 27, 3, 1},
      {DType::f32, 2, 17, 70, 9, 7, 3, 1},   {DType::f32, 1, 16, 150, 12, 13, 3, 1},
      {DType::f32, 1, 16, 20, 13, 17, 7, 3}, {DType::f32, 1, 19, 16, 8, 9, 11, 5},
      {DType::f32, 2, 17, 20, 13, 11, 5, 2}, {DType::f32, 1, 16, 33, 10, 14, 5, 0},
      {DType::f32, 1, 20, 16, 7, 6, 5, 4},   {DType::f32, 1, 16, 17, 6, 9, 3, 0},
      {DType::f32, 1, 3, 5, 6, 5, 4, 1},     {DType::f32, 1, 4, 3, 5, 3, 2, 1},
      {DType::f32, 2, 18, 33, 12, 23, 2, 0}, {DType::f32, 1, 70, 16, 17, 11, 2, 1}};
  for (ConvProblem p : shapes) {
    for (const DType dtype : dtypes) {
      p.dtype = dtype;
      for (const bool x_last : {false, true})
        for (const bool out_last : {false, true})
          for (const bool fused : {false, true}) {
            check_convolution(p, x_last, out_last, fused, x_last != out_last);
            check_filter_gradient(p, x_last, out_last, fused);
          }
    }
  }
  check_band(DType::f32);
  check_band(DType::f16);
  for (const DType dtype : dtypes) {
    for (const Kind kind : {Kind::softmax, Kind::bce, Kind::lsgan, Kind::hinge, Kind::wgan})
      for (const bool real : {false, true})
        for (const bool option : {false, true})
          check_loss(dtype, kind, real, kind <= Kind::lsgan && option ? 0.1 : 0, real != option,
                     option);
    for (const int64_t channels : {1, 5, 32, 67})
      for (const bool channels_last : {false, true}) check_head(dtype, channels, channels_last);
    check_l1_and_scale(dtype);
  }
  require("multiply_add counts its operations", peak_kernels().multiply_add(10) > 0);
  std::printf("%s: %d of %d checks failed; convolutions", isa_name(cpu_isa()), failures, checks);
  for (const auto& [method, count] : served) std::printf(" %s %d", method.c_str(), count);
  std::printf("\n");
  return failures != 0;
}
