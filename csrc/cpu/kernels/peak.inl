// Compiled once per instruction set, with FASTDA_ISA naming it.
#include "cpu/kernels/peak.h"

#include "cpu/simd/generic.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

constexpr int CHAINS = vector_registers == 32 ? 24 : 12;

// The chains are independent, more than latency × units, and fewer than there are registers.
int64_t multiply_add(int64_t n) {
  F32 chain[CHAINS] = {};
  const F32 factor = broadcast(0.5f), summand = broadcast(1.0f);
  for (int64_t i = 0; i < n; ++i) {
#pragma GCC unroll 24
    for (F32& x : chain) x = x * factor + summand;
#pragma GCC unroll 24
    // What nobody reads must not be left out.
    for (F32& x : chain) asm volatile("" : FASTDA_VECTOR_REGISTER(x));
  }
  return n * CHAINS * lanes<float> * 2;
}

}  // namespace

extern const PeakKernels peak;
const PeakKernels peak = {multiply_add};

}  // namespace fastda::cpu::FASTDA_ISA
