// Compiled once per instruction set, with FASTDA_ISA naming it.
#include "cpu/kernels/peak.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, CHAINS = 24;
#elif defined(__AVX2__)
constexpr int LANES = 8, CHAINS = 12;
#else
constexpr int LANES = 4, CHAINS = 12;
#endif
typedef float Lanes __attribute__((vector_size(4 * LANES)));

// The chains are independent, more than latency × units, and fewer than there are registers.
int64_t multiply_add(int64_t n) {
  Lanes chain[CHAINS] = {};
  const Lanes factor = Lanes{} + 0.5f, summand = Lanes{} + 1.0f;
  for (int64_t i = 0; i < n; ++i) {
#pragma GCC unroll 24
    for (Lanes& x : chain) x = x * factor + summand;
#pragma GCC unroll 24
    for (Lanes& x : chain) asm volatile("" : "+v"(x));  // what nobody reads must not be left out
  }
  return n * CHAINS * LANES * 2;
}

}  // namespace

extern const PeakKernels peak;
const PeakKernels peak = {multiply_add};

}  // namespace fastda::cpu::FASTDA_ISA
