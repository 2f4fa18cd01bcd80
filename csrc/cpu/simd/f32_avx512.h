// AVX-512 (F, BW, DQ, VL): 16 lanes, 32 registers, masks. What these functions are: simd/generic.h.
#pragma once

#pragma GCC diagnostic push
// gcc's own _mm512_undefined_ps() is an uninitialised variable.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#define FASTDA_SIMD 1
namespace fastda::cpu::FASTDA_ISA {
namespace {
constexpr int vector_bytes = 64;
constexpr int vector_registers = 32;
constexpr bool fused_multiply_add = true;
}  // namespace
}  // namespace fastda::cpu::FASTDA_ISA

#include "cpu/simd/generic.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

using Mask = __mmask16;

FASTDA_INLINE Mask mask_of(int64_t begin, int64_t end) {
  const int64_t b = begin < 0 ? 0 : begin > 16 ? 16 : begin;
  const int64_t e = end < b ? b : end > 16 ? 16 : end;
  return Mask(((1u << e) - 1) & ~((1u << b) - 1));
}

FASTDA_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
FASTDA_INLINE F32 fnma(F32 a, F32 b, F32 c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
FASTDA_INLINE F32 clamp_min(F32 x, F32 low) { return _mm512_max_ps(low, x); }
FASTDA_INLINE bool all_zero(F32 x) {  // and no NaN
  return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_EQ_OQ) == 0xffff;
}

FASTDA_INLINE F32 load_vec(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
FASTDA_INLINE void store_vec(float* p, F32 x, Mask m) { _mm512_mask_storeu_ps(p, m, x); }
template <>
inline F32 load_first<float, float>(const float* p, int n) {
  return _mm512_maskz_loadu_ps(Mask((1u << n) - 1), p);
}
template <>
inline void store_first<float, float>(float* p, F32 x, int n) {
  _mm512_mask_storeu_ps(p, Mask((1u << n) - 1), x);
}

template <>
[[gnu::always_inline]] inline IntVec<float> load_bytes<float>(const uint8_t* p, int n) {
  return IntVec<float>(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(Mask((1u << n) - 1), p)));
}
template <>
[[gnu::always_inline]] inline void store_bytes<float>(uint8_t* p, IntVec<float> v, int n) {
  _mm512_mask_cvtepi32_storeu_epi8(p, Mask((1u << n) - 1), __m512i(v));
}

FASTDA_INLINE F32 widen(__m256i h, bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
FASTDA_INLINE F32 widen(__m256i h, f16) { return _mm512_cvtph_ps(h); }
FASTDA_INLINE __m256i narrow(F32 x, bf16) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, half), 16);
  const Mask nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}
FASTDA_INLINE __m256i narrow(F32 x, f16) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

template <typename T>
FASTDA_INLINE F32 load_half(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <typename T>
FASTDA_INLINE void store_half(T* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, T{}));
}
template <typename T>
FASTDA_INLINE F32 load_vec(const T* p, Mask m) {
  return widen(_mm256_maskz_loadu_epi16(m, p), T{});
}
template <typename T>
FASTDA_INLINE void store_vec(T* p, F32 x, Mask m) {
  _mm256_mask_storeu_epi16(p, m, narrow(x, T{}));
}
template <>
inline F32 load_first<float, bf16>(const bf16* p, int n) {
  return load_vec(p, Mask((1u << n) - 1));
}
template <>
inline F32 load_first<float, f16>(const f16* p, int n) {
  return load_vec(p, Mask((1u << n) - 1));
}
template <>
inline void store_first<float, bf16>(bf16* p, F32 x, int n) {
  store_vec(p, x, Mask((1u << n) - 1));
}
template <>
inline void store_first<float, f16>(f16* p, F32 x, int n) {
  store_vec(p, x, Mask((1u << n) - 1));
}
FASTDA_INLINE F32 load_vec(const bf16* p) { return load_half(p); }
FASTDA_INLINE F32 load_vec(const f16* p) { return load_half(p); }
FASTDA_INLINE void store_vec(bf16* p, F32 x) { store_half(p, x); }
FASTDA_INLINE void store_vec(f16* p, F32 x) { store_half(p, x); }

template <>
[[gnu::always_inline]] inline void transpose<float>(F32* v) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
    const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
    v[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    v[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    v[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    v[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    v[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

}  // namespace
}  // namespace fastda::cpu::FASTDA_ISA
