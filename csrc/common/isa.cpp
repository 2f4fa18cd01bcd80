#include "common/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastda {
namespace {

Isa hardware_isa() {
#if FASTDA_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::base;
}

Isa choose() {
  const Isa best = hardware_isa();
  const char* wanted = std::getenv("FASTDA_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (Isa isa : {Isa::base, Isa::avx2, Isa::avx512})
    if (std::strcmp(wanted, isa_name(isa)) == 0) return isa < best ? isa : best;
  // An unknown name is reported by fastda/backend.py, which reads the same variable before it loads
  // this library.
  return best;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "base";
  }
}

Isa cpu_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace fastda
