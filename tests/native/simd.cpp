// Every function of the SIMD headers against scalar code, for the instruction set being compiled.
#include "cpu/simd/stream.h"

#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <limits>

using namespace fastda;
using namespace fastda::cpu::FASTDA_ISA;

namespace {

int failures = 0;
void check(bool right, const char* what, int lane) {
  if (right) return;
  std::printf("%s is wrong in lane %d\n", what, lane);
  ++failures;
}

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float nan = std::numeric_limits<float>::quiet_NaN();
// Signs of zero, subnormals, ties of the 16-bit types, their largest numbers and what is beyond.
constexpr float values[] = {0.0f,        -0.0f,          1.0f,           -1.5f,   nan,
                            inf,         -inf,           1e-40f,         -1e-40f, 3.14159f,
                            65504.0f,    65519.0f,       65520.0f,       -1e6f,   1.00390625f,
                            1.01171875f, 6.0e-8f,        2.98023224e-8f, 3.3e38f, -3.4e38f,
                            0.33333f,    1.00048828125f, 1.00146484375f};
constexpr int count = sizeof values / sizeof *values;

template <typename S>
bool same(S a, S b) {
  return (a != a && b != b) || std::memcmp(&a, &b, sizeof a) == 0;
}

template <typename S, typename E>
void check_lanes(const char* what, Vec<S> got, E&& expected) {
  S lane[lanes<S>];
  store_vec(lane, got);
  for (int i = 0; i < lanes<S>; ++i) check(same(lane[i], S(expected(i))), what, i);
}

template <typename S>
S value(int i) {
  return S(values[(i % count + count) % count]);
}
template <typename S>
Vec<S> vector_from(int first) {
  S lane[lanes<S>];
  for (int i = 0; i < lanes<S>; ++i) lane[i] = value<S>(first + i);
  return load_vec(lane);
}

template <typename S>
void check_generic() {
  for (int first = 0; first < count; ++first) {
    const Vec<S> x = vector_from<S>(first), y = vector_from<S>(first + 5);
    const auto at = [&](int i) { return value<S>(first + i); };
    const auto other = [&](int i) { return value<S>(first + 5 + i); };
    check_lanes<S>("load_vec", x, at);
    check_lanes<S>("broadcast", broadcast(at(0)), [&](int) { return at(0); });
    // Bounds are never NaN.
    for (const S low : {S(0), -std::numeric_limits<S>::infinity()})
      check_lanes<S>("clamp_min", clamp_min(x, broadcast(low)),
                     [&](int i) { return at(i) < low ? low : at(i); });
    check_lanes<S>("relu_mask", relu_mask(x, y),
                   [&](int i) { return other(i) <= 0 ? S(0) : at(i); });
    check_lanes<S>("leaky_relu_mask", leaky_relu_mask(x, y, broadcast(S(0.25))),
                   [&](int i) { return other(i) > 0 ? at(i) : at(i) * S(0.25); });
  }
  Vec<S> rows[lanes<S>];
  for (int i = 0; i < lanes<S>; ++i) {
    S lane[lanes<S>];
    for (int j = 0; j < lanes<S>; ++j) lane[j] = S(100 * i + j);
    rows[i] = load_vec(lane);
  }
  transpose<S>(rows);
  for (int i = 0; i < lanes<S>; ++i)
    check_lanes<S>("transpose", rows[i], [&](int j) { return 100 * j + i; });
}

template <typename S, typename T>
void check_first(const char* what) {
  T from[lanes<S>], to[lanes<S> + 1];
  for (int first = 0; first < count; ++first) {
    for (int i = 0; i < lanes<S>; ++i) store(from + i, value<S>(first + i));
    for (int n = 1; n <= lanes<S>; ++n) {
      const Vec<S> x = load_first<S>(from, n);
      check_lanes<S>(what, x, [&](int i) { return i < n ? S(load(from + i)) : S(0); });
      for (T& t : to) store(&t, S(7));
      store_first<S>(to, vector_from<S>(first), n);
      for (int i = 0; i <= lanes<S>; ++i) {
        T expected;
        store(&expected, i < n ? value<S>(first + i) : S(7));
        check(same(S(load(to + i)), S(load(&expected))), what, i);
      }
    }
  }
}

#if FASTDA_SIMD
template <typename T>
void check_masked(const char* what) {
  constexpr int L = lanes<float>;
  T from[L], to[L];
  for (int first = 0; first < count; ++first) {
    for (int i = 0; i < L; ++i) store(from + i, value<float>(first + i));
    check_lanes<float>(what, load_vec(from), [&](int i) { return load(from + i); });
    for (int64_t begin = -3; begin <= L + 2; ++begin) {
      for (int64_t end = -2; end <= L + 3; ++end) {
        const Mask mask = mask_of(begin, end);
        const auto inside = [&](int i) { return i >= begin && i < end; };
        check_lanes<float>(what, load_vec(from, mask),
                           [&](int i) { return inside(i) ? load(from + i) : 0.0f; });
        for (T& t : to) store(&t, 7.0f);
        store_vec(to, vector_from<float>(first), mask);
        for (int i = 0; i < L; ++i) {
          T expected;
          store(&expected, inside(i) ? value<float>(first + i) : 7.0f);
          check(same(load(to + i), load(&expected)), what, i);
        }
      }
    }
    store_vec(to, vector_from<float>(first));
    for (int i = 0; i < L; ++i) {
      T expected;
      store(&expected, value<float>(first + i));
      check(same(load(to + i), load(&expected)), what, i);
    }
  }
}

void check_float() {
  constexpr int L = lanes<float>;
  check_masked<float>("load_vec, store_vec of float");
  check_masked<bf16>("load_vec, store_vec of bfloat16");
  check_masked<f16>("load_vec, store_vec of float16");
  for (int first = 0; first < count; ++first) {
    const F32 a = vector_from<float>(first), b = vector_from<float>(first + 3);
    const F32 c = vector_from<float>(first + 8);
    const auto at = [&](int i) { return value<float>(first + i); };
    check_lanes<float>("fma", fma(a, b, c), [&](int i) {
      return std::fma(at(i), value<float>(first + 3 + i), value<float>(first + 8 + i));
    });
    check_lanes<float>("fnma", fnma(a, b, c), [&](int i) {
      return std::fma(-at(i), value<float>(first + 3 + i), value<float>(first + 8 + i));
    });
  }
  float lane[L] = {};
  check(all_zero(load_vec(lane)), "all_zero", 0);
  for (int i = 0; i < L; ++i) {
    for (const float x : {1e-45f, -1.0f, nan, inf}) {
      lane[i] = x;
      check(!all_zero(load_vec(lane)), "all_zero", i);
    }
    lane[i] = -0.0f;
    check(all_zero(load_vec(lane)), "all_zero", i);
  }
}
#endif

void check_stream() {
  constexpr int L = lanes<float>;
  alignas(64) float to[2 * L] = {};
  stream_vec(to + L, vector_from<float>(3));
  stream_fence();
  for (int i = 0; i < L; ++i) {
    check(same(to[i], 0.0f), "stream_vec before", i);
    check(same(to[L + i], value<float>(3 + i)), "stream_vec", i);
  }
}

}  // namespace

int main() {
  check_stream();
  check_generic<float>();
  check_generic<double>();
  check_first<float, float>("load_first, store_first of float");
  check_first<double, double>("load_first, store_first of double");
  check_first<float, bf16>("load_first, store_first of bfloat16");
  check_first<float, f16>("load_first, store_first of float16");
#if FASTDA_SIMD
  check_float();
#endif
  std::printf("%d lanes of float, %d failures\n", lanes<float>, failures);
  return failures != 0;
}
