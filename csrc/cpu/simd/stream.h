// Stores past the cache, where the instruction set has them: whole vectors at addresses that are
// aligned to them. They save reading the line first, and pay where the result is too large to be
// found in the cache later. stream_fence() comes after the last one.
#pragma once

#include "cpu/simd/generic.h"

namespace fastda::cpu::FASTDA_ISA {
namespace {

#if FASTDA_SIMD && defined(__AVX512F__)
FASTDA_INLINE void stream_vec(float* p, F32 x) { _mm512_stream_ps(p, x); }
FASTDA_INLINE void stream_fence() { _mm_sfence(); }
#elif FASTDA_SIMD && defined(__AVX2__)
FASTDA_INLINE void stream_vec(float* p, F32 x) { _mm256_stream_ps(p, x); }
FASTDA_INLINE void stream_fence() { _mm_sfence(); }
#else
FASTDA_INLINE void stream_vec(float* p, F32 x) { store_vec(p, x); }
FASTDA_INLINE void stream_fence() {}
#endif

}  // namespace
}  // namespace fastda::cpu::FASTDA_ISA
