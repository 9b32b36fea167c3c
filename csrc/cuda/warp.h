// What one warp does to a tile of weights, as one code for the GPU and for the host.
//
// nvcc compiles it into the kernels of add_noise.cu, where the lanes of a warp run it together. A
// plain C++ compiler turns it into a loop over 32 lanes, which the tests compare bit for bit with
// the reference on machines without a GPU (tests/kernels/cuda_on_host.cpp).
//
// A lane works on two Philox blocks of 8 elements at a time, 32 blocks apart: accesses of 16 bytes
// stay coalesced, and one Philox call gives the rounding bits of both (see rounding_counter).
#pragma once

#define ZORBA_ISA device
#include "../cpu/kernels.h"
#include "../noise.h"

namespace zorba {
namespace device {

constexpr int kLanes = 32;
constexpr int kHalves = 2;                                // blocks a lane holds
constexpr int kHeld = kHalves * kGaussianBlock;           // elements a lane holds
constexpr int kStrip = kLanes * kHeld;                    // elements a warp holds
constexpr int kStripBlocks = kStrip / kGaussianBlock;     //
constexpr int kTile = kLanes * kRademacherBlock;          // one Rademacher call a lane
constexpr int kStripsInTile = kTile / kStrip;             //
constexpr int kAtOnce = 2;                                // strips in registers together
constexpr int kCallsInStrip = kStrip / kRademacherBlock;  //
constexpr int kBatch = kLanes / kCallsInStrip;  // terms whose calls for a strip fill a warp
constexpr int kSignWords = kLanes * 4;          // shared words of a warp: 128 signs a lane
constexpr int kInlineGroups = 512;              // coefficients that fit a kernel parameter

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
#if defined(__CUDA_ARCH__)
    return __byte_perm(a, b, 0x7632);
#else
    return (a >> 16) | (b & 0xFFFF0000u);
#endif
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

template <DType dtype>
ZORBA_HD void load_block(const char* at, uint32_t (&words)[kWords<dtype>]) {
#if defined(__CUDA_ARCH__)
#pragma unroll
  for (int i = 0; i < kWords<dtype>; i += 4) {
    const uint4 v = __ldcs(reinterpret_cast<const uint4*>(at + 4 * i));
    words[i] = v.x;
    words[i + 1] = v.y;
    words[i + 2] = v.z;
    words[i + 3] = v.w;
  }
#else
  std::memcpy(words, at, sizeof words);
#endif
}

template <DType dtype>
ZORBA_HD void store_block(char* at, const uint32_t (&words)[kWords<dtype>]) {
#if defined(__CUDA_ARCH__)
#pragma unroll
  for (int i = 0; i < kWords<dtype>; i += 4) {
    __stcs(reinterpret_cast<uint4*>(at + 4 * i),
           make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]));
  }
#else
  std::memcpy(at, words, sizeof words);
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
template <bool gaussian>
ZORBA_HD void noise_block(uint32_t block, Stream stream, uint32_t sample, const PhiloxKeys& keys,
                          float (&z)[kGaussianBlock]) {
  constexpr uint32_t kRatio = kRademacherBlock / kGaussianBlock;
  const uint32_t counter = gaussian ? block : block / kRatio;
  const Words words = philox4x32(counter, stream.lo, stream.hi, sample, keys);
  if constexpr (gaussian) {
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

// --- Any block -----------------------------------------------------------------------------------

// All rounds on the elements of one block that lie in the segment, one element at a time and with
// the contract's own rounding: heads, tails, addresses that are not aligned, weights that are not
// finite.
template <DType dtype, bool gaussian, bool stochastic, typename Program>
ZORBA_HD void any_block(const Program& program, const Segment& segment, uint32_t block) {
  const int64_t start = static_cast<int64_t>(block) * kGaussianBlock - segment.offset;
  if (start <= -kGaussianBlock || start >= segment.numel) return;
  const Stream stream = stream_of(segment);
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
      noise_block<gaussian>(block, stream, program.sample(k), program.keys(k), z);
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
