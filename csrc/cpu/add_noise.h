// w <- round(w - decay * w + sum_k coef[group, k] * z(seed_k, stream, sample_k, .)), rounds in
// order, one pass.
#pragma once

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "threads.h"
#include "tile.h"

namespace zorba {
namespace ZORBA_ISA {

// 32-bit words of weights: one float32, or two 16-bit weights, the first in the low half.
template <DType dtype>
constexpr int kParts = dtype == DType::kFloat32 ? 1 : 2;
template <DType dtype>
constexpr int kWords = kTile / kParts<dtype>;

template <DType dtype>
inline float unpack(uint32_t word, int part) {
  const uint32_t half = part == 0 ? word & 0xFFFFu : word >> 16;
  if constexpr (dtype == DType::kFloat32) return as_float(word);
  if constexpr (dtype == DType::kBFloat16) return as_float(part ? word & 0xFFFF0000u : word << 16);
  if constexpr (dtype == DType::kFloat16) return load_float16(static_cast<uint16_t>(half));
}

template <DType dtype>
inline uint32_t pack(const float (&values)[kParts<dtype>]) {
  if constexpr (dtype == DType::kFloat32) return as_bits(values[0]);
  if constexpr (dtype == DType::kBFloat16) return as_bits(values[0]) >> 16 | as_bits(values[1]);
  if constexpr (dtype == DType::kFloat16) {
    return store_float16(values[0]) | static_cast<uint32_t>(store_float16(values[1])) << 16;
  }
}

// What is the same for every tile of a launch: keys, and for each group the rounds that change it.
struct Prepared {
  struct Round {
    int64_t index;
    float decay;
    std::vector<int64_t> terms;  // those with a coefficient other than zero
  };

  const Program& program;
  std::vector<PhiloxKeys> term_keys;
  std::vector<PhiloxKeys> rounding_keys;
  std::vector<std::vector<Round>> groups;

