// Weights of a strip in the registers of a warp: load, begin a round, add normals, end it, store.
//
// In each strip a lane has two Philox blocks of 8 elements, 32 blocks apart: accesses of 16 bytes
// stay coalesced, and one Philox call gives the rounding bits of both (see rounding_counter).
#pragma once

#include "values.h"

namespace zorba {
namespace device {

// A strip: 64 whole, aligned blocks.
template <DType dtype>
struct Held {
  uint32_t words[kHalves][kWords<dtype>];  // the weights as stored
  float sum[kHeld];
  Words rounding;
};

// False if any of the 16-bit weights is infinite or NaN; may also be false for very large ones,
// whose products overflow. A NaN can only come out of a round that such a weight went into:
// coefficients, decay and z are finite, and a fused multiply-add of finite factors is never inf -
// inf.
template <DType dtype, int strips>
ZORBA_HD bool all_finite(const Held<dtype> (&held)[strips]) {
  if constexpr (dtype == DType::kFloat32) {
    return true;  // the processor's NaN is kept
  } else {
#if defined(__CUDA_ARCH__)
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < strips; ++i) {
#pragma unroll
      for (int j = 0; j < kWords<dtype>; ++j) {
        const uint32_t a = held[i].words[0][j];
        const uint32_t b = held[i].words[1][j];
        if constexpr (dtype == DType::kBFloat16) {
          asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
        } else {
          asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(0u));
          asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(b), "r"(0u));
        }
      }
    }
    // Times 0: what is not finite becomes NaN, the rest 0 of either sign.
    if constexpr (dtype == DType::kBFloat16) {
      asm("fma.rn.bf16x2 %0, %0, %1, %1;" : "+r"(sum) : "r"(0u));
    }
    return (sum & 0x7FFF7FFFu) == 0;
#else
    constexpr uint32_t kInfinity = dtype == DType::kBFloat16 ? 0x7F80u : 0x7C00u;
    for (const Held<dtype>& strip : held) {
      for (const auto& block : strip.words) {
        for (const uint32_t word : block) {
          if ((word & 0x7FFFu) >= kInfinity || (word >> 16 & 0x7FFFu) >= kInfinity) return false;
        }
      }
    }
    return true;
#endif
  }
}

template <DType dtype, bool stochastic, bool decays>
ZORBA_HD void begin_round(uint32_t block, Stream stream, const PhiloxKeys& keys, float decay,
                          Held<dtype>& held) {
  if constexpr (stochastic) {
    held.rounding =
        philox4x32(rounding_counter(block), stream.lo, stream.hi, kRoundingDomain, keys);
  }
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    const float dither = h == 0 ? rounding_dither(held.rounding.w0, held.rounding.w1)
                                : rounding_dither(held.rounding.w2, held.rounding.w3);
#pragma unroll
    for (int e = 0; e < kGaussianBlock; ++e) {
      const float weight = element<dtype>(held.words[h], e);
      held.sum[8 * h + e] = start_of_sum<dtype, stochastic>(weight, dither, decays ? decay : 0.0f);
    }
  }
}

template <DType dtype>
ZORBA_HD void add_gaussian(uint32_t block, Stream stream, uint32_t sample, const PhiloxKeys& keys,
                           float coef, Held<dtype>& held) {
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    float z[kGaussianBlock];
    noise_block<Distribution::kGaussian>(block + kLanes * h, stream, sample, keys, z);
#pragma unroll
    for (int e = 0; e < kGaussianBlock; ++e) {
      held.sum[8 * h + e] = fma_rn(coef, z[e], held.sum[8 * h + e]);
    }
  }
}

template <DType dtype, bool stochastic>
ZORBA_HD void end_round(Held<dtype>& held) {
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    const uint32_t first = h == 0 ? held.rounding.w0 : held.rounding.w2;
    const uint32_t second = h == 0 ? held.rounding.w1 : held.rounding.w3;
    uint32_t (&words)[kWords<dtype>] = held.words[h];
    const float* sum = held.sum + 8 * h;
#pragma unroll
    for (int e = 0; e < kGaussianBlock; e += 2) {
      const float low = element<dtype>(words, e) + sum[e];
      const float high = element<dtype>(words, e + 1) + sum[e + 1];
      if constexpr (dtype == DType::kFloat32) {
        words[e] = as_bits(low);
        words[e + 1] = as_bits(high);
      } else if constexpr (stochastic) {
        words[e / 2] = pack_stochastic<dtype>(low, high, random16(first, second, e),
                                              random16(first, second, e + 1));
      } else {
        words[e / 2] = pack_nearest<dtype>(low, high);
      }
    }
  }
}

// Bytes from the start of a segment to the first block of a lane in a strip.
template <DType dtype>
ZORBA_HD int64_t shift_to(const Segment& segment, uint32_t strip, int lane) {
  return (static_cast<int64_t>(strip) * kStrip + lane * kGaussianBlock - segment.offset) *
         kBytes<dtype>;
}

// Addresses of the first block of a lane in a strip.
struct Place {
  const char* src;
  char* dst;
};

template <DType dtype>
ZORBA_HD void load_strip(const char* at, Held<dtype>& held) {
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    load_block<dtype>(at + h * (kStrip / kHalves * kBytes<dtype>), held.words[h]);
  }
}

template <DType dtype>
ZORBA_HD void store_strip(char* at, const Held<dtype>& held) {
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    store_block<dtype>(at + h * (kStrip / kHalves * kBytes<dtype>), held.words[h]);
  }
}

}  // namespace device
}  // namespace zorba
