// Weights in registers and in memory, and the noise of a block of eight.
#pragma once

#include "tables.h"

namespace zorba {
namespace device {

// --- Values --------------------------------------------------------------------------------------

template <DType dtype>
constexpr int kBytes = dtype == DType::kFloat32 ? 4 : 2;
// 32-bit words of a block.
template <DType dtype>
constexpr int kWords = kGaussianBlock * kBytes<dtype> / 4;

// Element e of a block held in words.
template <DType dtype>
ZORBA_HD float element(const uint32_t* words, int e) {
  if constexpr (dtype == DType::kFloat32) {
    return as_float(words[e]);
  } else if constexpr (dtype == DType::kBFloat16) {
    return as_float(e % 2 == 0 ? words[e / 2] << 16 : words[e / 2] & 0xFFFF0000u);
  } else {
    const auto half = static_cast<uint16_t>(e % 2 == 0 ? words[e / 2] : words[e / 2] >> 16);
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
#else
    return load_float16(half);
#endif
  }
}

// Bytes of (high, low), byte i the one that digit i of the selector names.
template <uint32_t selector>
ZORBA_HD uint32_t permute_bytes(uint32_t low, uint32_t high) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(low, high, selector);
#else
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const auto byte = static_cast<unsigned char>(both >> (8 * (selector >> (4 * i) & 7)));
    result |= static_cast<uint32_t>(byte) << (8 * i);
  }
  return result;
#endif
}

// Two floats to the nearest 16-bit values, packed. The processor's NaN is 0x7FFF where the
// contract's is another one: only for weights that all_finite() has passed.
template <DType dtype>
ZORBA_HD uint32_t pack_nearest(float low, float high) {
  uint32_t word;
#if defined(__CUDA_ARCH__)
  if constexpr (dtype == DType::kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
#else
  const float values[2] = {low, high};
  word = 0;
  for (int i = 0; i < 2; ++i) {
    const float rounded = round_nearest<dtype>(values[i]);
    const uint32_t half = rounded != rounded          ? 0x7FFFu
                          : dtype == DType::kBFloat16 ? store_bfloat16(rounded)
                                                      : store_float16(rounded);
    word |= half << (16 * i);
  }
#endif
  return word;
}

// The same with 16 random bits each.
template <DType dtype>
ZORBA_HD uint32_t pack_stochastic(float low, float high, uint32_t random_low,
                                  uint32_t random_high) {
  if constexpr (dtype == DType::kBFloat16) {
    const uint32_t a = as_bits(low) + random_low;
    const uint32_t b = as_bits(high) + random_high;
    return permute_bytes<0x7632>(a, b);
  } else {
    return pack_nearest<dtype>(round_stochastic<dtype>(low, random_low),
                               round_stochastic<dtype>(high, random_high));
  }
}

// rounding_bits() as one byte permutation.
ZORBA_HD uint32_t random16(uint32_t first, uint32_t second, int e) {
#if defined(__CUDA_ARCH__)
  const int own = e & 3;
  const int next = (e + 1) & 3;
  return __byte_perm(e < 4 ? first : second, 0, 0x4400 | own << 4 | next);
#else
  return rounding_bits(first, second, e);
#endif
}

// --- Memory --------------------------------------------------------------------------------------

// `once`: nobody reads it again soon, so that caches may drop it first.
template <DType dtype, bool once = true>
ZORBA_HD void load_block(const char* at, uint32_t (&words)[kWords<dtype>]) {
#if defined(__CUDA_ARCH__)
#pragma unroll
  for (int i = 0; i < kWords<dtype>; i += 4) {
    const auto* from = reinterpret_cast<const uint4*>(at + 4 * i);
    const uint4 v = once ? __ldcs(from) : *from;
    words[i] = v.x;
    words[i + 1] = v.y;
    words[i + 2] = v.z;
    words[i + 3] = v.w;
  }
#else
  std::memcpy(words, at, sizeof words);
#endif
}

template <DType dtype, bool once = true>
ZORBA_HD void store_block(char* at, const uint32_t (&words)[kWords<dtype>]) {
#if defined(__CUDA_ARCH__)
#pragma unroll
  for (int i = 0; i < kWords<dtype>; i += 4) {
    auto* to = reinterpret_cast<uint4*>(at + 4 * i);
    const uint4 v = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    if constexpr (once) {
      __stcs(to, v);
    } else {
      *to = v;
    }
  }
#else
  std::memcpy(at, words, sizeof words);
#endif
}

// To shared memory, in one access.
ZORBA_HD void store_words(uint32_t* at, const Words& words) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<uint4*>(at) = make_uint4(words.w0, words.w1, words.w2, words.w3);
#else
  std::memcpy(at, &words, sizeof words);
#endif
}

