// What the CPU backend offers, once for each instruction set, and the tables it reads.
#pragma once

#include <cstdint>

namespace zorba {

// One contiguous run of a parameter. Seven int64 a row, as Python packs it.
struct Segment {
  int64_t src;     // address of the first element read
  int64_t dst;     // address of the first element written; src for an in-place pass
  int64_t numel;   // elements
  int64_t offset;  // row-major index of the first element in the whole parameter
  int64_t stream;  // bits of the uint64 stream
  int64_t dtype;   // noise.h DType
  int64_t group;   // row of coefs
};

// What a pass adds: rounds of noise terms, each with a share of the weight itself taken off.
struct Program {
  const uint64_t* seeds;           // [terms]
  const uint32_t* samples;         // [terms]
  const float* coefs;              // [groups, terms]
  int64_t terms;                   //
  const float* decays;             // [groups, rounds]
  const int64_t* round_ends;       // [rounds], index one past each round's last term
  const uint64_t* rounding_seeds;  // [rounds]
  int64_t rounds;                  //
  bool gaussian;                   // else Rademacher
  bool stochastic;                 // else to nearest even
};

struct Kernels {
  const char* isa;
  void (*add_noise)(const Segment* segments, int64_t count, const Program& program, int threads);
  void (*noise)(float* out, int64_t numel, int64_t offset, uint64_t seed, uint64_t stream,
                uint32_t sample, bool gaussian, int threads);
  uint64_t (*fingerprint)(const Segment* segments, int64_t count, int threads);
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
