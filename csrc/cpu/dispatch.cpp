#include <cstring>

#include "kernels.h"

namespace zorba {
namespace {

#if defined(ZORBA_X86)
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

}  // namespace

const Kernels* find_kernels(const char* isa) {
  const bool best = std::strlen(isa) == 0;
#if defined(ZORBA_X86)
  if ((best || std::strcmp(isa, "avx512") == 0) && runs_avx512()) return &avx512::kKernels;
  if ((best || std::strcmp(isa, "avx2") == 0) && runs_avx2()) return &avx2::kKernels;
#endif
  if (best || std::strcmp(isa, "baseline") == 0) return &baseline::kKernels;
  return nullptr;
}

}  // namespace zorba
