// The code that a warp runs on the GPU (csrc/cuda/warp.h), compiled for the host: 32 lanes in a
// loop. tests/kernels/test_cuda_host.py builds it and compares it with the reference bit for bit.
#include <vector>

#include "../../csrc/cuda/perturb.h"
#include "../../csrc/cuda/warp.h"

using namespace zorba;
using namespace zorba::device;

namespace {

template <Distribution distribution, bool stochastic, typename Program>
void run(const Table& table, const Program& program) {
  alignas(16) uint32_t signs[Program::template kSignWords<distribution>];
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

template <Distribution distribution, typename Form>
void rounded(const Table& table, const Form& form, bool stochastic) {
  stochastic ? run<distribution, true>(table, form) : run<distribution, false>(table, form);
}

template <typename Form>
void choose(const Table& table, const Form& form, const zorba::Program& program) {
  switch (static_cast<Distribution>(program.distribution)) {
    case Distribution::kGaussian:
      return rounded<Distribution::kGaussian>(table, form, program.stochastic);
    case Distribution::kRademacher:
      return rounded<Distribution::kRademacher>(table, form, program.stochastic);
    case Distribution::kRank1:
      return rounded<Distribution::kRank1>(table, form, program.stochastic);
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

extern "C" int calls_of_strips(uint32_t strip, int64_t columns) {
  return static_cast<int>(run_of<kAtOnce * kStrip, kStripBits>(strip, columns).calls);
}
extern "C" int calls_of_tile(uint32_t strip, int64_t columns) {
  return static_cast<int>(run_of<kTile, kStripBits>(strip, columns).calls);
}

extern "C" void noise(float* out, int64_t numel, int64_t offset, uint64_t seed, uint64_t stream,
                      uint32_t sample, int64_t columns) {
  const Stream halves{static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)};
  const PhiloxKeys keys = philox_keys(seed);
  for (int64_t i = 0; i < numel; ++i) {
    const int64_t element = offset + i;
    const BlockNoise<Distribution::kRank1> block(static_cast<uint32_t>(element / kGaussianBlock),
                                                 columns);
    float z[kGaussianBlock];
    block.values(halves, sample, keys, z);
    out[i] = z[element % kGaussianBlock];
  }
}

// Two "blocks" of threads, each with some of the tokens.
extern "C" void perturb(const Perturbation* perturbation) {
  const Perturbation& p = *perturbation;
  const PhiloxKeys keys = philox_keys(p.seed);
  const int64_t tokens = p.rows * p.tokens;
  for (int64_t block = 0; block < 2; ++block) {
    TokenShared shared;
    const int64_t begin = block * (tokens / 2);
    const int64_t end = block == 0 ? tokens / 2 : tokens;
    switch (static_cast<DType>(p.dtype)) {
      case DType::kBFloat16: perturb_tokens<DType::kBFloat16>(p, keys, begin, end, shared); break;
      case DType::kFloat16: perturb_tokens<DType::kFloat16>(p, keys, begin, end, shared); break;
      default: perturb_tokens<DType::kFloat32>(p, keys, begin, end, shared);
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
