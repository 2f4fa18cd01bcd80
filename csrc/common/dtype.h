// Element types of kernels, without torch. Everything here has internal linkage: kernels are
// compiled once per instruction set, and a shared inline function could otherwise be taken from the
// wrong one at link time.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastda {

enum class DType : int { f32, f64, bf16, f16 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

namespace {

inline int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// Accumulator type: float32 or wider.
template <typename T>
struct Acc {
  using type = float;
};
template <>
struct Acc<double> {
  using type = double;
};

[[maybe_unused]] inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
[[maybe_unused]] inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

[[maybe_unused]] inline float load(const float* p) { return *p; }
[[maybe_unused]] inline double load(const double* p) { return *p; }
[[maybe_unused]] inline float load(const bf16* p) { return bits_to_float(uint32_t(p->bits) << 16); }

[[maybe_unused]] inline float load(const f16* p) {
  // Rebias the exponent; infinities and NaN keep theirs. A subnormal becomes the mantissa of 2^-14,
  // which is then taken off: no float is subnormal on the way, where a thread may flush those to 0.
  const uint32_t h = p->bits, a = h & 0x7fffu;
  const float subnormal = bits_to_float((a << 13) + 0x38800000u) - bits_to_float(0x38800000u);
  const uint32_t normal = (a << 13) + 0x38000000u;
  const uint32_t magnitude = a < 0x400u ? float_to_bits(subnormal) : normal;
  const uint32_t special = a >= 0x7c00u ? 0x7f800000u : 0u;
  return bits_to_float(magnitude | special | ((h & 0x8000u) << 16));
}

[[maybe_unused]] inline void store(float* p, float v) { *p = v; }
[[maybe_unused]] inline void store(double* p, double v) { *p = v; }

// Round to nearest even; NaN stays NaN.
[[maybe_unused]] inline void store(bf16* p, float v) {
  const uint32_t u = float_to_bits(v);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  p->bits = uint16_t(v != v ? 0x7fc0u : rounded);
}

[[maybe_unused]] inline void store(f16* p, float v) {
  const uint32_t u = float_to_bits(v);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  // Normal: rebias, round to nearest even on the 13 dropped bits. Subnormal: let one addition do
  // the rounding.
  const uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const uint32_t subnormal = float_to_bits(bits_to_float(a) + 0.5f) - 0x3f000000u;
  uint32_t h = a < 0x38800000u ? subnormal : normal;
  h = a >= 0x477ff000u ? 0x7c00u : h;  // rounds to infinity
  h = a > 0x7f800000u ? 0x7e00u : h;   // NaN
  p->bits = uint16_t(h | sign);
}

}  // namespace

// Calls `f.template operator()<T>()` with the element type of `dtype`.
template <typename F>
decltype(auto) dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64: return f.template operator()<double>();
    case DType::bf16: return f.template operator()<bf16>();
    case DType::f16: return f.template operator()<f16>();
    default: return f.template operator()<float>();
  }
}

}  // namespace fastda
