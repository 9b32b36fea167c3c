// What one warp does to a tile of weights, as one code for the GPU and for the host.
//
// nvcc compiles it into the kernels of add_noise.cu, where the lanes of a warp run it together. A
// plain C++ compiler turns it into a loop over 32 lanes, which the tests compare bit for bit with
// the reference on machines without a GPU (tests/kernels/cuda_on_host.cpp).
//
// A lane works on two Philox blocks of 8 elements at a time, 32 blocks apart: accesses of 16 bytes
// stay coalesced, and one Philox call gives the rounding bits of both (see rounding_counter).
#pragma once

#include "block.h"

namespace zorba {
namespace device {

// --- A strip of 64 whole, aligned blocks ---------------------------------------------------------

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

// Rademacher signs go through shared memory, where byte i has those of 8 elements: a Philox call
// serves 128 elements, so one call a lane serves the warp for 128 elements a lane. With one term
// these are the strips of a tile, otherwise kBatch terms of one strip.
ZORBA_HD void store_signs(uint32_t* signs, int lane, const Words& words) {
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<uint4*>(signs + 4 * lane) = make_uint4(words.w0, words.w1, words.w2, words.w3);
#else
  std::memcpy(signs + 4 * lane, &words, sizeof words);
#endif
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
    noise_block<true>(block + kLanes * h, stream, sample, keys, z);
#pragma unroll
    for (int e = 0; e < kGaussianBlock; ++e) {
      held.sum[8 * h + e] = fma_rn(coef, z[e], held.sum[8 * h + e]);
    }
  }
}

// `signs` points to the lane's byte of the first half; the second half is 32 bytes on. The product
// with +-1 is exact, so adding +-coef gives the bits of the fused multiply-add. `alone`: the sum is
// 0 so far.
template <DType dtype, bool alone>
ZORBA_HD void add_rademacher(const unsigned char* signs, float coef, Held<dtype>& held) {
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    const uint32_t byte = signs[kLanes * h];
#pragma unroll
    for (int e = 0; e < kGaussianBlock; ++e) {
      const float term = as_float(as_bits(coef) ^ ((byte << (31 - e)) & 0x80000000u));
      held.sum[8 * h + e] = alone ? term : held.sum[8 * h + e] + term;
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

// One term in one round, on the strips [first, last) of a tile, kAtOnce at a time: their loads are
// under way together, and keys and constants are fetched once. Returns, as bits of each lane, the
// strips that it did not write because a weight needs any_block().
template <DType dtype, bool gaussian, bool stochastic, bool decays>
ZORBA_HD void add_to_strips(const Single& program, Stream stream, Step step, uint32_t first,
                            uint32_t last, PerLane<Place>& place, const uint32_t* signs,
                            PerLane<uint32_t>& left) {
  constexpr int64_t kBytesOfStrip = kStrip * kBytes<dtype>;
  const auto* bytes = reinterpret_cast<const unsigned char*>(signs);
#pragma unroll 1
  for (uint32_t strip = first; strip < last; strip += kAtOnce) {
    each_lane([&](int lane) {
      Held<dtype> held[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        load_strip<dtype>(place[lane].src + i * kBytesOfStrip, held[i]);
      }
      const bool fine = all_finite<dtype>(held);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const uint32_t block = (strip + i) * kStripBlocks + lane;
        begin_round<dtype, stochastic, decays>(block, stream, program.round_keys(0), step.decay,
                                               held[i]);
        if constexpr (gaussian) {
          add_gaussian<dtype>(block, stream, program.sample(0), program.keys(0), step.coef,
                              held[i]);
        } else {
          const uint32_t at = strip % kStripsInTile * kStripBlocks + lane;
          add_rademacher<dtype, !stochastic && !decays>(bytes + at + i * kStripBlocks, step.coef,
                                                        held[i]);
        }
        end_round<dtype, stochastic>(held[i]);
      }
      if (fine) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          store_strip<dtype>(place[lane].dst + i * kBytesOfStrip, held[i]);
        }
      } else {
        left[lane] |= ((1u << kAtOnce) - 1u) << strip % kStripsInTile;
      }
      place[lane].src += kAtOnce * kBytesOfStrip;
      place[lane].dst += kAtOnce * kBytesOfStrip;
    });
  }
}

