// Philox over many counters at once. A 32-bit counter word sits in the low half of each 64-bit
// lane, which is what the widening multiply of x86 reads; the high half is never looked at.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../noise.h"

namespace zorba {
namespace ZORBA_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 2;
#endif
typedef uint64_t Lanes __attribute__((vector_size(8 * kLanes)));
typedef uint32_t HalfLanes __attribute__((vector_size(4 * kLanes)));

// Low half times low half, 64 bits of product in each lane.
inline Lanes multiply_low(Lanes a, Lanes b) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Lanes)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFFull) * (b & 0xFFFFFFFFull);
#endif
}

// The low half of each lane, packed.
inline void store_low(Lanes lanes, uint32_t* out) {
  const auto low = __builtin_convertvector(lanes, HalfLanes);
  std::memcpy(out, &low, sizeof low);
}

// Copies to memory past the caches; both ends are aligned to 64 bytes. What is written this way is
// seen by other threads after `streamed`.
inline void stream_out(const uint32_t* from, uint32_t* to, int words) {
#if defined(__AVX512F__)
  for (int i = 0; i < words; i += 16) {
    _mm512_stream_si512((__m512i*)(to + i), _mm512_load_si512(from + i));
  }
#elif defined(__AVX2__)
  for (int i = 0; i < words; i += 8) {
    _mm256_stream_si256((__m256i*)(to + i), _mm256_load_si256((const __m256i*)(from + i)));
  }
#elif defined(__SSE2__)
  for (int i = 0; i < words; i += 4) {
    _mm_stream_si128((__m128i*)(to + i), _mm_load_si128((const __m128i*)(from + i)));
  }
#else
  std::memcpy(to, from, words * sizeof(uint32_t));
#endif
}

inline void streamed() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

struct Stream {
  uint32_t lo, hi;
  explicit Stream(uint64_t stream)
      : lo(static_cast<uint32_t>(stream)), hi(static_cast<uint32_t>(stream >> 32)) {}
};

// words[j][i] is word j of Philox block `first + i`. Same results as philox4x32, several vectors at
// a time so that their multiplies overlap.
template <int count>
inline void philox_words(uint32_t first, Stream stream, uint32_t sample, const PhiloxKeys& keys,
                         uint32_t (*words)[count]) {
  static_assert(count % kLanes == 0, "whole vectors");
  constexpr int kAtOnce = count % (4 * kLanes) == 0 ? 4 : count % (2 * kLanes) == 0 ? 2 : 1;
  const Lanes m0 = Lanes{} + 0xD2511F53ull;
  const Lanes m1 = Lanes{} + 0xCD9E8D57ull;
  for (int base = 0; base < count; base += kAtOnce * kLanes) {
    Lanes c0[kAtOnce] = {}, c1[kAtOnce], c2[kAtOnce], c3[kAtOnce];
    for (int v = 0; v < kAtOnce; ++v) {
      for (int i = 0; i < kLanes; ++i) {
        c0[v][i] = static_cast<uint32_t>(first + base + v * kLanes + i);
      }
      c1[v] = Lanes{} + stream.lo;
      c2[v] = Lanes{} + stream.hi;
      c3[v] = Lanes{} + sample;
    }
    for (int round = 0; round < 10; ++round) {
      const Lanes k0 = Lanes{} + keys.lo[round];
      const Lanes k1 = Lanes{} + keys.hi[round];
      for (int v = 0; v < kAtOnce; ++v) {
        const Lanes p0 = multiply_low(c0[v], m0);
        const Lanes p1 = multiply_low(c2[v], m1);
        c0[v] = (p1 >> 32) ^ c1[v] ^ k0;
        c2[v] = (p0 >> 32) ^ c3[v] ^ k1;
        c1[v] = p1;
        c3[v] = p0;
      }
    }
    for (int v = 0; v < kAtOnce; ++v) {
      const int at = base + v * kLanes;
      store_low(c0[v], &words[0][at]);
      store_low(c1[v], &words[1][at]);
      store_low(c2[v], &words[2][at]);
      store_low(c3[v], &words[3][at]);
    }
  }
}

}  // namespace ZORBA_ISA
}  // namespace zorba
