// The general path: any block, whole or not, aligned or not, an element at a time.
#pragma once

#include "rank1.h"

namespace zorba {
namespace device {

// All rounds on the elements of one block that lie in the segment, one element at a time and with
// the contract's own rounding: heads, tails, addresses that are not aligned, weights that are not
// finite.
template <DType dtype, Distribution distribution, bool stochastic, typename Program>
ZORBA_HD void any_block(const Program& program, const Segment& segment, uint32_t block) {
  const int64_t start = static_cast<int64_t>(block) * kGaussianBlock - segment.offset;
  if (start <= -kGaussianBlock || start >= segment.numel) return;
  const Stream stream = stream_of(segment);
  const BlockNoise<distribution> noise(block, segment.columns);
  const int64_t shift = start * kBytes<dtype>;
  float weights[kGaussianBlock];
#pragma unroll
  for (int e = 0; e < kGaussianBlock; ++e) {
    const bool inside = start + e >= 0 && start + e < segment.numel;
    const char* at = reinterpret_cast<const char*>(segment.src) + shift + e * kBytes<dtype>;
    weights[e] = inside ? load_element<dtype>(at) : 0.0f;
  }
#pragma unroll 1
  for (int32_t r = 0; r < program.rounds(); ++r) {
    const int32_t end = program.end(r);
    const float decay = program.decay(segment.group, r);
    bool changed = decay != 0.0f;
#pragma unroll 1
    for (int32_t k = program.begin(r); k < end; ++k) {
      changed = changed || program.coef(segment.group, k) != 0.0f;
    }
    if (!changed) continue;
    RoundingWords words{};
    if (stochastic) words = rounding_words(block, stream, program.round_keys(r));
    const float dither = rounding_dither(words.first, words.second);
    float sum[kGaussianBlock];
#pragma unroll
    for (int e = 0; e < kGaussianBlock; ++e) {
      sum[e] = start_of_sum<dtype, stochastic>(weights[e], dither, decay);
    }
#pragma unroll 1
    for (int32_t k = program.begin(r); k < end; ++k) {
      const float coef = program.coef(segment.group, k);
      if (coef == 0.0f) continue;
      float z[kGaussianBlock];
      noise.values(stream, program.sample(k), program.keys(k), z);
#pragma unroll
      for (int e = 0; e < kGaussianBlock; ++e) sum[e] = fma_rn(coef, z[e], sum[e]);
    }
#pragma unroll
    for (int e = 0; e < kGaussianBlock; ++e) {
      const float value = weights[e] + sum[e];
      weights[e] = stochastic
                       ? round_stochastic<dtype>(value, random16(words.first, words.second, e))
                       : round_nearest<dtype>(value);
    }
  }
#pragma unroll
  for (int e = 0; e < kGaussianBlock; ++e) {
    char* at = reinterpret_cast<char*>(segment.dst) + shift + e * kBytes<dtype>;
    if (start + e >= 0 && start + e < segment.numel) store_element<dtype>(at, weights[e]);
  }
}

}  // namespace device
}  // namespace zorba
