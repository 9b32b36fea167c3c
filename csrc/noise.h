// Noise contract, version 2: the one definition that host and device compile.
//
// z(seed, stream, sample, index) is a pure function made of Philox4x32-10 words (Salmon et al.,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and of IEEE-754 single-precision add,
// multiply and fused multiply-add in a fixed order, so that every backend yields the same bits.
// docs/noise.md states the contract in words; zorba_kernels/backends/reference.py is the oracle.
// Compile with -ffp-contract=off (nvcc: -fmad=false): a contracted multiply changes the result.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ZORBA_HD __host__ __device__ __forceinline__
#else
#define ZORBA_HD inline __attribute__((always_inline))
#endif

// Each instruction set compiles this header into a namespace of its own: an inline function shared
// between them would be merged by the linker, and AVX-512 code could end up in the baseline path.
#ifndef ZORBA_ISA
#define ZORBA_ISA baseline
#endif

namespace zorba {
namespace ZORBA_ISA {

constexpr int kNoiseVersion = 2;
constexpr uint32_t kRoundingDomain = 0x80000000u;  // sample | 2^31 marks rounding bits
constexpr int kGaussianBlock = 8;                  // elements a Philox call serves
constexpr int kRademacherBlock = 128;
constexpr uint32_t kRowDomain = 0xC0000000u;     // added to the block of the signs of rows,
constexpr uint32_t kColumnDomain = 0x80000000u;  // and of columns

// Codes of zorba_kernels/noise.py. The one list on this side: everything else switches over it.
enum class Distribution : int32_t { kGaussian = 0, kRademacher = 1, kRank1 = 2 };

ZORBA_HD float as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

ZORBA_HD uint32_t as_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// Correctly rounded a * b + c. Where the processor has no FMA the product is formed exactly in
// double, the sum is rounded to odd (Boldo and Melquiond, "Emulation of FMA and correctly rounded
// sums", 2008), and the narrowing then rounds once.
ZORBA_HD float fma_rn(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  const double product = static_cast<double>(a) * static_cast<double>(b);
  const double addend = static_cast<double>(c);
  const double sum = product + addend;
  const double part = sum - product;
  const double error = (product - (sum - part)) + (addend - part);
  int64_t bits;
  std::memcpy(&bits, &sum, sizeof bits);
  // An inexact sum with an even last bit moves one unit towards the exact value; error is NaN where
  // the sum is not finite, and then neither comparison holds.
  const int64_t away = (error > 0.0) == (sum > 0.0) ? 1 : -1;
  const bool inexact = error > 0.0 || error < 0.0;
  bits += (inexact && (bits & 1) == 0) ? away : 0;
  double odd;
  std::memcpy(&odd, &bits, sizeof odd);
  return static_cast<float>(odd);
#endif
}

// Round keys of Philox depend on the seed alone: computed once a launch, not once a thread.
struct PhiloxKeys {
  uint32_t lo[10];
  uint32_t hi[10];
};

ZORBA_HD PhiloxKeys philox_keys(uint64_t seed) {
  PhiloxKeys keys;
  uint32_t lo = static_cast<uint32_t>(seed);
  uint32_t hi = static_cast<uint32_t>(seed >> 32);
  for (int i = 0; i < 10; ++i) {
    keys.lo[i] = lo;
    keys.hi[i] = hi;
    lo += 0x9E3779B9u;
    hi += 0xBB67AE85u;
  }
  return keys;
}

struct Words {
  uint32_t w0, w1, w2, w3;
};

ZORBA_HD Words philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                          const PhiloxKeys& keys) {
#pragma GCC unroll 10
  for (int i = 0; i < 10; ++i) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ keys.lo[i];
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ keys.hi[i];
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
  }
  return {c0, c1, c2, c3};
}

// (value & mask) | bits; ptxas makes two instructions of it unless it is told.
template <uint32_t mask, uint32_t bits>
ZORBA_HD uint32_t masked_or(uint32_t value) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(value), "n"(mask), "n"(bits));
  return result;
#else
  return (value & mask) | bits;
#endif
}

struct Pair {
  float first, second;
};