template <DType dtype>
ZORBA_HD float load_element(const char* at) {
  if constexpr (dtype == DType::kFloat32) return *reinterpret_cast<const float*>(at);
  if constexpr (dtype == DType::kBFloat16) {
    return load_bfloat16(*reinterpret_cast<const uint16_t*>(at));
  }
  if constexpr (dtype == DType::kFloat16) {
    return load_float16(*reinterpret_cast<const uint16_t*>(at));
  }
}

template <DType dtype>
ZORBA_HD void store_element(char* at, float value) {
  if constexpr (dtype == DType::kFloat32) *reinterpret_cast<float*>(at) = value;
  if constexpr (dtype == DType::kBFloat16) *reinterpret_cast<uint16_t*>(at) = store_bfloat16(value);
  if constexpr (dtype == DType::kFloat16) *reinterpret_cast<uint16_t*>(at) = store_float16(value);
}

// --- Noise ---------------------------------------------------------------------------------------

struct Stream {
  uint32_t lo, hi;
};

ZORBA_HD Stream stream_of(const Segment& s) {
  const auto bits = static_cast<uint64_t>(s.stream);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

// z of the 8 elements of a block, without help from other lanes.
template <Distribution distribution>
ZORBA_HD void noise_block(uint32_t block, Stream stream, uint32_t sample, const PhiloxKeys& keys,
                          float (&z)[kGaussianBlock]) {
  constexpr uint32_t kRatio = kRademacherBlock / kGaussianBlock;
  constexpr bool kGaussian = distribution == Distribution::kGaussian;
  const uint32_t counter = kGaussian ? block : block / kRatio;
  const Words words = philox4x32(counter, stream.lo, stream.hi, sample, keys);
  if constexpr (kGaussian) {
    const uint32_t all[4] = {words.w0, words.w1, words.w2, words.w3};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Pair pair = box_muller(all[j]);
      z[2 * j] = pair.first;
      z[2 * j + 1] = pair.second;
    }
  } else {
    const uint32_t at = block % kRatio;  // byte of the call
    const uint32_t low = at < 4 ? words.w0 : words.w1;
    const uint32_t high = at < 12 ? words.w2 : words.w3;
    const uint32_t signs = (at < 8 ? low : high) >> (8 * (at % 4));
#pragma unroll
    for (int e = 0; e < kGaussianBlock; ++e) z[e] = rademacher(signs, e);
  }
}

struct RoundingWords {
  uint32_t first, second;
};

ZORBA_HD RoundingWords rounding_words(uint32_t block, Stream stream, const PhiloxKeys& keys) {
  const Words w = philox4x32(rounding_counter(block), stream.lo, stream.hi, kRoundingDomain, keys);
  return rounding_half(block) == 0 ? RoundingWords{w.w0, w.w1} : RoundingWords{w.w2, w.w3};
}

// What the sum of a round starts from. Nothing to start from is 0, not weight * 0: a weight may be
// infinite.
template <DType dtype, bool stochastic>
ZORBA_HD float start_of_sum(float weight, float dither, float decay) {
  const float start = stochastic ? rounding_start<dtype>(weight, dither) : 0.0f;
  return decay != 0.0f ? fma_rn(weight, -decay, start) : start;
}

}  // namespace device
}  // namespace zorba