  Prepared(const Program& p, int64_t group_count) : program(p), groups(group_count) {
    for (int64_t k = 0; k < p.terms; ++k) term_keys.push_back(philox_keys(p.seeds[k]));
    for (int64_t r = 0; r < p.rounds; ++r) {
      rounding_keys.push_back(philox_keys(p.rounding_seeds[r]));
      const int64_t first = r == 0 ? 0 : p.round_ends[r - 1];
      for (int64_t g = 0; g < group_count; ++g) {
        Round round{r, p.decays[g * p.rounds + r], {}};
        for (int64_t k = first; k < p.round_ends[r]; ++k) {
          if (p.coefs[g * p.terms + k] != 0.0f) round.terms.push_back(k);
        }
        if (!round.terms.empty() || round.decay != 0.0f) groups[g].push_back(std::move(round));
      }
    }
  }
};

// Buffers of one tile, on the stack of the thread that works on it.
template <DType dtype>
struct Scratch {
  alignas(64) float weights[kParts<dtype>][kWords<dtype>];  // between two rounds
  alignas(64) float sum[kParts<dtype>][kWords<dtype>];
  alignas(64) float z[kParts<dtype>][kWords<dtype>];
  alignas(64) float dither[kTile / 2];
  alignas(64) uint32_t random[kTile / 2];
  alignas(64) uint32_t copy[kWords<dtype>];  // of a tile that is not worked on in place
};

// How a round reads and writes weights: the words of the parameter, or the buffer between rounds.
template <DType dtype>
struct Stored {
  uint32_t* at;  // need not be aligned
  float get(int part, int word) const {
    uint32_t bits;
    std::memcpy(&bits, at + word, sizeof bits);
    return unpack<dtype>(bits, part);
  }
  void set(int word, const float (&values)[kParts<dtype>]) const {
    const uint32_t bits = pack<dtype>(values);
    std::memcpy(at + word, &bits, sizeof bits);
  }
};

template <DType dtype>
struct Buffered {
  float (*at)[kWords<dtype>];
  float get(int part, int word) const { return at[part][word]; }
  void set(int word, const float (&values)[kParts<dtype>]) const {
    for (int part = 0; part < kParts<dtype>; ++part) at[part][word] = values[part];
  }
};

// One round on a whole tile. The last term is added in the loop that rounds: a pass with a single
// seed stores nothing but its noise and the weights.
template <DType dtype, bool stochastic, typename In, typename Out>
inline void add_round(const Prepared& prepared, const Prepared::Round& round, const float* coefs,
                      int64_t tile, Stream stream, In in, Out out, Scratch<dtype>& s) {
  constexpr int parts = kParts<dtype>;
  const Program& program = prepared.program;
  if constexpr (stochastic) {
    rounding_tile(tile, stream, prepared.rounding_keys[round.index], s.random, s.dither);
  }
  const float decay = round.decay;
  // What the sum starts from. Nothing to start from is 0, not weight * 0: a weight may be infinite.
  const auto start = [&](int word, float weight) {
    const float dither = stochastic ? rounding_start<dtype>(weight, s.dither[word]) : 0.0f;
    return decay != 0.0f ? fma_rn(weight, -decay, dither) : dither;
  };
  const auto rounded = [&](int part, int word, float value) {
    if constexpr (!stochastic) return round_nearest<dtype>(value);
    const uint32_t random = s.random[word];
    return round_stochastic<dtype>(value, part == 0 ? random & 0xFFFFu : random >> 16);
  };
  // Weights get what `total` says of (part, word, weight). Source and target are the same tensor or
  // apart from each other: no iteration reads what another has written.
  const auto write = [&](auto total) {
#pragma GCC ivdep
    for (int word = 0; word < kWords<dtype>; ++word) {
      float values[parts];
      for (int part = 0; part < parts; ++part) {
        const float weight = in.get(part, word);
        values[part] = rounded(part, word, weight + total(part, word, weight));
      }
      out.set(word, values);
    }
  };
  const size_t count = round.terms.size();
  for (size_t t = 0; t < count; ++t) {
    const int64_t k = round.terms[t];
    const float coef = coefs[k];
    noise_tile<parts>(static_cast<Distribution>(program.distribution), tile, stream,
                      static_cast<uint32_t>(program.samples[k]), prepared.term_keys[k], s.z);
    if (count == 1 && !stochastic && decay == 0.0f) {
      write([&](int part, int word, float) { return fma_rn(coef, s.z[part][word], 0.0f); });
    } else if (count == 1) {
      write([&](int part, int word, float weight) {
        return fma_rn(coef, s.z[part][word], start(word, weight));
      });
    } else if (t + 1 == count) {
      write([&](int part, int word, float) {
        return fma_rn(coef, s.z[part][word], s.sum[part][word]);
      });
    } else {
      for (int part = 0; part < parts; ++part) {
        for (int word = 0; word < kWords<dtype>; ++word) {
          const float before = t == 0 ? start(word, in.get(part, word)) : s.sum[part][word];
          s.sum[part][word] = fma_rn(coef, s.z[part][word], before);
        }
      }
    }
  }
  if (count == 0) {
    write([&](int, int word, float weight) { return start(word, weight); });
  }
}

template <DType dtype, bool stochastic>
inline void add_whole_tile(const Prepared& prepared, const Segment& segment, int64_t tile,
                           uint32_t* src, uint32_t* dst, Scratch<dtype>& s) {
  const Stream stream(static_cast<uint64_t>(segment.stream));
  const float* coefs = prepared.program.coefs + segment.group * prepared.program.terms;
  const std::vector<Prepared::Round>& rounds = prepared.groups[segment.group];
  const Stored<dtype> from{src}, to{dst};
  if (rounds.size() == 1) {
    add_round<dtype, stochastic>(prepared, rounds[0], coefs, tile, stream, from, to, s);
    return;
  }
  const Buffered<dtype> buffer{s.weights};
  for (int word = 0; word < kWords<dtype>; ++word) {
    float values[kParts<dtype>];
    for (int part = 0; part < kParts<dtype>; ++part) values[part] = from.get(part, word);
    buffer.set(word, values);
  }
  for (const Prepared::Round& round : rounds) {
    add_round<dtype, stochastic>(prepared, round, coefs, tile, stream, buffer, buffer, s);
  }
  for (int word = 0; word < kWords<dtype>; ++word) {
    float values[kParts<dtype>];
    for (int part = 0; part < kParts<dtype>; ++part) values[part] = buffer.get(part, word);
    to.set(word, values);
  }
}

// The elements of a tile that belong to the segment: all of them, or, at its two ends, a copy.
//
// Out of place, whole tiles go past the caches. A scratch buffer was read last by all cores; to
// take its lines back from the caches of the others, one by one, costs as much as the rest of the
// pass where the cores are far from each other.
template <DType dtype, bool stochastic>
inline void add_tile(const Prepared& prepared, const Segment& segment, int64_t tile) {
  Scratch<dtype> s;
  constexpr int64_t kSize = 4 / kParts<dtype>;  // bytes an element
  const int64_t start = tile * kTile;
  const int64_t begin = segment.offset > start ? segment.offset - start : 0;
  const int64_t left = segment.offset + segment.numel - start;
  const int64_t end = left < kTile ? left : kTile;
  char* src = reinterpret_cast<char*>(segment.src + (start - segment.offset) * kSize);
  char* dst = reinterpret_cast<char*>(segment.dst + (start - segment.offset) * kSize);

  if (begin == 0 && end == kTile && src != dst && reinterpret_cast<uintptr_t>(dst) % 64 == 0) {
    add_whole_tile<dtype, stochastic>(prepared, segment, tile, reinterpret_cast<uint32_t*>(src),
                                      s.copy, s);
    stream_out(s.copy, reinterpret_cast<uint32_t*>(dst), kWords<dtype>);
    return;
  }
  if (begin == 0 && end == kTile) {
    add_whole_tile<dtype, stochastic>(prepared, segment, tile, reinterpret_cast<uint32_t*>(src),
                                      reinterpret_cast<uint32_t*>(dst), s);
    return;
  }
  std::memset(s.copy, 0, sizeof s.copy);
  char* copy = reinterpret_cast<char*>(s.copy);
  std::memcpy(copy + begin * kSize, src + begin * kSize, (end - begin) * kSize);
  add_whole_tile<dtype, stochastic>(prepared, segment, tile, s.copy, s.copy, s);
  std::memcpy(dst + begin * kSize, copy + begin * kSize, (end - begin) * kSize);
}

}  // namespace ZORBA_ISA
}  // namespace zorba
