// Tables and programs of a launch as kernels see them, and what the 32 lanes of a warp share.
#pragma once

#define ZORBA_ISA device
#include "../noise.h"
#include "../packed.h"

namespace zorba {
namespace device {

constexpr int kLanes = 32;
constexpr int kHalves = 2;                                // blocks a lane holds
constexpr int kHeld = kHalves * kGaussianBlock;           // elements a lane holds
constexpr int kStrip = kLanes * kHeld;                    // elements a warp holds
constexpr int kStripBits = 9;                             // of a number below it
constexpr int kStripBlocks = kStrip / kGaussianBlock;     //
constexpr int kTile = kLanes * kRademacherBlock;          // one Rademacher call a lane
constexpr int kStripsInTile = kTile / kStrip;             //
constexpr int kAtOnce = 2;                                // strips in registers together
constexpr int kCallsInStrip = kStrip / kRademacherBlock;  //
constexpr int kTermsAtOnce = kLanes;                      // terms whose signs a warp makes together
constexpr int kInlineGroups = 512;  // coefficients that fit a kernel parameter

// Philox calls whose words a warp shares at most: of a term in a program, and of the only term in a
// tile. Those of rank-one noise are counted in rank1.h.
template <Distribution distribution>
constexpr int kTermCalls =
    kAtOnce * kStrip / kRademacherBlock + (distribution == Distribution::kRank1 ? 4 : 0);
template <Distribution distribution>
constexpr int kTileCalls = kLanes + (distribution == Distribution::kRank1 ? 4 : 0);
// Shared words of a term in a program: signs, and its coefficient behind them (signs.h).
template <Distribution distribution>
constexpr int kTermWords = 4 * kTermCalls<distribution> + 4;

// --- Tables and programs -------------------------------------------------------------------------

// Segments in device memory. Work is counted in tiles, aligned in the whole parameter.
struct Table {
  const Segment* segments;
  const int64_t* ends;  // tiles up to and including each segment
  int64_t count;
  int64_t tiles;
};

ZORBA_HD int64_t first_tile(const Segment& s) { return s.offset / kTile; }
ZORBA_HD int64_t tile_count(const Segment& s) {
  return s.numel == 0 ? 0 : (s.offset + s.numel - 1) / kTile - first_tile(s) + 1;
}

// The segment of a tile, not before segment `at`, which is where the warp was last.
ZORBA_HD int64_t find_segment(const Table& table, int64_t tile, int64_t at) {
  int64_t low = at;
  int64_t high = at;
  while (tile >= table.ends[high]) {  // the next one more often than not
    low = high + 1;
    high = high * 2 + 1 < table.count ? high * 2 + 1 : table.count - 1;
  }
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (tile >= table.ends[middle]) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

struct alignas(16) Term {
  PhiloxKeys keys;
  uint32_t sample;
  uint32_t unused[3];
};

struct alignas(16) Round {
  PhiloxKeys keys;  // of the rounding bits
  int32_t begin, end;
  uint32_t unused[2];
};

// What a group adds in a program of one term.
struct Step {
  float coef, decay;
};

// One round of one term: everything is a kernel parameter, so that a launch copies nothing.
struct Single {
  static constexpr bool kSingle = true;
  template <Distribution distribution>
  static constexpr int kSignWords = 4 * kTileCalls<distribution>;  // shared words of a warp
  PhiloxKeys term_keys;
  PhiloxKeys rounding_keys;
  uint32_t term_sample;
  Step steps[kInlineGroups];

  ZORBA_HD int32_t rounds() const { return 1; }
  ZORBA_HD int32_t begin(int32_t) const { return 0; }
  ZORBA_HD int32_t end(int32_t) const { return 1; }
  ZORBA_HD const PhiloxKeys& keys(int32_t) const { return term_keys; }
  ZORBA_HD const PhiloxKeys& round_keys(int32_t) const { return rounding_keys; }
  ZORBA_HD uint32_t sample(int32_t) const { return term_sample; }
  ZORBA_HD float coef(int64_t group, int32_t) const { return steps[group].coef; }
  ZORBA_HD float decay(int64_t group, int32_t) const { return steps[group].decay; }
  ZORBA_HD int32_t terms() const { return 1; }
};

// Any number of rounds and terms, in device memory.
struct Many {
  static constexpr bool kSingle = false;
  template <Distribution distribution>
  static constexpr int kSignWords = kTermsAtOnce * kTermWords<distribution>;
  const Term* term;
  const Round* round;
  const float* coefs;   // [groups, terms]
  const float* decays;  // [groups, rounds]
  int32_t term_count;
  int32_t round_count;

  ZORBA_HD int32_t rounds() const { return round_count; }
  ZORBA_HD int32_t begin(int32_t r) const { return round[r].begin; }
  ZORBA_HD int32_t end(int32_t r) const { return round[r].end; }
  ZORBA_HD const PhiloxKeys& keys(int32_t k) const { return term[k].keys; }
  ZORBA_HD const PhiloxKeys& round_keys(int32_t r) const { return round[r].keys; }
  ZORBA_HD uint32_t sample(int32_t k) const { return term[k].sample; }
  ZORBA_HD float coef(int64_t group, int32_t k) const { return coefs[group * term_count + k]; }
  ZORBA_HD float decay(int64_t group, int32_t r) const { return decays[group * round_count + r]; }
  ZORBA_HD int32_t terms() const { return term_count; }
};

// --- Lanes ---------------------------------------------------------------------------------------

// Runs f(lane) in every lane. Between two calls the lanes must not rely on each other's progress;
// warp_sync() puts what one wrote to shared memory in front of what the others read.
template <typename F>
ZORBA_HD void each_lane(const F& f) {
#if defined(__CUDA_ARCH__)
  f(static_cast<int>(threadIdx.x % kLanes));
#else
  for (int lane = 0; lane < kLanes; ++lane) f(lane);
#endif
}

ZORBA_HD void warp_sync() {
#if defined(__CUDA_ARCH__)
  __syncwarp();
#endif
}

// f(lane) of every lane as a bit.
template <typename F>
ZORBA_HD uint32_t ballot(const F& f) {
#if defined(__CUDA_ARCH__)
  return __ballot_sync(~0u, f(static_cast<int>(threadIdx.x % kLanes)));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint32_t>(f(lane)) << lane;
  return bits;
#endif
}

ZORBA_HD int count_ones(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// A variable of each lane: a register on the GPU.
template <typename T>
struct PerLane {
#if defined(__CUDA_ARCH__)
  T value;
  ZORBA_HD T& operator[](int) { return value; }
#else
  T values[kLanes];
  T& operator[](int lane) { return values[lane]; }
#endif
};

}  // namespace device
}  // namespace zorba
