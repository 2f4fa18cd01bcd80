// Vectors of the instruction set being compiled for, lanes of float or double, in plain C++.
//
// An instruction set with more than that has a header f32_<instruction set>.h, which the build
// includes ahead of every kernel file (see common/isa.h). It says how wide vectors are, includes
// this file, and adds for float, in each of these headers the same:
//
//   Mask, mask_of(begin, end)        lanes [begin, end)
//   load_vec, store_vec              of 16-bit types, and of all types under a mask
//   load_first, store_first, load_bytes, store_bytes
//                                    where there is more than this file's loops
//   fma, fnma, clamp_min, all_zero, transpose
//
// Everything has internal linkage: see common/dtype.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#define FASTDA_INLINE [[gnu::always_inline, maybe_unused]] static inline

#if !defined(FASTDA_SIMD)
#define FASTDA_SIMD 0
namespace fastda::cpu::FASTDA_ISA {
namespace {
constexpr int vector_bytes = 16;
constexpr int vector_registers = 16;
constexpr bool fused_multiply_add = false;
}  // namespace
}  // namespace fastda::cpu::FASTDA_ISA
#endif

// The constraint of inline assembly that names a vector register.
#if defined(__x86_64__)
#define FASTDA_VECTOR_REGISTER "+v"
#elif defined(__aarch64__)
#define FASTDA_VECTOR_REGISTER "+w"
#else
#define FASTDA_VECTOR_REGISTER "+m"
#endif

namespace fastda::cpu::FASTDA_ISA {
namespace {

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
using F32 = Vec<float>;
template <typename S>
constexpr int lanes = vector_bytes / int(sizeof(S));

// Integers of the lanes' size: what comparisons give.
template <typename S>
struct Bits;
template <>
struct Bits<float> {
  using type = int32_t;
};
template <>
struct Bits<double> {
  using type = int64_t;
};
template <typename S>
struct IntVecOf {
  typedef typename Bits<S>::type type __attribute__((vector_size(vector_bytes)));
};
template <typename S>
using IntVec = typename IntVecOf<S>::type;

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

// x in a register from here on: one broadcast for many products, not many products that each load
// it.
template <typename V>
FASTDA_INLINE void in_register(V& x) {
  asm("" : FASTDA_VECTOR_REGISTER(x));
}

// max(low, x), and x where x is NaN.
template <typename V>
inline V clamp_min(V x, V low) {
  return x < low ? low : x;
}
// ReLU's backward, read off its result g: x where g > 0 or g is NaN, else 0.
template <typename V>
inline V relu_mask(V x, V g) {
  return g <= V{} ? V{} : x;
}
// Leaky ReLU's backward, PyTorch's: x where g > 0, else slope x, NaN included; with x for g the
// activation itself.
template <typename V>
inline V leaky_relu_mask(V x, V g, V slope) {
  return g > V{} ? x : x * slope;
}
// Calls f(mask), mask(x, g) being one of these: that of a negative slope of 0 is ReLU's.
template <typename S, typename F>
FASTDA_INLINE void with_relu_mask(double negative_slope, F&& f) {
  using V = Vec<S>;
  if (negative_slope == 0) {
    f([](V x, V g) __attribute__((always_inline)) { return relu_mask(x, g); });
  } else {
    const V slope = broadcast(S(negative_slope));
    f([slope](V x, V g) __attribute__((always_inline)) { return leaky_relu_mask(x, g, slope); });
  }
}

FASTDA_INLINE void prefetch_first_level(const void* p) { __builtin_prefetch(p, 0, 3); }
FASTDA_INLINE void prefetch_second_level(const void* p) { __builtin_prefetch(p, 0, 2); }

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

// The first n (1 to lanes) bytes as integers, the rest of the lanes zero; and back, from integers
// below 256.
template <typename S>
inline IntVec<S> load_bytes(const uint8_t* p, int n) {
  typename Bits<S>::type lane[lanes<S>] = {};
  for (int i = 0; i < n; ++i) lane[i] = p[i];
  IntVec<S> v;
  std::memcpy(&v, lane, sizeof v);
  return v;
}
template <typename S>
inline void store_bytes(uint8_t* p, IntVec<S> v, int n) {
  typename Bits<S>::type lane[lanes<S>];
  std::memcpy(lane, &v, sizeof v);
  for (int i = 0; i < n; ++i) p[i] = uint8_t(lane[i]);
}

template <int... I>
struct Sequence {};
template <int N, int... I>
struct MakeSequence : MakeSequence<N - 1, N - 1, I...> {};
template <int... I>
struct MakeSequence<0, I...> {
  using type = Sequence<I...>;
};

template <typename S, int... L>
inline void deinterleave(Vec<S>& a, Vec<S>& b, Sequence<L...>) {
  const Vec<S> even = __builtin_shufflevector(a, b, (2 * L)...);
  b = __builtin_shufflevector(a, b, (2 * L + 1)...);
  a = even;
}
// The entries of a, then b, at even places to a, the others to b; and back.
template <typename S>
inline void deinterleave(Vec<S>& a, Vec<S>& b) {
  deinterleave<S>(a, b, typename MakeSequence<lanes<S>>::type{});
}
template <typename S, int... L>
inline void interleave(Vec<S>& a, Vec<S>& b, Sequence<L...>) {
  constexpr int n = lanes<S>;
  const Vec<S> low = __builtin_shufflevector(a, b, (L / 2 + (L & 1) * n)...);
  b = __builtin_shufflevector(a, b, ((n + L) / 2 + (L & 1) * n)...);
  a = low;
}
template <typename S>
inline void interleave(Vec<S>& a, Vec<S>& b) {
  interleave<S>(a, b, typename MakeSequence<lanes<S>>::type{});
}

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
// Transposes a lanes x lanes matrix in registers: rows[i][j] becomes rows[j][i].
template <typename S>
inline void transpose(Vec<S>* rows) {
  transpose_stage<S, lanes<S> / 2>(rows);
}

}  // namespace
}  // namespace fastda::cpu::FASTDA_ISA
