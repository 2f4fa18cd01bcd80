// One float vector of the instruction set being compiled, as wide as it has: 16 lanes with AVX-512,
// 8 with AVX2. Where neither is there, FASTDA_SIMD is 0 and nothing is declared. Everything has
// internal linkage (see common/dtype.h).
#pragma once

#include "common/dtype.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#define FASTDA_SIMD 1
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc's own _mm512_undefined_ps(), inlined
#include <immintrin.h>
#else
#define FASTDA_SIMD 0
#endif

#if FASTDA_SIMD
#define FASTDA_INLINE [[gnu::always_inline, maybe_unused]] static inline

namespace fastda::cpu::FASTDA_ISA {
namespace {

#if defined(__AVX512F__)

using Vec = __m512;
using Mask = __mmask16;
constexpr int VL = 16;

// Lanes [begin, end).
FASTDA_INLINE Mask lanes(int64_t begin, int64_t end) {
  const int64_t b = begin < 0 ? 0 : begin > VL ? VL : begin, e = end < b ? b : end > VL ? VL : end;
  return Mask(((1u << e) - 1) & ~((1u << b) - 1));
}
FASTDA_INLINE Vec splat(float x) { return _mm512_set1_ps(x); }
FASTDA_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
FASTDA_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
// max(low, x), and x where x is NaN.
FASTDA_INLINE Vec clamp_min(Vec x, Vec low) { return _mm512_max_ps(low, x); }
// x where !(g <= 0), else 0.
FASTDA_INLINE Vec gate(Vec x, Vec g) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(g, _mm512_setzero_ps(), _CMP_NLE_UQ), x);
}
FASTDA_INLINE bool all_zero(Vec x) {  // and no NaN
  return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_EQ_OQ) == 0xffff;
}

FASTDA_INLINE Vec load_vec(const float* p) { return _mm512_loadu_ps(p); }
FASTDA_INLINE Vec load_vec(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
FASTDA_INLINE void store_vec(float* p, Vec x) { _mm512_storeu_ps(p, x); }
FASTDA_INLINE void store_vec(float* p, Vec x, Mask m) { _mm512_mask_storeu_ps(p, m, x); }

FASTDA_INLINE Vec widen(__m256i h, bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
FASTDA_INLINE Vec widen(__m256i h, f16) { return _mm512_cvtph_ps(h); }
FASTDA_INLINE __m256i narrow(Vec x, bf16) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(r);
}
FASTDA_INLINE __m256i narrow(Vec x, f16) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
template <typename T>
FASTDA_INLINE Vec load_vec(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <typename T>
FASTDA_INLINE Vec load_vec(const T* p, Mask m) {
  return widen(_mm256_maskz_loadu_epi16(m, p), T{});
}
template <typename T>
FASTDA_INLINE void store_vec(T* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, T{}));
}
template <typename T>
FASTDA_INLINE void store_vec(T* p, Vec x, Mask m) {
  _mm256_mask_storeu_epi16(p, m, narrow(x, T{}));
}

// Turns 16 vectors of 16 lanes: v[i][j] becomes v[j][i].
FASTDA_INLINE void transpose(Vec* v) {
  Vec t[16];
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

#else  // AVX2

using Vec = __m256;
using Mask = __m256i;
constexpr int VL = 8;

FASTDA_INLINE Mask lanes(int64_t begin, int64_t end) {
  const int b = int(begin < 0    ? 0
                    : begin > VL ? VL
                                 : begin),
            e = int(end < 0    ? 0
                    : end > VL ? VL
                               : end);
  const __m256i i = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(b), i),
                             _mm256_cmpgt_epi32(_mm256_set1_epi32(e), i));
}
FASTDA_INLINE Vec splat(float x) { return _mm256_set1_ps(x); }
FASTDA_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
FASTDA_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
FASTDA_INLINE Vec clamp_min(Vec x, Vec low) { return _mm256_max_ps(low, x); }
FASTDA_INLINE Vec gate(Vec x, Vec g) {
  return _mm256_and_ps(_mm256_cmp_ps(g, _mm256_setzero_ps(), _CMP_NLE_UQ), x);
}
FASTDA_INLINE bool all_zero(Vec x) {
  return _mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_EQ_OQ)) == 0xff;
}

FASTDA_INLINE Vec load_vec(const float* p) { return _mm256_loadu_ps(p); }
FASTDA_INLINE Vec load_vec(const float* p, Mask m) { return _mm256_maskload_ps(p, m); }
FASTDA_INLINE void store_vec(float* p, Vec x) { _mm256_storeu_ps(p, x); }
FASTDA_INLINE void store_vec(float* p, Vec x, Mask m) { _mm256_maskstore_ps(p, m, x); }

FASTDA_INLINE Vec widen(__m128i h, bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
FASTDA_INLINE Vec widen(__m128i h, f16) { return _mm256_cvtph_ps(h); }
FASTDA_INLINE __m128i narrow(Vec x, bf16) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r =
      _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
FASTDA_INLINE __m128i narrow(Vec x, f16) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
template <typename T>
FASTDA_INLINE Vec load_vec(const T* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
template <typename T>
FASTDA_INLINE void store_vec(T* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x, T{}));
}
// AVX2 masks no 16-bit elements: lane by lane.
template <typename T>
FASTDA_INLINE Vec load_vec(const T* p, Mask m) {
  alignas(16) T h[VL] = {};
  const int bits = _mm256_movemask_ps(_mm256_castsi256_ps(m));
  for (int i = 0; i < VL; ++i)
    if (bits >> i & 1) h[i] = p[i];
  return load_vec(h);
}
template <typename T>
FASTDA_INLINE void store_vec(T* p, Vec x, Mask m) {
  alignas(16) T h[VL];
  store_vec(h, x);
  const int bits = _mm256_movemask_ps(_mm256_castsi256_ps(m));
  for (int i = 0; i < VL; ++i)
    if (bits >> i & 1) p[i] = h[i];
}

FASTDA_INLINE void transpose(Vec* v) {
  Vec t[8];
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
    const Vec low = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
    v[i] = low;
  }
}

#endif

}  // namespace
}  // namespace fastda::cpu::FASTDA_ISA
#endif  // FASTDA_SIMD
