// AVX2 with FMA and F16C: 8 lanes, 16 registers. What these functions are: simd/generic.h.
#pragma once

#include <immintrin.h>

#define FASTDA_SIMD 1
namespace fastda::cpu::FASTDA_ISA {
namespace {
constexpr int vector_bytes = 32;
constexpr int vector_registers = 16;
constexpr bool fused_multiply_add = true;
}  // namespace
}  // namespace fastda::cpu::FASTDA_ISA

#include "cpu/simd/generic.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

using Mask = __m256i;

FASTDA_INLINE Mask lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
FASTDA_INLINE Mask mask_of(int64_t begin, int64_t end) {
  const int b = int(begin < 0 ? 0 : begin > 8 ? 8 : begin);
  const int e = int(end < 0 ? 0 : end > 8 ? 8 : end);
  return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(b), lane_numbers()),
                             _mm256_cmpgt_epi32(_mm256_set1_epi32(e), lane_numbers()));
}

FASTDA_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }    // a b + c
FASTDA_INLINE F32 fnma(F32 a, F32 b, F32 c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a b
FASTDA_INLINE F32 clamp_min(F32 x, F32 low) { return _mm256_max_ps(low, x); }
FASTDA_INLINE bool all_zero(F32 x) {  // and no NaN
  return _mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_EQ_OQ)) == 0xff;
}

FASTDA_INLINE F32 load_vec(const float* p, Mask m) { return _mm256_maskload_ps(p, m); }
FASTDA_INLINE void store_vec(float* p, F32 x, Mask m) { _mm256_maskstore_ps(p, m, x); }
FASTDA_INLINE Mask first_lanes_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane_numbers());
}
template <>
inline F32 load_first<float, float>(const float* p, int n) {
  return n == 8 ? load_vec(p) : load_vec(p, first_lanes_mask(n));
}
template <>
inline void store_first<float, float>(float* p, F32 x, int n) {
  if (n == 8) {
    store_vec(p, x);
  } else {
    store_vec(p, x, first_lanes_mask(n));
  }
}

template <>
[[gnu::always_inline]] inline IntVec<float> load_bytes<float>(const uint8_t* p, int n) {
  uint64_t bytes = 0;
  if (n == 8) {
    std::memcpy(&bytes, p, 8);
  } else {
    for (int i = 0; i < n; ++i) bytes |= uint64_t(p[i]) << (8 * i);
  }
  return IntVec<float>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(bytes))));
}
template <>
[[gnu::always_inline]] inline void store_bytes<float>(uint8_t* p, IntVec<float> v, int n) {
  const __m256i words = _mm256_packus_epi32(__m256i(v), __m256i(v));  // 0123 0123 4567 4567
  const __m256i packed = _mm256_packus_epi16(words, words);
  const uint64_t bytes = uint32_t(_mm256_extract_epi32(packed, 0)) |
                         uint64_t(uint32_t(_mm256_extract_epi32(packed, 4))) << 32;
  if (n == 8) {
    std::memcpy(p, &bytes, 8);
  } else {
    for (int i = 0; i < n; ++i) p[i] = uint8_t(bytes >> (8 * i));
  }
}

FASTDA_INLINE F32 widen(__m128i h, bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
FASTDA_INLINE F32 widen(__m128i h, f16) { return _mm256_cvtph_ps(h); }
FASTDA_INLINE __m128i narrow(F32 x, bf16) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, half), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i r = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
FASTDA_INLINE __m128i narrow(F32 x, f16) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

template <typename T>
FASTDA_INLINE F32 load_half(const T* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
template <typename T>
FASTDA_INLINE void store_half(T* p, F32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x, T{}));
}
// AVX2 masks no 16-bit elements: lane by lane.
template <typename T>
FASTDA_INLINE F32 load_vec(const T* p, Mask m) {
  alignas(16) T h[8] = {};
  const int bits = _mm256_movemask_ps(_mm256_castsi256_ps(m));
  for (int i = 0; i < 8; ++i)
    if (bits >> i & 1) h[i] = p[i];
  return load_half(h);
}
template <typename T>
FASTDA_INLINE void store_vec(T* p, F32 x, Mask m) {
  alignas(16) T h[8];
  store_half(h, x);
  const int bits = _mm256_movemask_ps(_mm256_castsi256_ps(m));
  for (int i = 0; i < 8; ++i)
    if (bits >> i & 1) p[i] = h[i];
}
FASTDA_INLINE F32 load_vec(const bf16* p) { return load_half(p); }
FASTDA_INLINE F32 load_vec(const f16* p) { return load_half(p); }
FASTDA_INLINE void store_vec(bf16* p, F32 x) { store_half(p, x); }
FASTDA_INLINE void store_vec(f16* p, F32 x) { store_half(p, x); }

template <>
[[gnu::always_inline]] inline void transpose<float>(F32* v) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    const __m256d a = _mm256_castps_pd(t[i]), b = _mm256_castps_pd(t[i + 1]);
    const __m256d c = _mm256_castps_pd(t[i + 2]), d = _mm256_castps_pd(t[i + 3]);
    v[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    v[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    v[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    v[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
  }
  for (int i = 0; i < 4; ++i) {
    const __m256 low = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
    v[i] = low;
  }
}

}  // namespace
}  // namespace fastda::cpu::FASTDA_ISA
