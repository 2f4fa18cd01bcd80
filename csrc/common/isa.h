// Which instruction set serves this process.
#pragma once

// The instruction sets that kernels are compiled for, each better than the one before it: name,
// header in cpu/simd, compiler flags, whether the running CPU has it. The build reads this table too
// (instruction_sets.py).
// clang-format off
#if defined(__x86_64__)
#define FASTDA_CPU_HAS(feature) __builtin_cpu_supports(feature)
#define FASTDA_INSTRUCTION_SETS(row, ...)                                                          \
  row(base, "generic.h", "", true, __VA_ARGS__)                                                    \
  row(avx2, "f32_avx2.h", "-mavx2 -mfma -mf16c",                                                   \
      FASTDA_CPU_HAS("avx2") && FASTDA_CPU_HAS("fma"), __VA_ARGS__)                                \
  row(avx512, "f32_avx512.h",                                                                      \
      "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",  \
      FASTDA_CPU_HAS("avx512f") && FASTDA_CPU_HAS("avx512bw") && FASTDA_CPU_HAS("avx512dq") &&     \
      FASTDA_CPU_HAS("avx512vl"), __VA_ARGS__)
#elif defined(__aarch64__)
#define FASTDA_INSTRUCTION_SETS(row, ...)                                                          \
  row(base, "generic.h", "", true, __VA_ARGS__)                                                    \
  row(neon, "f32_neon.h", "", true, __VA_ARGS__)
#else
#define FASTDA_INSTRUCTION_SETS(row, ...)                                                          \
  row(base, "generic.h", "", true, __VA_ARGS__)
#endif
// clang-format on

namespace fastda {

#define FASTDA_ISA_NAME(isa, ...) isa,
enum class Isa : int { FASTDA_INSTRUCTION_SETS(FASTDA_ISA_NAME, ) };

// The best instruction set of the running CPU, or a lower one that FASTDA_CPU_ISA asks for. Settled
// at the first call, which is at load.
Isa cpu_isa();
const char* isa_name(Isa isa);

// A kernel family `name` is one table of function pointers per instruction set, such as
// fastda::cpu::avx2::name. FASTDA_DECLARE_KERNELS(Table, name) declares them, and name_kernels()
// returns the one to use.
#define FASTDA_DECLARE_TABLE(isa, header, flags, supported, Table, name) \
  namespace isa {                                                        \
  extern const Table name;                                               \
  }
#define FASTDA_TABLE_ADDRESS(isa, header, flags, supported, Table, name) &isa::name,
#define FASTDA_DECLARE_KERNELS(Table, name)                          \
  FASTDA_INSTRUCTION_SETS(FASTDA_DECLARE_TABLE, Table, name)         \
  inline const Table& name##_kernels() {                             \
    constexpr const Table* tables[] = {                              \
        FASTDA_INSTRUCTION_SETS(FASTDA_TABLE_ADDRESS, Table, name)}; \
    return *tables[int(::fastda::cpu_isa())];                        \
  }

}  // namespace fastda