// Two standard normals from one word, by Box-Muller. Bits 0-15 give the radius, 16-30 the angle in
// (-pi/2, pi/2), 31 the sign of both. In units that make every constant exact to build:
//   s = -log2((k + 1/2) / 2^16)      exponent and mantissa of the float k + 1/2, a quartic for the
//   rest r = sqrt(s)                      integer seed for 1/sqrt(s), then a quadratic correction
//   z = r * sqrt(2 ln 2) * (cos, sin)(pi * x)   x = (a + 1/2) / 2^15 - 1/2, minimax polynomials
// Measured over all 2^32 words: |variance - 1| < 2e-5, |kurtosis - 3| < 2e-4, KS distance 3.2e-5.
ZORBA_HD Pair box_muller(uint32_t word) {
  const float u = as_float(masked_or<0xFFFFu, 0x4B000000u>(word)) - 8388607.5f;  // k + 1/2, exact
  const uint32_t u_bits = as_bits(u);
  const float m = as_float(masked_or<0x7FFFFFu, 0x3F800000u>(u_bits));
  float g = fma_rn(m, 0x1.43e25cp-4f, -0x1.42d802p-1f);
  g = fma_rn(m, g, 0x1.0b7faap+1f);
  g = fma_rn(m, g, -0x1.8553ecp+1f);
  const float line =
      fma_rn(static_cast<float>(static_cast<int32_t>(u_bits)), -0x1p-23f, 144.5031745f);
  const float s = fma_rn(m, g, line);

  const float y = as_float(0x5F3759DFu - (as_bits(s) >> 1));
  const float t = s * y;
  const float v = t * y;
  const float p = fma_rn(v, fma_rn(v, 0x1.808ae0p-2f, -0x1.408d50p+0f), 0x1.e06a9cp+0f);
  const float r = as_float(as_bits(t * p) ^ (word & 0x80000000u));

  const float x =
      as_float(masked_or<0xFFFEu, 0x4A800000u>(word >> 15)) - 4210687.5f;  // 2^15 x, exact
  const float xx = x * x;
  float c = fma_rn(xx, -0x1.705eaep-90f, 0x1.308724p-58f);
  c = fma_rn(xx, c, -0x1.73cb0cp-28f);
  c = fma_rn(xx, c, 0x1.2d6a3ap+0f);
  float d = fma_rn(xx, 0x1.5a8fa8p-74f, -0x1.83166cp-43f);
  d = fma_rn(xx, d, 0x1.d95234p-14f);
  return {r * c, r * (x * d)};
}

// Bit `bit` of a word as +1 (clear) or -1 (set).
ZORBA_HD float rademacher(uint32_t word, int bit) {
  return as_float(((word << (31 - bit)) & 0x80000000u) | 0x3F800000u);
}

// --- Rounding -----------------------------------------------------------------------------------

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Two blocks of 8 elements that lie 32 blocks apart share one Philox call for their rounding bits:
// lanes of a GPU warp keep their coalesced 16-byte accesses and need half the calls.
ZORBA_HD uint32_t rounding_counter(uint32_t block) { return ((block >> 6) << 5) | (block & 31u); }
ZORBA_HD uint32_t rounding_half(uint32_t block) { return (block >> 5) & 1u; }

// 16 uniform bits for element `e` (0-7) of a block with rounding words (first, second): the
// element's own byte on top, the next byte of the same word below.
ZORBA_HD uint32_t rounding_bits(uint32_t first, uint32_t second, int e) {
  const uint32_t word = e < 4 ? first : second;
  const int own = 8 * (e & 3);
  const int next = 8 * ((e + 1) & 3);
  return (((word >> own) & 0xFFu) << 8) | ((word >> next) & 0xFFu);
}

// Dither of a block, uniform in +-2^-23. Without it an update below half a float32 ulp of the
// weight would be lost before the random bits are added.
ZORBA_HD float rounding_dither(uint32_t first, uint32_t second) {
  return static_cast<float>(static_cast<int32_t>(first + second)) * 0x1p-54f;
}

// Where the accumulator of a stochastic update starts: the dither, uniform over a whole number (one
// or two) of the steps on which weight + sum will land, so that the rounding of that sum is
// unbiased too. The scale is the weight's power of two with the last exponent bit cleared, which
// leaves it finite for an infinite weight. A float16 below 2^-14 lands on steps of 2^-37 (see
// round_stochastic).
template <DType dtype>
ZORBA_HD float rounding_start(float weight, float dither) {
  uint32_t scale = as_bits(weight) & 0x7F000000u;
  if constexpr (dtype == DType::kFloat16) scale = scale < 0x38000000u ? 0x38000000u : scale;
  return as_float(scale) * dither;
}

