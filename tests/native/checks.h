// What the checks of kernels share: counts, comparisons, random numbers, tensors in a layout.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "cpu/conv/problem.h"

namespace fastda::harness {

inline int checks = 0, failures = 0;

// Relative to the norm of what is expected, or of `magnitudes`, where the few sums that are expected
// may cancel.
inline void compare(const char* what, const std::vector<double>& got,
                    const std::vector<double>& expected, double tolerance,
                    const std::vector<double>& magnitudes) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double d = got[i] - expected[i];
    error += d * d;
    norm += magnitudes[i] * magnitudes[i];
  }
  ++checks;
  if (got.size() == expected.size() && std::sqrt(error) <= tolerance * std::sqrt(norm)) return;
  ++failures;
  std::printf("%s: relative error %.2e, allowed %.2e\n", what, std::sqrt(error / norm), tolerance);
}
inline void compare(const char* what, const std::vector<double>& got,
                    const std::vector<double>& expected, double tolerance) {
  compare(what, got, expected, tolerance, expected);
}
inline void require(const char* what, bool right) {
  ++checks;
  failures += !right;
  if (!right) std::printf("%s\n", what);
}

inline double tolerance_of(DType dtype) {
  switch (dtype) {
    case DType::f64: return 3e-15;
    case DType::bf16: return 8e-3;
    case DType::f16: return 1e-3;
    default: return 2e-6;
  }
}
inline const char* name_of(DType dtype) {
  constexpr const char* names[] = {"float32", "float64", "bfloat16", "float16"};
  return names[int(dtype)];
}
constexpr DType dtypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

inline uint64_t state = 1;
inline double random_number() {  // about normal: the sum of four uniform ones
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

}  // namespace fastda::harness
