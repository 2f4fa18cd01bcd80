// NEON of every 64-bit Arm: 4 lanes, 32 registers. What these functions are: simd/generic.h.
#pragma once

#include <arm_neon.h>

#define FASTDA_SIMD 1
namespace fastda::cpu::FASTDA_ISA {
namespace {
constexpr int vector_bytes = 16;
constexpr int vector_registers = 32;
constexpr bool fused_multiply_add = true;
}  // namespace
}  // namespace fastda::cpu::FASTDA_ISA

#include "cpu/simd/generic.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

struct Mask {
  int begin, end;
};

FASTDA_INLINE Mask mask_of(int64_t begin, int64_t end) {
  return {int(begin < 0 ? 0 : begin), int(end > 4 ? 4 : end)};
}

FASTDA_INLINE F32 fma(F32 a, F32 b, F32 c) { return vfmaq_f32(c, a, b); }   // a b + c
FASTDA_INLINE F32 fnma(F32 a, F32 b, F32 c) { return vfmsq_f32(c, a, b); }  // c - a b
// Not vmaxq_f32, which has -0 below 0.
FASTDA_INLINE F32 clamp_min(F32 x, F32 low) { return vbslq_f32(vcltq_f32(x, low), low, x); }
FASTDA_INLINE bool all_zero(F32 x) { return vminvq_u32(vceqzq_f32(x)) != 0; }  // and no NaN

FASTDA_INLINE F32 widen(uint16x4_t h, bf16) { return vreinterpretq_f32_u32(vshll_n_u16(h, 16)); }
FASTDA_INLINE F32 widen(uint16x4_t h, f16) { return vcvt_f32_f16(vreinterpret_f16_u16(h)); }
FASTDA_INLINE uint16x4_t narrow(F32 x, bf16) {
  const uint32x4_t u = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t half = vaddq_u32(odd, vdupq_n_u32(0x7fff));
  const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(u, half), 16);
  return vmovn_u32(vbslq_u32(vceqq_f32(x, x), rounded, vdupq_n_u32(0x7fc0)));
}
FASTDA_INLINE uint16x4_t narrow(F32 x, f16) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }

template <typename T>
FASTDA_INLINE F32 load_half(const T* p) {
  uint16x4_t h;
  std::memcpy(&h, p, sizeof h);
  return widen(h, T{});
}
template <typename T>
FASTDA_INLINE void store_half(T* p, F32 x) {
  const uint16x4_t h = narrow(x, T{});
  std::memcpy(p, &h, sizeof h);
}
FASTDA_INLINE F32 load_vec(const bf16* p) { return load_half(p); }
FASTDA_INLINE F32 load_vec(const f16* p) { return load_half(p); }
FASTDA_INLINE void store_vec(bf16* p, F32 x) { store_half(p, x); }
FASTDA_INLINE void store_vec(f16* p, F32 x) { store_half(p, x); }

// NEON masks nothing: whole where the mask is full, else lane by lane.
template <typename T>
FASTDA_INLINE F32 load_vec(const T* p, Mask m) {
  if (m.begin == 0 && m.end == 4) return load_vec(p);
  T lane[4] = {};
  for (int i = m.begin; i < m.end; ++i) lane[i] = p[i];
  return load_vec(lane);
}
template <typename T>
FASTDA_INLINE void store_vec(T* p, F32 x, Mask m) {
  if (m.begin == 0 && m.end == 4) return store_vec(p, x);
  T lane[4];
  store_vec(lane, x);
  for (int i = m.begin; i < m.end; ++i) p[i] = lane[i];
}
template <>
inline F32 load_first<float, float>(const float* p, int n) {
  return load_vec(p, Mask{0, n});
}
template <>
inline void store_first<float, float>(float* p, F32 x, int n) {
  store_vec(p, x, Mask{0, n});
}

template <>
[[gnu::always_inline]] inline void transpose<float>(F32* v) {
  const float32x4_t a = vtrn1q_f32(v[0], v[1]), b = vtrn2q_f32(v[0], v[1]);
  const float32x4_t c = vtrn1q_f32(v[2], v[3]), d = vtrn2q_f32(v[2], v[3]);
  const auto low = [](float32x4_t x, float32x4_t y) {
    return vcombine_f32(vget_low_f32(x), vget_low_f32(y));
  };
  const auto high = [](float32x4_t x, float32x4_t y) {
    return vcombine_f32(vget_high_f32(x), vget_high_f32(y));
  };
  v[0] = low(a, c);
  v[1] = low(b, d);
  v[2] = high(a, c);
  v[3] = high(b, d);
}

}  // namespace
}  // namespace fastda::cpu::FASTDA_ISA
