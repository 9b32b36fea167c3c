// Noise for one tile of 2048 consecutive elements, in plain loops that the compiler vectorises.
//
// Tiles are aligned to multiples of kTile in the whole parameter, so a tile always holds whole
// Philox blocks; a run that starts or ends inside a tile uses part of it.
#pragma once

#include "lanes.h"

namespace zorba {
namespace ZORBA_ISA {

constexpr int kTile = 2048;
constexpr int kBlocks = kTile / kGaussianBlock;
constexpr int kChunk = 64;  // blocks turned into normals at a time: their words stay in L1

inline void gaussian_tile(int64_t tile, Stream stream, uint32_t sample, const PhiloxKeys& keys,
                          float* z) {
  alignas(64) uint32_t words[4][kChunk];
  alignas(64) float pairs[8][kChunk];
  for (int chunk = 0; chunk < kBlocks; chunk += kChunk) {
    philox_words<kChunk>(static_cast<uint32_t>(tile * kBlocks + chunk), stream, sample, keys,
                         words);
    for (int j = 0; j < 4; ++j) {
      for (int i = 0; i < kChunk; ++i) {
        const Pair pair = box_muller(words[j][i]);
        pairs[2 * j][i] = pair.first;
        pairs[2 * j + 1][i] = pair.second;
      }
    }
    float* out = z + chunk * kGaussianBlock;
    for (int i = 0; i < kChunk; ++i) {
      for (int e = 0; e < 8; ++e) out[8 * i + e] = pairs[e][i];
    }
  }
}

inline void rademacher_tile(int64_t tile, Stream stream, uint32_t sample, const PhiloxKeys& keys,
                            float* z) {
  constexpr int kCalls = kTile / kRademacherBlock;
  alignas(64) uint32_t words[4][kCalls];
  philox_words<kCalls>(static_cast<uint32_t>(tile * kCalls), stream, sample, keys, words);
  for (int i = 0; i < kCalls; ++i) {
    for (int j = 0; j < 4; ++j) {
      const uint32_t word = words[j][i];
      float* out = z + (4 * i + j) * 32;
      for (int bit = 0; bit < 32; ++bit) out[bit] = rademacher(word, bit);
    }
  }
}

// Rounding bits of a tile: 16 for each element, and its block's dither.
inline void rounding_tile(int64_t tile, Stream stream, const PhiloxKeys& keys, uint32_t* random16,
                          float* dither) {
  alignas(64) uint32_t words[4][kBlocks / 2];
  philox_words<kBlocks / 2>(rounding_counter(static_cast<uint32_t>(tile * kBlocks)), stream,
                            kRoundingDomain, keys, words);
  for (int half = 0; half < 2; ++half) {
    for (int group = 0; group < kBlocks / 64; ++group) {
      const uint32_t* first = words[2 * half] + 32 * group;
      const uint32_t* second = words[2 * half + 1] + 32 * group;
      uint32_t* bits = random16 + (64 * group + 32 * half) * kGaussianBlock;
      float* shift = dither + (64 * group + 32 * half) * kGaussianBlock;
      for (int i = 0; i < 32; ++i) {
        for (int e = 0; e < 8; ++e) bits[8 * i + e] = rounding_bits(first[i], second[i], e);
      }
      for (int i = 0; i < 32; ++i) {
        const float block_dither = rounding_dither(first[i], second[i]);
        for (int e = 0; e < 8; ++e) shift[8 * i + e] = block_dither;
      }
    }
  }
}

}  // namespace ZORBA_ISA
}  // namespace zorba
