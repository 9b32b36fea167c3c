// What the CPU backend offers, once for each instruction set.
#pragma once

#include "../packed.h"

namespace zorba {

struct Kernels {
  const char* isa;
  void (*add_noise)(const Segment* segments, int64_t count, const Program& program, int threads);
  void (*noise)(float* out, int64_t numel, int64_t offset, uint64_t seed, uint64_t stream,
                uint32_t sample, int64_t distribution, int64_t columns, int threads);
  uint64_t (*fingerprint)(const Segment* segments, int64_t count, int threads);
  void (*perturb)(const Perturbation& perturbation, int threads);
};

namespace baseline {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}

// The kernels for `isa` ("avx512", "avx2", "baseline"), or the best this processor runs for an
// empty string; null when the name is unknown, was not built, or the processor lacks the
// instructions.
const Kernels* find_kernels(const char* isa);

}  // namespace zorba
