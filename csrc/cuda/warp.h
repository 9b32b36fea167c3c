// What one warp does to a tile of weights, as one code for the GPU and for the host.
//
// nvcc compiles it into the kernels of add_noise.cu, where the lanes of a warp run it together. A
// plain C++ compiler turns it into a loop over 32 lanes, which the tests compare bit for bit with
// the reference on machines without a GPU (tests/kernels/cuda_on_host.cpp).
#pragma once

#include "block.h"
#include "terms.h"

namespace zorba {
namespace device {

// --- Strips --------------------------------------------------------------------------------------

// Signs of a single term go through shared memory too, where byte i has those of 8 elements: one
// Philox call a lane serves the strips of a tile. `signs` points to the lane's byte of the first
// half; the second half is 32 bytes on. The product with +-1 is exact, so adding +-coef gives the
// bits of the fused multiply-add. `alone`: the sum is 0 so far.
template <DType dtype, bool alone>
ZORBA_HD void add_bytes(const unsigned char* signs, float coef, Held<dtype>& held) {
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

// One term in one round, on the strips [first, last) of a tile, kAtOnce at a time: their loads are
// under way together, and keys and constants are fetched once. Returns, as bits of each lane, the
// strips that it did not write because a weight needs any_block().
template <DType dtype, Distribution distribution, bool stochastic, bool decays>
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
        if constexpr (distribution == Distribution::kGaussian) {
          add_gaussian<dtype>(block, stream, program.sample(0), program.keys(0), step.coef,
                              held[i]);
        } else {
          const uint32_t at = strip % kStripsInTile * kStripBlocks + lane;
          add_bytes<dtype, !stochastic && !decays>(bytes + at + i * kStripBlocks, step.coef,
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

// --- A tile --------------------------------------------------------------------------------------

// All rounds on the elements of a tile that lie in the segment. `signs`:
// Program::kSignWords words that the warp shares, 16-byte aligned.
template <DType dtype, Distribution distribution, bool stochastic, typename Program>
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
  each_lane([&](int lane) { left[lane] = touched & ~whole; });

  if constexpr (Program::kSingle) {
    const Step step = program.steps[segment.group];
    if (step.coef == 0.0f) {
      // Not a pass to be fast at: only a decay, or a copy, or nothing at all.
      if (step.decay == 0.0f && src == dst) return;
      each_lane([&](int lane) { left[lane] = touched; });
    } else {
      PerLane<Place> place;
      each_lane([&](int lane) {
        const int64_t shift = shift_to<dtype>(segment, first, lane);
        place[lane] = {reinterpret_cast<const char*>(segment.src + shift),
                       reinterpret_cast<char*>(segment.dst + shift)};
      });
      if constexpr (distribution == Distribution::kRank1) {
        make_tile_signs(tile_strip, segment.columns, stream, program.sample(0), program.keys(0),
                        signs);
      } else if constexpr (distribution == Distribution::kRademacher) {
        warp_sync();
        each_lane([&](int lane) {
          const auto call = static_cast<uint32_t>(tile * kLanes + lane);
          store_words(signs + 4 * lane,
                      philox4x32(call, stream.lo, stream.hi, program.sample(0), program.keys(0)));
        });
        warp_sync();
      }
      if (step.decay == 0.0f) {
        add_to_strips<dtype, distribution, stochastic, false>(program, stream, step, first, last,
                                                              place, signs, left);
      } else {
        add_to_strips<dtype, distribution, stochastic, true>(program, stream, step, first, last,
                                                             place, signs, left);
      }
    }
  } else {
#pragma unroll 1
    for (uint32_t strip = first; strip < last; strip += kHeldStrips<distribution>) {
      add_terms<dtype, distribution, stochastic>(program, segment, stream, strip,
                                                 static_cast<int>(last - strip), signs, left);
    }
  }

  each_lane([&](int lane) {
#pragma unroll 1
    for (int i = 0; left[lane] != 0; ++i, left[lane] >>= 1) {
      if ((left[lane] & 1u) == 0) continue;
#pragma unroll 1
      for (int h = 0; h < kHalves; ++h) {
        any_block<dtype, distribution, stochastic>(
            program, segment, (tile_strip + i) * kStripBlocks + kLanes * h + lane);
      }
    }
  });
}

}  // namespace device
}  // namespace zorba
