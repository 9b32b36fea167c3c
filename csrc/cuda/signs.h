// Signs of a program of many terms: made by the whole warp, shared, turned into +-1.
//
// A Philox call serves 128 signs, so the lanes make the calls of kTermsAtOnce terms together and
// exchange signs through shared memory. There a term has one word a lane: byte h are the signs of
// block h of the kAtOnce strips that the lane holds.
#pragma once

#include "rank1.h"
#include "strip.h"

namespace zorba {
namespace device {

constexpr int kHalfWarp = kLanes / 2;

// A term, in 16-byte accesses.
ZORBA_HD Term load_term(const Term* at) {
  Term term;
#if defined(__CUDA_ARCH__)
  constexpr int kParts = sizeof(Term) / sizeof(uint4);
  uint4 parts[kParts];
#pragma unroll
  for (int i = 0; i < kParts; ++i) parts[i] = reinterpret_cast<const uint4*>(at)[i];
  memcpy(&term, parts, sizeof term);
#else
  term = *at;
#endif
  return term;
}

// 4 words of 4 bytes, transposed: byte h of result m is byte m of rows[h].
ZORBA_HD Words transpose_bytes(const uint32_t (&rows)[4]) {
  const uint32_t a = permute_bytes<0x5140>(rows[0], rows[1]);
  const uint32_t b = permute_bytes<0x5140>(rows[2], rows[3]);
  const uint32_t c = permute_bytes<0x7362>(rows[0], rows[1]);
  const uint32_t d = permute_bytes<0x7362>(rows[2], rows[3]);
  return {permute_bytes<0x5410>(a, b), permute_bytes<0x7632>(a, b), permute_bytes<0x5410>(c, d),
          permute_bytes<0x7632>(c, d)};
}

// Half a term's Rademacher signs: lanes 0-15 (part 0) or 16-31 of the strips. Their blocks h take
// call 2 h + part.
ZORBA_HD void make_half(const Term& term, Stream stream, uint32_t strip, int part,
                        uint32_t* words_of_term) {
  uint32_t words[4][4];
#pragma unroll
  for (int h = 0; h < 4; ++h) {
    const uint32_t call = strip * kCallsInStrip + 2 * h + part;
    const Words w = philox4x32(call, stream.lo, stream.hi, term.sample, term.keys);
    words[0][h] = w.w0;
    words[1][h] = w.w1;
    words[2][h] = w.w2;
    words[3][h] = w.w3;
  }
  uint32_t* at = words_of_term + kHalfWarp * part;
#pragma unroll
  for (int i = 0; i < 4; ++i) store_words(at + 4 * i, transpose_bytes(words[i]));
}

// Turns the words of a run, of `count` terms, into one word a lane. Eight lanes take a term: each
// makes the words of four lanes of 32 elements in each quarter of the run.
ZORBA_HD void join_signs(const Run& run, int count, uint32_t* shared) {
  constexpr int kEach = kLanes / 4;  // lanes a term
  constexpr int kWords = kTermWords<Distribution::kRank1>;
  PerLane<Spot[4]> spots;
  each_lane([&](int lane) {
#pragma unroll
    for (int h = 0; h < 4; ++h) spots[lane][h] = spot_of(run, 32 * (kEach * h + lane % kEach));
  });
#pragma unroll 1
  for (int first = 0; first < count; first += 4) {
    PerLane<Words> made;
    const auto words = [&](int lane) { return shared + kWords * (first + lane / kEach); };
    each_lane([&](int lane) {
      if (first + lane / kEach >= count) return;
      uint32_t quarters[4];
#pragma unroll
      for (int h = 0; h < 4; ++h) quarters[h] = signs_from(run, words(lane), spots[lane][h]);
      made[lane] = transpose_bytes(quarters);
    });
    warp_sync();  // the words go where the run's were
    each_lane([&](int lane) {
      if (first + lane / kEach < count) store_words(words(lane) + 4 * (lane % kEach), made[lane]);
    });
  }
  warp_sync();
}

// Makes the signs of those terms among [base, base + kTermsAtOnce) that have a coefficient, one
// after the other in `shared`, and returns which these are: bit t for term base + t.
template <Distribution distribution>
ZORBA_HD uint32_t make_signs(const Many& program, const Segment& segment, Stream stream,
                             int32_t base, uint32_t strip, uint32_t* shared) {
  constexpr int kWords = kTermWords<distribution>;
  constexpr bool kRank1 = distribution == Distribution::kRank1;
  PerLane<float> coef;
  const uint32_t mask = ballot([&](int lane) {
    const int32_t k = base + lane;
    coef[lane] = k < program.terms() ? program.coef(segment.group, k) : 0.0f;
    return coef[lane] != 0.0f;
  });
  if (mask == 0) return 0;
  const auto slot = [&](int t) { return shared + kWords * count_ones(mask & ((1u << t) - 1)); };
  Run run;
  if constexpr (kRank1) {
    run = run_of<kAtOnce * kStrip, kStripBits>(strip, segment.columns);
  }
  warp_sync();
  each_lane([&](int lane) {
    if (coef[lane] != 0.0f) slot(lane)[kWords - 4] = as_bits(coef[lane]);
    const int part = lane / kHalfWarp;
#pragma unroll 1
    for (int t = lane % kHalfWarp; t < kTermsAtOnce; t += kHalfWarp) {
      if ((mask >> t & 1) == 0) continue;
      if constexpr (kRank1) {
        // Keys in registers, as below, would make the kernel spill.
#pragma unroll 2
        for (uint32_t call = part; call < run.calls; call += 2) {
          store_words(slot(t) + 4 * call, run_words(run, call, stream, program.sample(base + t),
                                                    program.keys(base + t)));
        }
      } else {
        const Term term = load_term(program.term + base + t);
        make_half(term, stream, strip, part, slot(t));
      }
    }
  });
  warp_sync();
  if constexpr (kRank1) join_signs(run, count_ones(mask), shared);
  return mask;
}

// Turning a bit into a float takes a shift and a LOP3 at least, both on the slower ALU pipe. Here
// one AND serves two bits, and the tensor cores do the rest, four bits an instruction: they compute
// A B + 1, where B is diagonal, so that each element of the 16x8 matrix A stays in its lane. It is
// one bit of the signs, wherever that stands in the exponent of a bfloat16: 0 or V, a power of two.
// The diagonal is -2 / V and the result 1 or -1, exactly, in whatever order the cores add.
constexpr int kProducts = 8;

// A lane has two elements of column lane / 4 of B: rows 2 (lane % 4) and the one after it.
ZORBA_HD uint32_t product_scale(int lane, int i) {
  const uint32_t diagonal = lane / 8 == lane % 4 ? 1u << (16 * (lane / 4 % 2)) : 0;
  return (0x8000u | (255u - (1u << i)) << 7) * diagonal;  // V is 2^(2^i - 127)
}

// Rows of A: lane / 4 in the first word and 8 more in the second, which has the signs rotated so
// that the two have all 32 bits.
ZORBA_HD uint32_t product_operand(uint32_t signs, int i, int word) {
  return (word == 0 ? signs : permute_bytes<0x2103>(signs, signs)) & (0x00800080u << i);
}

// The bit of the signs that result c of product i stands for.
ZORBA_HD constexpr int product_bit(int i, int c) { return (7 + i + c % 2 * 16 + c / 2 * 24) % 32; }

// What the products need in registers. The ones are four, as ptxas would otherwise copy them for
// each product, and come from a ballot, as it would otherwise load the constant again and again.
struct Unpacker {
  uint32_t scales[kProducts];
  float ones[4];
};

ZORBA_HD Unpacker make_unpacker(int lane) {
  Unpacker unpacker;
#pragma unroll
  for (int i = 0; i < kProducts; ++i) unpacker.scales[i] = product_scale(lane, i);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if defined(__CUDA_ARCH__)
    unpacker.ones[i] = as_float(__ballot_sync(~0u, true) & 0x3F800000u);
#else
    unpacker.ones[i] = 1.0f;
#endif
  }
  return unpacker;
}

// z of 4 elements, those of product_bit(i, .).
ZORBA_HD void unpack_signs(uint32_t signs, int i, const Unpacker& unpacker, float (&z)[4]) {
#if defined(__CUDA_ARCH__)
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%7, %8, %9, %10};"
      : "=f"(z[0]), "=f"(z[1]), "=f"(z[2]), "=f"(z[3])
      : "r"(product_operand(signs, i, 0)), "r"(product_operand(signs, i, 1)),
        "r"(unpacker.scales[i]), "f"(unpacker.ones[0]), "f"(unpacker.ones[1]),
        "f"(unpacker.ones[2]), "f"(unpacker.ones[3]));
#else
  (void)unpacker;
  for (int c = 0; c < 4; ++c) z[c] = rademacher(signs, product_bit(i, c));
#endif
}

// Adds a term, whose signs and coefficient are at `term`.
template <DType dtype, Distribution distribution>
ZORBA_HD void add_signs(const uint32_t* term, int lane, const Unpacker& unpacker,
                        Held<dtype> (&held)[kAtOnce]) {
  const uint32_t signs = term[lane];
  const float coef = as_float(term[kTermWords<distribution> - 4]);
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
    float z[4];
    unpack_signs(signs, i, unpacker, z);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int bit = product_bit(i, c);
      float& sum = held[bit / kHeld].sum[bit % kHeld];
      sum = fma_rn(coef, z[c], sum);
    }
  }
}

}  // namespace device
}  // namespace zorba
