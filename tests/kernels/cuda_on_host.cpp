// The code that a warp runs on the GPU (csrc/cuda/warp.h), compiled for the host: 32 lanes in a
// loop. tests/kernels/test_cuda_host.py builds it and compares it with the reference bit for bit.
#include <vector>

#include "../../csrc/cuda/warp.h"

using namespace zorba;
using namespace zorba::device;

namespace {

template <bool gaussian, bool stochastic, typename Program>
void run(const Table& table, const Program& program) {
  alignas(16) uint32_t signs[Program::kSignWords];
  // Two "warps" with a stride, so that find_segment() has to skip.
  for (int64_t warp = 0; warp < 2; ++warp) {
    int64_t at = 0;
    for (int64_t piece = warp; piece < table.tiles; piece += 2) {
      at = find_segment(table, piece, at);
      const Segment& s = table.segments[at];
      const int64_t tile = first_tile(s) + piece - (at == 0 ? 0 : table.ends[at - 1]);
      switch (static_cast<DType>(s.dtype)) {
        case DType::kBFloat16:
          add_to_tile<DType::kBFloat16, gaussian, stochastic>(program, s, tile, signs);
          break;
        case DType::kFloat16:
          add_to_tile<DType::kFloat16, gaussian, stochastic>(program, s, tile, signs);
          break;
        default: add_to_tile<DType::kFloat32, gaussian, false>(program, s, tile, signs);
      }
    }
  }
}

template <typename Program>
void choose(const Table& table, const Program& program, bool gaussian, bool stochastic) {
  if (gaussian) {
    stochastic ? run<true, true>(table, program) : run<true, false>(table, program);
  } else {
    stochastic ? run<false, true>(table, program) : run<false, false>(table, program);
  }
}

}  // namespace

// What the tensor cores make of the signs of 32 lanes: D = A B + 1 with mma.m16n8k8, its elements
// spread over the lanes as the PTX manual says. z[32 lane + bit] belongs to a bit of a lane's
// signs.
extern "C" void unpack(const uint32_t* signs, float* z) {
  for (int i = 0; i < kProducts; ++i) {
    float a[16][8], b[8][8];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int group = lane / 4;
      for (int half = 0; half < 2; ++half) {
        const int place = 2 * (lane % 4) + half;
        const auto number = [&](uint32_t word) {
          return load_bfloat16(static_cast<uint16_t>(word >> (16 * half)));
        };
        a[group][place] = number(product_operand(signs[lane], i, 0));
        a[group + 8][place] = number(product_operand(signs[lane], i, 1));
        b[place][group] = number(product_scale(lane, i));
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int c = 0; c < 4; ++c) {
        float sum = 1.0f;
        for (int k = 0; k < 8; ++k) {
          sum += a[lane / 4 + c / 2 * 8][k] * b[k][2 * (lane % 4) + c % 2];
        }
        z[kLanes * lane + product_bit(i, c)] = sum;
      }
    }
  }
}

extern "C" void add_noise(const Segment* segments, int64_t count, const uint64_t* seeds,
                          const int64_t* samples, const float* coefs, const float* decays,
                          int64_t groups, int64_t terms, const int64_t* round_ends,
                          const uint64_t* rounding_seeds, int64_t rounds, bool gaussian,
                          bool stochastic, bool as_single) {
  std::vector<int64_t> ends(count);
  int64_t tiles = 0;
  for (int64_t i = 0; i < count; ++i) ends[i] = tiles += tile_count(segments[i]);
  const Table table{segments, ends.data(), count, tiles};
  if (as_single) {
    Single single{philox_keys(seeds[0]),
                  philox_keys(rounding_seeds[0]),
                  static_cast<uint32_t>(samples[0]),
                  {}};
    for (int64_t g = 0; g < groups; ++g) single.steps[g] = {coefs[g], decays[g]};
    choose(table, single, gaussian, stochastic);
    return;
  }
  std::vector<Term> term(terms);
  std::vector<Round> round(rounds);
  for (int64_t k = 0; k < terms; ++k) {
    term[k] = {philox_keys(seeds[k]), static_cast<uint32_t>(samples[k]), {}};
  }
  for (int64_t r = 0; r < rounds; ++r) {
    round[r] = {philox_keys(rounding_seeds[r]),
                static_cast<int32_t>(r == 0 ? 0 : round_ends[r - 1]),
                static_cast<int32_t>(round_ends[r]),
                {}};
  }
  const Many many{term.data(),
                  round.data(),
                  coefs,
                  decays,
                  static_cast<int32_t>(terms),
                  static_cast<int32_t>(rounds)};
  choose(table, many, gaussian, stochastic);
}
