// Noise for one tile of 2048 consecutive elements, in plain loops that the compiler vectorises.
//
// Tiles are aligned to multiples of kTile in the whole parameter, so a tile holds whole Philox
// blocks. Values are laid out for the arithmetic that follows on 32-bit words of weights: a word
// holds `parts` weights (1 of float32, 2 of 16 bits), and element e stands at
// [e % parts][e / parts], so that vectors never have to be widened or narrowed.
#pragma once

#include "lanes.h"

namespace zorba {
namespace ZORBA_ISA {

constexpr int kTile = 2048;
constexpr int kBlocks = kTile / kGaussianBlock;
constexpr int kChunk = 64;  // blocks turned into normals at a time: their words stay in L1

template <int parts>
inline void gaussian_tile(int64_t tile, Stream stream, uint32_t sample, const PhiloxKeys& keys,
                          float (*z)[kTile / parts]) {
  alignas(64) uint32_t words[4][kChunk];
  alignas(64) float normals[8][kChunk];
  for (int chunk = 0; chunk < kBlocks; chunk += kChunk) {
    philox_words<kChunk>(static_cast<uint32_t>(tile * kBlocks + chunk), stream, sample, keys,
                         words);
    for (int j = 0; j < 4; ++j) {
      for (int i = 0; i < kChunk; ++i) {
        const Pair pair = box_muller(words[j][i]);
        normals[2 * j][i] = pair.first;
        normals[2 * j + 1][i] = pair.second;
      }
    }
    constexpr int kRun = kGaussianBlock / parts;
    for (int part = 0; part < parts; ++part) {
      float* out = z[part] + chunk * kRun;
      for (int i = 0; i < kChunk; ++i) {
        for (int e = 0; e < kRun; ++e) out[kRun * i + e] = normals[parts * e + part][i];
      }
    }
  }
}

// Signs are made in vectors of the processor's width: a loop over the bits of a word is so short
// that the compiler would unroll it to scalars.
constexpr int kWide = 2 * kLanes;
typedef uint32_t WideBits __attribute__((vector_size(4 * kWide)));
typedef float WideFloats __attribute__((vector_size(4 * kWide)));

template <int parts>
inline void rademacher_tile(int64_t tile, Stream stream, uint32_t sample, const PhiloxKeys& keys,
                            float (*z)[kTile / parts]) {
  constexpr int kCalls = kTile / kRademacherBlock;
  constexpr int kRun = 32 / parts;        // elements of a word in each part
  constexpr int kVectors = kRun / kWide;  // vectors they fill
  alignas(64) uint32_t words[4][kCalls];
  philox_words<kCalls>(static_cast<uint32_t>(tile * kCalls), stream, sample, keys, words);
  WideBits masks[parts][kVectors];
  for (int part = 0; part < parts; ++part) {
    for (int i = 0; i < kRun; ++i) masks[part][i / kWide][i % kWide] = 1u << (parts * i + part);
  }
  const WideFloats one = WideFloats{} + 1.0f;
  for (int i = 0; i < kCalls; ++i) {
    for (int j = 0; j < 4; ++j) {
      const WideBits word = WideBits{} + words[j][i];
      for (int part = 0; part < parts; ++part) {
        float* out = z[part] + (4 * i + j) * kRun;
        for (int v = 0; v < kVectors; ++v) {
          const WideFloats signs = (word & masks[part][v]) != 0 ? -one : one;
          std::memcpy(out + v * kWide, &signs, sizeof signs);
        }
      }
    }
  }
}

template <int parts>
inline void noise_tile(Distribution distribution, int64_t tile, Stream stream, uint32_t sample,
                       const PhiloxKeys& keys, float (*z)[kTile / parts]) {
  switch (distribution) {
    case Distribution::kGaussian: return gaussian_tile<parts>(tile, stream, sample, keys, z);
    case Distribution::kRademacher: return rademacher_tile<parts>(tile, stream, sample, keys, z);
    case Distribution::kRank1: return;  // of matrices, not of tiles: rank1.h
  }
}

// Element i of the result is element mask[i] of a followed by b.
template <typename Vector>
inline Vector picked(Vector a, Vector b, WideBits mask) {
#if defined(__clang__)
  Vector out;
  for (int i = 0; i < kWide; ++i) out[i] = mask[i] < kWide ? a[mask[i]] : b[mask[i] - kWide];
  return out;
#else
  return __builtin_shuffle(a, b, mask);
#endif
}

// Words alternate between elements (0, 1) and (2, 3) of a rounding word, or (4, 5) and (6, 7):
// noise.h's rounding_bits of both, the first in the low half.
inline WideBits rounding_pairs(WideBits words) {
#if defined(__AVX512BW__)
  return (WideBits)_mm512_shuffle_epi8(
      (__m512i)words, _mm512_set4_epi32(0x0F0C0E0F, 0x090A0809, 0x07040607, 0x01020001));
#elif defined(__AVX2__)
  const __m128i order = _mm_set_epi32(0x0F0C0E0F, 0x090A0809, 0x07040607, 0x01020001);
  return (WideBits)_mm256_shuffle_epi8((__m256i)words, _mm256_broadcastsi128_si256(order));
#else
  WideBits odd = {};
  for (int i = 1; i < kWide; i += 2) odd[i] = ~0u;
  const WideBits turned = (words & ~odd) | ((words << 16 | words >> 16) & odd);
  return (turned >> 8 & 0xFFu) | (turned & 0xFFu) << 8 | (turned & 0xFF0000u) |
         (turned & 0xFF00u) << 16;
#endif
}

// Rounding bits of a tile of 16-bit weights, for each pair of elements: 16 bits of the first in the
// low half and of the second in the high half, and the dither of their block.
inline void rounding_tile(int64_t tile, Stream stream, const PhiloxKeys& keys,
                          uint32_t (&random)[kTile / 2], float (&dither)[kTile / 2]) {
  alignas(64) uint32_t words[4][kBlocks / 2];
  philox_words<kBlocks / 2>(rounding_counter(static_cast<uint32_t>(tile * kBlocks)), stream,
                            kRoundingDomain, keys, words);
  // A block has two words of bits and one dither, and fills four words of output.
  WideBits bits_of[4], dither_of[4];
#pragma GCC unroll 4
  for (int quarter = 0; quarter < 4; ++quarter) {
    for (int i = 0; i < kWide; ++i) {
      dither_of[quarter][i] = (quarter * kWide + i) / 4;
      bits_of[quarter][i] = dither_of[quarter][i] + (i % 4 < 2 ? 0 : kWide);
    }
  }
  for (int half = 0; half < 2; ++half) {
    for (int block = 0; block < kBlocks / 2; block += kWide) {
      const int group = block / 32;
      const int start = (64 * group + 32 * half + block % 32) * kGaussianBlock / 2;
      WideBits first, second;
      std::memcpy(&first, words[2 * half] + block, sizeof first);
      std::memcpy(&second, words[2 * half + 1] + block, sizeof second);
      WideFloats shift;
      for (int i = 0; i < kWide; ++i) shift[i] = rounding_dither(first[i], second[i]);
#pragma GCC unroll 4
      for (int quarter = 0; quarter < 4; ++quarter) {
        const WideBits bits = rounding_pairs(picked(first, second, bits_of[quarter]));
        const WideFloats shifts = picked(shift, shift, dither_of[quarter]);
        std::memcpy(random + start + quarter * kWide, &bits, sizeof bits);
        std::memcpy(dither + start + quarter * kWide, &shifts, sizeof shifts);
      }
    }
  }
}

}  // namespace ZORBA_ISA
}  // namespace zorba
