// Compiled once per instruction set, with FASTDA_ISA naming it.
#include "cpu/kernels/winograd.h"

namespace fastda::cpu::FASTDA_ISA {
extern const WinogradKernels winograd;
const WinogradKernels winograd = {};
}  // namespace fastda::cpu::FASTDA_ISA
