// CUDA's names for a host compiler: what csrc/cuda/kernels/device.cuh includes where nvcc is not at
// work.
//
// Every thread of a block is a fiber (executor.cpp). It runs until it meets a barrier or an
// instruction that its warp executes together, and another thread, chosen by the seed, goes on.
// What a GPU leaves undefined stops the launch with an error: a barrier that not all threads reach,
// a warp whose lanes part ways, a misaligned access. Shared memory starts every block full of NaN;
// AddressSanitizer watches every access.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "common/dtype.h"

#define FASTDA_KERNEL(...) void
#define FASTDA_DEVICE inline
#define FASTDA_DEVICE_CALL inline
#define FASTDA_HOST_DEVICE inline
#define FASTDA_UNROLL
#define FASTDA_NO_UNROLL
#define FASTDA_SHARED(type, name, count) \
  type* name = static_cast<type*>(::cuda_host::shared_array(sizeof(type) * (count)))
#define FASTDA_DYNAMIC_SHARED(name) unsigned char* name = ::cuda_host::dynamic_shared()

#define threadIdx (::cuda_host::self->thread)
#define blockIdx (::cuda_host::self->block)
#define blockDim (::cuda_host::self->threads)
#define gridDim (::cuda_host::self->blocks)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_host {

using Where = std::source_location;

// What a running thread can see of itself.
struct Self {
  dim3 thread, block, threads, blocks;
};
extern const Self* self;

// Ends the launch with an error that says which thread and where.
[[noreturn]] void fail(const std::string& what);

void* shared_array(size_t bytes, Where where = Where::current());
unsigned char* dynamic_shared();

// The warp's 32 lanes meet at one place in the source; the last to come runs `together` on what
// each brought.
void meet(const char* what, const Where& where, void* mine, void (*together)(void* const* lanes));

template <typename T>
T* aligned(T* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    fail("misaligned access of " + std::to_string(bytes) + " bytes");
  return p;
}

// `kernel` and `parameters` are for PTX, which runs in place of `body` once it is loaded (ptx.h).
void launch(const char* name, dim3 grid, unsigned threads, size_t shared_bytes,
            const std::function<void()>& body, const void* kernel = nullptr,
            const std::vector<unsigned char>& parameters = {});

// Arguments as a kernel finds them: one after the other, each at its alignment.
template <typename... Arguments>
std::vector<unsigned char> packed(const Arguments&... arguments) {
  std::vector<unsigned char> bytes;
  const auto add = [&](const auto& a) {
    bytes.resize((bytes.size() + alignof(decltype(a)) - 1) / alignof(decltype(a)) *
                 alignof(decltype(a)));
    const auto* p = reinterpret_cast<const unsigned char*>(&a);
    bytes.insert(bytes.end(), p, p + sizeof a);
  };
  (add(arguments), ...);
  return bytes;
}

// Attributes of the device that is played.
struct Device {
  int multiprocessors = 3;
  size_t shared_bytes_per_block = 227 << 10;
};
extern Device device;

// Makes lanes' values known to each other.
template <typename T>
struct Shuffle {
  T value, result;
  int source;
  static T run(const char* what, const Where& where, unsigned mask, T value, int source) {
    if (mask != 0xffffffffu) fail(std::string(what) + ": only the full mask is modelled");
    Shuffle mine{value, value, source};
    meet(what, where, &mine, [](void* const* lanes) {
      for (int l = 0; l < 32; ++l) {
        auto* lane = static_cast<Shuffle*>(lanes[l]);
        if (lane->source >= 0 && lane->source < 32)
          lane->result = static_cast<Shuffle*>(lanes[lane->source])->value;
      }
    });
    return mine.result;
  }
};
inline int lane_id() { return int(self->thread.x % 32); }

// Matrix instructions, executor.cpp. `kind`: how the operands are read.
enum class Kind { bf16, f16, tf32 };
void load_matrices(uint32_t* result, const void* row, bool transposed, const Where& where);
void mma(Kind kind, float* d, const uint32_t* a, uint32_t b0, uint32_t b1, const Where& where);
void copy_async(void* to, const void* from, bool inside);
void commit_copies();
void wait_copies(int pending);

}  // namespace cuda_host

void __syncthreads(cuda_host::Where where = cuda_host::Where::current());

template <typename T>
T __shfl_sync(unsigned mask, T v, int source,
              cuda_host::Where where = cuda_host::Where::current()) {
  return cuda_host::Shuffle<T>::run("__shfl_sync", where, mask, v, source % 32);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int other,
                  cuda_host::Where where = cuda_host::Where::current()) {
  return cuda_host::Shuffle<T>::run("__shfl_xor_sync", where, mask, v,
                                    cuda_host::lane_id() ^ other);
}

namespace fastda::cuda {

template <typename T, int N>
struct Pack;

template <int N, typename T>
Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(cuda_host::aligned(p, sizeof(T) * N));
}
template <typename T, int N>
void store_pack(T* p, Pack<T, N> pack) {
  *reinterpret_cast<Pack<T, N>*>(cuda_host::aligned(p, sizeof(T) * N)) = pack;
}

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(bf16 v) { return load(&v); }
inline float widen(f16 v) { return load(&v); }
template <typename T>
void narrow(float v, T& out) {
  store(&out, v);
}
inline void narrow(double v, double& out) { out = v; }
inline uint32_t bits_of(float v) { return float_to_bits(v); }
inline float float_of(uint32_t bits) { return bits_to_float(bits); }
// To nearest, halves away from zero; NaN and infinities stay.
inline uint32_t round_tf32(float v) {
  if (v != v) return 0x7fffffffu;
  const uint32_t bits = float_to_bits(v);
  return std::isinf(v) ? bits : (bits + 0x1000u) & ~0x1fffu;
}

inline void copy_async(void* to, const void* from, bool inside) {
  cuda_host::copy_async(to, from, inside);
}
inline void commit_copies() { cuda_host::commit_copies(); }
template <int pending>
void wait_copies() {
  cuda_host::wait_copies(pending);
}
inline void load_matrices(uint32_t (&r)[4], const void* row,
                          cuda_host::Where where = cuda_host::Where::current()) {
  cuda_host::load_matrices(r, row, false, where);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row,
                                     cuda_host::Where where = cuda_host::Where::current()) {
  cuda_host::load_matrices(r, row, true, where);
}
inline void mma(bf16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                cuda_host::Where where = cuda_host::Where::current()) {
  cuda_host::mma(cuda_host::Kind::bf16, d, a, b0, b1, where);
}
inline void mma(f16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                cuda_host::Where where = cuda_host::Where::current()) {
  cuda_host::mma(cuda_host::Kind::f16, d, a, b0, b1, where);
}
inline void mma(float, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                cuda_host::Where where = cuda_host::Where::current()) {
  cuda_host::mma(cuda_host::Kind::tf32, d, a, b0, b1, where);
}

}  // namespace fastda::cuda