// Any program on one strip: the weights stay in registers from the first term to the last.
template <DType dtype, bool gaussian, bool stochastic>
ZORBA_HD void add_to_strip(const Many& program, Stream stream, int64_t group, uint32_t strip,
                           PerLane<Place>& place, uint32_t* signs, PerLane<uint32_t>& left) {
  PerLane<Held<dtype>[1]> held;
  PerLane<bool> fine;
  each_lane([&](int lane) {
    load_strip<dtype>(place[lane].src, held[lane][0]);
    fine[lane] = true;
  });
  int32_t filled = 0;  // Rademacher terms whose signs have been made
#pragma unroll 1
  for (int32_t r = 0; r < program.rounds(); ++r) {
    const int32_t end = program.end(r);
    const float decay = program.decay(group, r);
    bool changed = false;
    const auto begin = [&] {
      if (changed) return;
      changed = true;
      each_lane([&](int lane) {
        fine[lane] = fine[lane] && all_finite<dtype>(held[lane]);
        begin_round<dtype, stochastic, true>(strip * kStripBlocks + lane, stream,
                                             program.round_keys(r), decay, held[lane][0]);
      });
    };
    if (decay != 0.0f) begin();
#pragma unroll 1
    for (int32_t k = program.begin(r); k < end; ++k) {
      const float coef = program.coef(group, k);
      if (coef == 0.0f) continue;
      begin();
      if (!gaussian && k >= filled) {
        warp_sync();
        each_lane([&](int lane) {
          const int32_t mine = k / kBatch * kBatch + lane / kCallsInStrip;
          if (mine < program.terms()) {
            const uint32_t call = strip * kCallsInStrip + lane % kCallsInStrip;
            store_signs(
                signs, lane,
                philox4x32(call, stream.lo, stream.hi, program.sample(mine), program.keys(mine)));
          }
        });
        warp_sync();
        filled = k / kBatch * kBatch + kBatch;
      }
      each_lane([&](int lane) {
        if constexpr (gaussian) {
          add_gaussian<dtype>(strip * kStripBlocks + lane, stream, program.sample(k),
                              program.keys(k), coef, held[lane][0]);
        } else {
          const auto* bytes = reinterpret_cast<const unsigned char*>(signs);
          add_rademacher<dtype, false>(bytes + k % kBatch * kStripBlocks + lane, coef,
                                       held[lane][0]);
        }
      });
    }
    if (changed) each_lane([&](int lane) { end_round<dtype, stochastic>(held[lane][0]); });
  }
  each_lane([&](int lane) {
    if (fine[lane]) {
      store_strip<dtype>(place[lane].dst, held[lane][0]);
    } else {
      left[lane] |= 1u << strip % kStripsInTile;
    }
    place[lane].src += kStrip * kBytes<dtype>;
    place[lane].dst += kStrip * kBytes<dtype>;
  });
}

// --- A tile --------------------------------------------------------------------------------------

// All rounds on the elements of a tile that lie in the segment. `signs`: kSignWords words that the
// warp shares, 16-byte aligned.
template <DType dtype, bool gaussian, bool stochastic, typename Program>
ZORBA_HD void add_to_tile(const Program& program, const Segment& segment, int64_t tile,
                          uint32_t* signs) {
  const Stream stream = stream_of(segment);
  const int64_t stop = segment.offset + segment.numel;
  const int64_t tile_start = tile * kTile;
  const int64_t begin = segment.offset > tile_start ? segment.offset : tile_start;
  const int64_t end = stop < tile_start + kTile ? stop : tile_start + kTile;
  const auto tile_strip = static_cast<uint32_t>(tile * kStripsInTile);
  // Addresses of the parameter's element 0, were it all there.
  const int64_t src = segment.src - segment.offset * kBytes<dtype>;
  const int64_t dst = segment.dst - segment.offset * kBytes<dtype>;

  // Strips [first, last) are whole and aligned; the others that the segment touches are left to
  // any_block().
  auto first = static_cast<uint32_t>((begin + kStrip - 1) / kStrip);
  auto last = static_cast<uint32_t>(end / kStrip);
  if ((src | dst) % 16 != 0 || last < first) last = first;
  if (Program::kSingle) last -= (last - first) % kAtOnce;
  const uint32_t touched =
      (1u << ((end - 1) / kStrip + 1 - tile_strip)) - (1u << (begin / kStrip - tile_strip));
  const uint32_t whole = (1u << (last - tile_strip)) - (1u << (first - tile_strip));
  PerLane<uint32_t> left;
  PerLane<Place> place;
  each_lane([&](int lane) {
    left[lane] = touched & ~whole;
    const int64_t shift =
        (static_cast<int64_t>(first) * kStrip + lane * kGaussianBlock) * kBytes<dtype>;
    place[lane] = {reinterpret_cast<const char*>(src + shift),
                   reinterpret_cast<char*>(dst + shift)};
  });

  if constexpr (Program::kSingle) {
    const Step step = program.steps[segment.group];
    if (step.coef == 0.0f) {
      // Not a pass to be fast at: only a decay, or a copy, or nothing at all.
      if (step.decay == 0.0f && src == dst) return;
      each_lane([&](int lane) { left[lane] = touched; });
    } else {
      if constexpr (!gaussian) {
        warp_sync();
        each_lane([&](int lane) {
          const auto call = static_cast<uint32_t>(tile * kLanes + lane);
          store_signs(signs, lane,
                      philox4x32(call, stream.lo, stream.hi, program.sample(0), program.keys(0)));
        });
        warp_sync();
      }
      if (step.decay == 0.0f) {
        add_to_strips<dtype, gaussian, stochastic, false>(program, stream, step, first, last, place,
                                                          signs, left);
      } else {
        add_to_strips<dtype, gaussian, stochastic, true>(program, stream, step, first, last, place,
                                                         signs, left);
      }
    }
  } else {
#pragma unroll 1
    for (uint32_t strip = first; strip < last; ++strip) {
      add_to_strip<dtype, gaussian, stochastic>(program, stream, segment.group, strip, place, signs,
                                                left);
    }
  }

  each_lane([&](int lane) {
#pragma unroll 1
    for (int i = 0; left[lane] != 0; ++i, left[lane] >>= 1) {
      if ((left[lane] & 1u) == 0) continue;
#pragma unroll 1
      for (int h = 0; h < kHalves; ++h) {
        any_block<dtype, gaussian, stochastic>(program, segment,
                                               (tile_strip + i) * kStripBlocks + kLanes * h + lane);
      }
    }
  });
}

}  // namespace device
}  // namespace zorba
