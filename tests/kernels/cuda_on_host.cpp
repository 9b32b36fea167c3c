// The code that a warp runs on the GPU (csrc/cuda/warp.h), compiled for the host: 32 lanes in a
// loop. tests/kernels/test_cuda_host.py builds it and compares it with the reference bit for bit.
#include <vector>

#include "../../csrc/cuda/warp.h"

using namespace zorba;
using namespace zorba::device;

namespace {

template <Distribution distribution, bool stochastic, typename Program>
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
          add_to_tile<DType::kBFloat16, distribution, stochastic>(program, s, tile, signs);
          break;
        case DType::kFloat16:
          add_to_tile<DType::kFloat16, distribution, stochastic>(program, s, tile, signs);
          break;
        default: add_to_tile<DType::kFloat32, distribution, false>(program, s, tile, signs);
      }
    }
  }
}

template <typename Form>
void choose(const Table& table, const Form& form, const zorba::Program& program) {
  constexpr Distribution kGaussian = Distribution::kGaussian;
  constexpr Distribution kRademacher = Distribution::kRademacher;
  if (static_cast<Distribution>(program.distribution) == kGaussian) {
    program.stochastic ? run<kGaussian, true>(table, form) : run<kGaussian, false>(table, form);
  } else {
    program.stochastic ? run<kRademacher, true>(table, form) : run<kRademacher, false>(table, form);
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

extern "C" void add_noise(const Segment* segments, int64_t count, const zorba::Program* program,
                          bool as_single) {
  const zorba::Program& p = *program;
  std::vector<int64_t> ends(count);
  int64_t tiles = 0;
  for (int64_t i = 0; i < count; ++i) ends[i] = tiles += tile_count(segments[i]);
  const Table table{segments, ends.data(), count, tiles};
  if (as_single) {
    Single single{philox_keys(p.seeds[0]),
                  philox_keys(p.rounding_seeds[0]),
                  static_cast<uint32_t>(p.samples[0]),
                  {}};
    for (int64_t g = 0; g < p.groups; ++g) single.steps[g] = {p.coefs[g], p.decays[g]};
    choose(table, single, p);
    return;
  }
  std::vector<Term> term(p.terms);
  std::vector<Round> round(p.rounds);
  for (int64_t k = 0; k < p.terms; ++k) {
    term[k] = {philox_keys(p.seeds[k]), static_cast<uint32_t>(p.samples[k]), {}};
  }
  for (int64_t r = 0; r < p.rounds; ++r) {
    round[r] = {philox_keys(p.rounding_seeds[r]),
                static_cast<int32_t>(r == 0 ? 0 : p.round_ends[r - 1]),
                static_cast<int32_t>(p.round_ends[r]),
                {}};
  }
  const Many many{term.data(),
                  round.data(),
                  p.coefs,
                  p.decays,
                  static_cast<int32_t>(p.terms),
                  static_cast<int32_t>(p.rounds)};
  choose(table, many, p);
}