// float32 -> the nearest value of the dtype (ties to even), still as a float32.
template <DType dtype>
ZORBA_HD float round_nearest(float value) {
  const uint32_t bits = as_bits(value);
  if constexpr (dtype == DType::kBFloat16) {
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
    return as_float(value != value ? 0x7FC00000u : rounded);
  } else if constexpr (dtype == DType::kFloat16) {
    const uint32_t sign = bits & 0x80000000u;
    const uint32_t size = bits ^ sign;
    const float small = (as_float(size) + 0.5f) - 0.5f;  // multiples of 2^-24
    const uint32_t big = (size + 0xFFFu + ((size >> 13) & 1u)) & 0xFFFFE000u;
    uint32_t out = size < 0x38800000u ? as_bits(small) : big;
    out = out >= 0x47800000u ? 0x7F800000u : out;
    return as_float(size > 0x7F800000u ? 0x7FC00000u : out | sign);
  } else {
    return value;
  }
}

// float32 -> one of the two neighbours of the dtype, with 16 random bits below the last kept bit:
// unbiased, E[result] = value. A float32 stays as it is.
template <DType dtype>
ZORBA_HD float round_stochastic(float value, uint32_t random16) {
  const uint32_t bits = as_bits(value);
  if constexpr (dtype == DType::kBFloat16) {
    const uint32_t rounded = (bits + random16) & 0xFFFF0000u;
    return as_float((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC00000u : rounded);
  } else if constexpr (dtype == DType::kFloat16) {
    const uint32_t sign = bits & 0x80000000u;
    const uint32_t size = bits ^ sign;
    // Below 2^-14 the half grid is even: adding 2^-14 puts its step at bit 13 as for a normal half.
    const float lift = size < 0x38800000u ? 0x1p-14f : 0.0f;
    const uint32_t cut = (as_bits(as_float(size) + lift) + (random16 >> 3)) & 0xFFFFE000u;
    uint32_t out = as_bits(as_float(cut) - lift);
    out = out >= 0x47800000u ? 0x7F800000u : out;
    return as_float(size > 0x7F800000u ? 0x7FC00000u : out | sign);
  } else {
    return value;
  }
}

// --- Storage ------------------------------------------------------------------------------------

ZORBA_HD float load_bfloat16(uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }

// Exact: the value is already on the bfloat16 grid.
ZORBA_HD uint16_t store_bfloat16(float value) {
  return static_cast<uint16_t>(as_bits(value) >> 16);
}

ZORBA_HD float load_float16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t size = half & 0x7FFFu;
  const uint32_t normal = (size << 13) + 0x38000000u;
  const float small = as_float(size | 0x3F000000u);  // 0.5 + size * 2^-24
  uint32_t out = size < 0x0400u ? as_bits(small - 0.5f) : normal;
  out = size >= 0x7C00u ? (size << 13) | 0x7F800000u : out;
  return as_float(out | sign);
}

// Exact: the value is already on the float16 grid.
ZORBA_HD uint16_t store_float16(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t size = bits & 0x7FFFFFFFu;
  const uint32_t small = as_bits(as_float(size) + 0.5f) & 0x7FFu;
  uint32_t out = size < 0x38800000u ? small : (size - 0x38000000u) >> 13;
  out = size >= 0x7F800000u ? 0x7C00u | ((size >> 13) & 0x3FFu) : out;
  return static_cast<uint16_t>(out | sign);
}

// --- Fingerprint --------------------------------------------------------------------------------

// Finaliser of MurmurHash3 (Appleby, public domain): a bijection of 64 bits.
ZORBA_HD uint64_t mix64(uint64_t x) {
  x ^= x >> 33;
  x *= 0xFF51AFD7ED558CCDull;
  x ^= x >> 33;
  x *= 0xC4CEB9FE1A85EC53ull;
  x ^= x >> 33;
  return x;
}

// The fingerprint is the sum, over all parameters, of a header and of all lanes. The header tells
// dtypes apart, and zeros at the end from the zero bytes that fill up the last lane.
ZORBA_HD uint64_t fingerprint_header(uint64_t numel, DType dtype, uint64_t stream) {
  return mix64((numel << 2 | static_cast<uint64_t>(dtype)) ^ stream);
}

// Hash of the 8 bytes at lane `lane` of a parameter.
ZORBA_HD uint64_t fingerprint_lane(uint64_t bytes, uint64_t stream, uint64_t lane) {
  return mix64(bytes ^ (stream + 0x9E3779B97F4A7C15ull * (lane + 1)));
}

}  // namespace ZORBA_ISA
}  // namespace zorba
