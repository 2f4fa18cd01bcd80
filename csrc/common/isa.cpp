#include "common/isa.h"

#include <cstdlib>
#include <cstring>

namespace fastda {
namespace {

#define FASTDA_NAME_STRING(isa, ...) #isa,
constexpr const char* names[] = {FASTDA_INSTRUCTION_SETS(FASTDA_NAME_STRING, )};
constexpr int count = sizeof names / sizeof *names;

int best_of_this_cpu() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
#define FASTDA_SUPPORTED(isa, header, flags, supported, ...) bool(supported),
  const bool has[] = {FASTDA_INSTRUCTION_SETS(FASTDA_SUPPORTED, )};
  int best = count - 1;
  while (!has[best]) --best;
  return best;
}

Isa choose() {
  const int best = best_of_this_cpu();
  const char* wanted = std::getenv("FASTDA_CPU_ISA");
  if (wanted != nullptr)
    for (int isa = 0; isa < best; ++isa)
      if (std::strcmp(wanted, names[isa]) == 0) return Isa(isa);
  // An unknown name is reported by fastda/backend.py, which reads the same variable before it loads
  // this library.
  return Isa(best);
}

}  // namespace

const char* isa_name(Isa isa) { return names[int(isa)]; }

Isa cpu_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace fastda
