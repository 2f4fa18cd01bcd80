// Which instruction set serves this process.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define FASTDA_X86 1
#else
#define FASTDA_X86 0
#endif

namespace fastda {

enum class Isa : int { base = 0, avx2 = 1, avx512 = 2 };

// The best instruction set of the running CPU, or a lower one that FASTDA_CPU_ISA asks for. Settled
// at the first call, which is at load.
Isa cpu_isa();
const char* isa_name(Isa isa);

// A kernel family `name` is one table of function pointers per instruction set:
// fastda::cpu::{base,avx2,avx512}::name. FASTDA_DECLARE_KERNELS(Table, name) declares them, and
// name_kernels() returns the one to use.
#if FASTDA_X86
#define FASTDA_DECLARE_KERNELS(Table, name)            \
  namespace base {                                     \
  extern const Table name;                             \
  }                                                    \
  namespace avx2 {                                     \
  extern const Table name;                             \
  }                                                    \
  namespace avx512 {                                   \
  extern const Table name;                             \
  }                                                    \
  inline const Table& name##_kernels() {               \
    switch (::fastda::cpu_isa()) {                     \
      case ::fastda::Isa::avx512: return avx512::name; \
      case ::fastda::Isa::avx2: return avx2::name;     \
      default: return base::name;                      \
    }                                                  \
  }
#else
#define FASTDA_DECLARE_KERNELS(Table, name) \
  namespace base {                          \
  extern const Table name;                  \
  }                                         \
  inline const Table& name##_kernels() { return base::name; }
#endif

}  // namespace fastda
