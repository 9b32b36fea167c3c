// w <- round(w - decay * w + sum_k coef[group, k] * z(seed_k, stream, sample_k, .)), rounds in order,
// one pass.
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

template <DType dtype>
using Storage = std::conditional_t<dtype == DType::kFloat32, float, uint16_t>;

template <DType dtype>
inline float load(Storage<dtype> stored) {
  if constexpr (dtype == DType::kFloat32) return stored;
  if constexpr (dtype == DType::kBFloat16) return load_bfloat16(stored);
  if constexpr (dtype == DType::kFloat16) return load_float16(stored);
}

template <DType dtype>
inline Storage<dtype> store(float value) {
  if constexpr (dtype == DType::kFloat32) return value;
  if constexpr (dtype == DType::kBFloat16) return store_bfloat16(value);
  if constexpr (dtype == DType::kFloat16) return store_float16(value);
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
struct Scratch {
  alignas(64) float weights[kTile];
  alignas(64) float sum[kTile];
  alignas(64) float z[kTile];
  alignas(64) float dither[kTile];
  alignas(64) uint32_t random16[kTile];
};

// How a round reads and writes the weights: the parameter's own storage, or the tile's float32
// buffer between two rounds.
template <DType dtype>
struct Stored {
  Storage<dtype>* at;
  float get(int i) const { return load<dtype>(at[i]); }
  void set(int i, float value) const { at[i] = store<dtype>(value); }
};

struct Buffered {
  float* at;
  float get(int i) const { return at[i]; }
  void set(int i, float value) const { at[i] = value; }
};

// One round on elements [begin, end) of a tile. The last term is added in the loop that rounds: a
// pass with a single seed stores nothing but its noise and the weights.
template <DType dtype, bool stochastic, typename In, typename Out>
inline void add_round(const Prepared& prepared, const Prepared::Round& round, const float* coefs,
                      int64_t tile, Stream stream, int begin, int end, In in, Out out, Scratch& s) {
  const Program& program = prepared.program;
  if (stochastic) {
    rounding_tile(tile, stream, prepared.rounding_keys[round.index], s.random16, s.dither);
  }
  const float decay = round.decay;
  // What the sum starts from. Nothing to start from is 0, not weight * 0: a weight may be infinite.
  const auto start = [&](int i, float weight) {
    const float dither = stochastic ? rounding_start<dtype>(weight, s.dither[i]) : 0.0f;
    return decay != 0.0f ? fma_rn(weight, -decay, dither) : dither;
  };
  const auto finish = [&](int i, float weight, float sum) {
    const float value = weight + sum;
    out.set(i, stochastic ? round_stochastic<dtype>(value, s.random16[i])
                          : round_nearest<dtype>(value));
  };
  const size_t count = round.terms.size();
  for (size_t t = 0; t < count; ++t) {
    const int64_t k = round.terms[t];
    const float coef = coefs[k];
    if (program.gaussian) {
      gaussian_tile(tile, stream, program.samples[k], prepared.term_keys[k], s.z);
    } else {
      rademacher_tile(tile, stream, program.samples[k], prepared.term_keys[k], s.z);
    }
    if (count == 1) {
      for (int i = begin; i < end; ++i) {
        const float weight = in.get(i);
        finish(i, weight, fma_rn(coef, s.z[i], start(i, weight)));
      }
    } else if (t == 0) {
      for (int i = begin; i < end; ++i) s.sum[i] = fma_rn(coef, s.z[i], start(i, in.get(i)));
    } else if (t + 1 < count) {
      for (int i = begin; i < end; ++i) s.sum[i] = fma_rn(coef, s.z[i], s.sum[i]);
    } else {
      for (int i = begin; i < end; ++i) finish(i, in.get(i), fma_rn(coef, s.z[i], s.sum[i]));
    }
  }
  if (count == 0) {
    for (int i = begin; i < end; ++i) {
      const float weight = in.get(i);
      finish(i, weight, start(i, weight));
    }
  }
}

template <DType dtype, bool stochastic>
inline void add_tile(const Prepared& prepared, const Segment& segment, int64_t tile, Scratch& s) {
  const int64_t start = tile * kTile;
  const int begin = static_cast<int>(segment.offset > start ? segment.offset - start : 0);
  const int64_t left = segment.offset + segment.numel - start;
  const int end = static_cast<int>(left < kTile ? left : kTile);
  const int64_t shift = start - segment.offset;
  const Stored<dtype> src{reinterpret_cast<Storage<dtype>*>(segment.src) + shift};
  const Stored<dtype> dst{reinterpret_cast<Storage<dtype>*>(segment.dst) + shift};
  const Stream stream(static_cast<uint64_t>(segment.stream));
  const float* coefs = prepared.program.coefs + segment.group * prepared.program.terms;
  const std::vector<Prepared::Round>& rounds = prepared.groups[segment.group];

  // The next tile's weights travel while this one's noise is made; a prefetch never faults.
  for (int i = 0; i < kTile; i += 64 / sizeof(*src.at)) __builtin_prefetch(src.at + kTile + i, 1);

  if (rounds.size() == 1) {
    add_round<dtype, stochastic>(prepared, rounds[0], coefs, tile, stream, begin, end, src, dst, s);
    return;
  }
  for (int i = begin; i < end; ++i) s.weights[i] = src.get(i);
  const Buffered buffer{s.weights};
  for (const Prepared::Round& round : rounds) {
    add_round<dtype, stochastic>(prepared, round, coefs, tile, stream, begin, end, buffer, buffer,
                                 s);
  }
  for (int i = begin; i < end; ++i) dst.set(i, s.weights[i]);
}

}  // namespace ZORBA_ISA
}  // namespace zorba
