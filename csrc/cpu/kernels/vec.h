// Vectors of the instruction set being compiled for. Internal linkage throughout: see
// common/dtype.h.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

namespace fastda {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
constexpr int vector_registers = 32;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
constexpr int vector_registers = 16;
#else
constexpr int vector_bytes = 16;
constexpr int vector_registers = 16;
#endif

template <typename S>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(vector_bytes)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(vector_bytes)));
};
template <typename S>
using Vec = typename VecOf<S>::type;
template <typename S>
constexpr int lanes = vector_bytes / int(sizeof(S));

template <typename S>
inline Vec<S> load_vec(const S* p) {
  Vec<S> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename S>
inline void store_vec(S* p, Vec<S> v) {
  std::memcpy(p, &v, sizeof v);
}
template <typename S>
inline Vec<S> broadcast(S s) {
  return s - Vec<S>{};  // not s + {}: -0 stays -0
}

// The first n (1 to lanes) elements of any element type, widened to the accumulator type; the rest
// is zero.
template <typename S, typename T>
inline Vec<S> load_first(const T* p, int n) {
  S lane[lanes<S>] = {};
  if (n == lanes<S>) {
    for (int i = 0; i < lanes<S>; ++i) lane[i] = load(p + i);
  } else {
    for (int i = 0; i < n; ++i) lane[i] = load(p + i);
  }
  return load_vec(lane);
}
template <typename S, typename T>
inline void store_first(T* p, Vec<S> v, int n) {
  S lane[lanes<S>];
  store_vec(lane, v);
  if (n == lanes<S>) {
    for (int i = 0; i < lanes<S>; ++i) store(p + i, lane[i]);
  } else {
    for (int i = 0; i < n; ++i) store(p + i, lane[i]);
  }
}
#if defined(__AVX512F__)
template <>
inline Vec<float> load_first<float, float>(const float* p, int n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
template <>
inline void store_first<float, float>(float* p, Vec<float> v, int n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
#elif defined(__AVX2__)
inline __m256i first_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
template <>
inline Vec<float> load_first<float, float>(const float* p, int n) {
  return (Vec<float>)(n == 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, first_mask(n)));
}
template <>
inline void store_first<float, float>(float* p, Vec<float> v, int n) {
  if (n == 8) {
    _mm256_storeu_ps(p, (__m256)v);
  } else {
    _mm256_maskstore_ps(p, first_mask(n), (__m256)v);
  }
}
#endif

template <int... I>
struct Sequence {};
template <int N, int... I>
struct MakeSequence : MakeSequence<N - 1, N - 1, I...> {};
template <int... I>
struct MakeSequence<0, I...> {
  using type = Sequence<I...>;
};

template <typename S, int D, int... L>
inline void exchange(Vec<S>& a, Vec<S>& b, Sequence<L...>) {
  constexpr int n = lanes<S>;
  const Vec<S> low = __builtin_shufflevector(a, b, ((L & D) ? n + L - D : L)...);
  b = __builtin_shufflevector(a, b, ((L & D) ? n + L : L + D)...);
  a = low;
}
template <typename S, int D>
inline void transpose_stage(Vec<S>* rows) {
  if constexpr (D > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes<S>; ++i)
      if ((i & D) == 0)
        exchange<S, D>(rows[i], rows[i + D], typename MakeSequence<lanes<S>>::type{});
    transpose_stage<S, D / 2>(rows);
  }
}
// Transposes a lanes x lanes matrix in registers.
template <typename S>
inline void transpose(Vec<S>* rows) {
  transpose_stage<S, lanes<S> / 2>(rows);
}

}  // namespace
}  // namespace fastda
