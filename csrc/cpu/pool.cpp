#include "cpu/pool.h"

namespace fastda::cpu {

FASTDA_CPU_LIBRARY(m) { register_pool<Pool>(m); }

}  // namespace fastda::cpu
