// Any program on strips of whole blocks: the weights stay in registers from the first term to the
// last.
#pragma once

#include "signs.h"

namespace zorba {
namespace device {

// Strips that a lane holds while it goes through the terms.
template <Distribution distribution>
constexpr int kHeldStrips = distribution == Distribution::kGaussian ? 1 : kAtOnce;

constexpr int kUnrolledTerms = 4;

// The strips from `strip` on that a lane holds together, of which the first `present` exist.
template <DType dtype, Distribution distribution, bool stochastic>
ZORBA_HD void add_terms(const Many& program, const Segment& segment, Stream stream, uint32_t strip,
                        int present, uint32_t* shared, PerLane<uint32_t>& left) {
  constexpr int kStrips = kHeldStrips<distribution>;
  constexpr int64_t kBytesOfStrip = kStrip * kBytes<dtype>;
  const int64_t group = segment.group;
  PerLane<Held<dtype>[kStrips]> held;
  PerLane<Unpacker> unpacker;
  PerLane<bool> fine;
  each_lane([&](int lane) {
    const char* src =
        reinterpret_cast<const char*>(segment.src) + shift_to<dtype>(segment, strip, lane);
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
      held[lane][i] = {};  // the sums too, or registers would keep those of the last strips
      if (i < present) load_strip<dtype>(src + i * kBytesOfStrip, held[lane][i]);
    }
    if constexpr (distribution != Distribution::kGaussian) unpacker[lane] = make_unpacker(lane);
    fine[lane] = true;
  });
  // Of the terms whose signs have been made:
  int32_t made = 0;               // their end
  uint32_t waiting = 0;           // the next ones as bits, 0 where there is no coefficient
  const uint32_t* term = shared;  // the next one with a coefficient
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
#pragma unroll
        for (int i = 0; i < kStrips; ++i) {
          begin_round<dtype, stochastic, true>((strip + i) * kStripBlocks + lane, stream,
                                               program.round_keys(r), decay, held[lane][i]);
        }
      });
    };
    if (decay != 0.0f) begin();
    if constexpr (distribution == Distribution::kGaussian) {
#pragma unroll 1
      for (int32_t k = program.begin(r); k < end; ++k) {
        const float coef = program.coef(group, k);
        if (coef == 0.0f) continue;
        begin();
        each_lane([&](int lane) {
          add_gaussian<dtype>(strip * kStripBlocks + lane, stream, program.sample(k),
                              program.keys(k), coef, held[lane][0]);
        });
      }
    } else {
#pragma unroll 1
      for (int32_t k = program.begin(r); k < end;) {
        if (k >= made) {
          made = k + kTermsAtOnce;
          waiting = make_signs<distribution>(program, segment, stream, k, strip, shared);
          term = shared;
        }
        const int32_t stop = end < made ? end : made;
        const uint32_t later = stop < made ? waiting >> (stop - k) : 0;
        int count = count_ones(waiting) - count_ones(later);
        waiting = later;
        k = stop;
        if (count == 0) continue;
        begin();
        const auto add = [&] {
          each_lane([&](int lane) {
            add_signs<dtype, distribution>(term, lane, unpacker[lane], held[lane]);
          });
          term += kTermWords<distribution>;
        };
#pragma unroll 1
        for (; count >= kUnrolledTerms; count -= kUnrolledTerms) {
#pragma unroll
          for (int i = 0; i < kUnrolledTerms; ++i) add();
        }
#pragma unroll 1
        for (; count > 0; --count) add();
      }
    }
    if (changed) {
      each_lane([&](int lane) {
#pragma unroll
        for (int i = 0; i < kStrips; ++i) end_round<dtype, stochastic>(held[lane][i]);
      });
    }
  }
  each_lane([&](int lane) {
    char* dst = reinterpret_cast<char*>(segment.dst) + shift_to<dtype>(segment, strip, lane);
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
      if (i >= present) continue;
      if (fine[lane]) {
        store_strip<dtype>(dst + i * kBytesOfStrip, held[lane][i]);
      } else {
        left[lane] |= 1u << (strip + i) % kStripsInTile;
      }
    }
  });
}

}  // namespace device
}  // namespace zorba
