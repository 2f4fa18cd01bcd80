// What device code needs of the machine: memory, matrix and conversion instructions behind small
// functions.
//
// Kernels include this and no header of torch or of the CUDA runtime. nvcc turns the functions into
// PTX; a host compiler takes tests/cuda_host/device.h instead, which supplies CUDA's names
// (threadIdx, __syncthreads, …) and runs every thread of a block as a fiber.
#pragma once

#include <cstdint>

#include "common/dtype.h"

#if defined(__CUDACC__)
#define FASTDA_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define FASTDA_DEVICE __device__ __forceinline__
#define FASTDA_DEVICE_CALL static __device__ __noinline__
#define FASTDA_HOST_DEVICE __host__ __device__ __forceinline__
#define FASTDA_UNROLL _Pragma("unroll")
#define FASTDA_NO_UNROLL _Pragma("unroll 1")
#define FASTDA_SHARED(type, name, count) __shared__ type name[count]
#define FASTDA_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#else
#include "cuda_host/device.h"
#endif

namespace fastda::cuda {

// For a lambda that is compiled for either.
struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};

// Accumulator type: float32 or wider.
template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

// N values that move as one access; N * sizeof(T) is at most 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

// Division by a number that the host knows, for dividends below 2^31 (Granlund and Montgomery,
// 1994).
struct Divisor {
  uint32_t value = 1, factor = 0, shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : value(uint32_t(divisor)) {
    while ((int64_t(1) << shift) < divisor) ++shift;
    factor = uint32_t((((uint64_t(1) << shift) - divisor) << 32) / divisor + 1);
  }
  FASTDA_HOST_DEVICE uint32_t quotient(uint32_t n) const {
    const uint32_t high = uint32_t((uint64_t(n) * factor) >> 32);
    return (high + n) >> shift;
  }
};

#if defined(__CUDACC__)

template <int N, typename T>
FASTDA_DEVICE Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <typename T, int N>
FASTDA_DEVICE void store_pack(T* p, Pack<T, N> pack) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

FASTDA_DEVICE float widen(float v) { return v; }
FASTDA_DEVICE double widen(double v) { return v; }
FASTDA_DEVICE float widen(bf16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
FASTDA_DEVICE float widen(f16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}
// Round to nearest even; NaN stays NaN.
FASTDA_DEVICE void narrow(float v, float& out) { out = v; }
FASTDA_DEVICE void narrow(double v, double& out) { out = v; }
FASTDA_DEVICE void narrow(float v, bf16& out) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
}
FASTDA_DEVICE void narrow(float v, f16& out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
}
// The bits of a float32 whose mantissa is rounded to TF32's ten bits.
FASTDA_DEVICE uint32_t round_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}
FASTDA_DEVICE uint32_t bits_of(float v) { return __float_as_uint(v); }
FASTDA_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

FASTDA_DEVICE uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// Copies 16 bytes from global to shared memory, or writes zeros where `inside` is false; both
// 16-byte aligned.
FASTDA_DEVICE void copy_async(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}
FASTDA_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of the groups that this thread committed are under way.
template <int pending>
FASTDA_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8×8 matrices of 16-bit entries from shared memory; lane l gives the address of row l % 8 of
// matrix l / 8.
FASTDA_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
FASTDA_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

#define FASTDA_MMA(shape_and_types)                                      \
  asm("mma.sync.aligned." shape_and_types                                \
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
// d[16×8] += a · b with float32 sums: b has 16 rows in 16-bit types, 8 in TF32.
FASTDA_DEVICE void mma(bf16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  FASTDA_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
FASTDA_DEVICE void mma(f16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  FASTDA_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
FASTDA_DEVICE void mma(float, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  FASTDA_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef FASTDA_MMA

#endif  // __CUDACC__

template <typename T>
FASTDA_DEVICE T narrowed(typename Wide<T>::type v) {
  T out;
  narrow(v, out);
  return out;
}

// Entry i of an array of any floating-point type.
FASTDA_DEVICE double load_scalar(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f64: return static_cast<const double*>(p)[i];
    case DType::bf16: return widen(static_cast<const bf16*>(p)[i]);
    case DType::f16: return widen(static_cast<const f16*>(p)[i]);
    default: return widen(static_cast<const float*>(p)[i]);
  }
}

// n is divided by the divisor; the remainder comes back.
FASTDA_DEVICE int64_t divide(int64_t& n, const Divisor& by) {
  const int64_t quotient =
      n < (int64_t(1) << 31) ? int64_t(by.quotient(uint32_t(n))) : n / by.value;
  const int64_t remainder = n - quotient * by.value;
  n = quotient;
  return remainder;
}

// v through the backward of ReLU, or of leaky ReLU, whose output is `mask`: see common/conv.h. With
// v for `mask` the activation itself; a slope of 1 is none.
template <typename S>
FASTDA_DEVICE S masked_wide(S mask, S v, S slope) {
  if (slope == 0) return mask <= 0 ? S(0) : v;  // NaN keeps
  return mask > 0 ? v : v * slope;
}

// The sum over a warp, in the same order every time; every lane gets it.
template <typename S>
FASTDA_DEVICE S warp_sum(S v) {
  for (int distance = 16; distance > 0; distance /= 2)
    v += __shfl_xor_sync(0xffffffffu, v, distance);
  return v;
}

// The sum over a block of `threads`, in the same order every time; every thread gets it. `scratch`
// holds one value per warp and may be used again at once.
template <int threads, typename S>
FASTDA_DEVICE S block_sum(S v, S* scratch) {
  v = warp_sum(v);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  S total = scratch[0];
  FASTDA_UNROLL
  for (int w = 1; w < threads / 32; ++w) total += scratch[w];
  return total;
}

// Sums of M values over the threads of a block, or of a warp (32), whose index leaves the same rest by
// `columns`; in the same order every time, and every thread gets its column's. `scratch` holds M values
// a column of each warp and may be used again at once.
template <int threads, int columns, int M>
FASTDA_DEVICE void column_sum(double (&v)[M], double* scratch) {
  FASTDA_UNROLL
  for (int distance = 16; distance >= columns; distance /= 2) FASTDA_UNROLL
  for (int m = 0; m < M; ++m) v[m] += __shfl_xor_sync(0xffffffffu, v[m], distance);
  if constexpr (threads > 32) {
    constexpr int warps = threads / 32;
    const int column = int(threadIdx.x % columns), warp = int(threadIdx.x / 32);
    __syncthreads();
    FASTDA_UNROLL
    for (int m = 0; m < M; ++m)
      if (threadIdx.x % 32 < columns) scratch[(m * warps + warp) * columns + column] = v[m];
    __syncthreads();
    FASTDA_UNROLL
    for (int m = 0; m < M; ++m) {
      v[m] = scratch[m * warps * columns + column];
      FASTDA_UNROLL
      for (int w = 1; w < warps; ++w) v[m] += scratch[(m * warps + w) * columns + column];
    }
  }
}

}  // namespace fastda::cuda
