// Rank-one noise: z[i, j] = u[i] * v[j], so that the terms of a round are a product of matrices,
// S += U^T diag(coefs) V, which is added to blocks of rows and columns that stay in registers. Sums
// keep the order of the terms, and a product with +-1 is exact, so the bits are those of one
// fused multiply-add a term.
#pragma once

#include "add_noise.h"
#include "floats.h"

namespace zorba {
namespace ZORBA_ISA {

// Elements that a thread takes at a time. Of many terms: many rows, as the signs of columns are
// made once for all of them. Of few: so many as stay in its cache.
inline int64_t unit_size(int64_t terms) { return (terms < 16 ? 8 : 64) * kTile; }
constexpr int kBlockRows = 6;  // a block of sums is in registers, all terms through
#if defined(__AVX512F__)
constexpr int kBlockVectors = 4;
#else
constexpr int kBlockVectors = 2;
#endif
constexpr int kBlockColumns = kBlockVectors * kWide;

// Signs of consecutive rows or columns of one sample, a bit each: set is -1.
class SignBits {
 public:
  // Makes those of [begin, end); `words_` grows to what has been asked for at most.
  void make(uint32_t domain, int64_t begin, int64_t end, Stream stream, uint32_t sample,
            const PhiloxKeys& keys) {
    first_ = begin / kRademacherBlock;
    const int64_t calls = (end + kRademacherBlock - 1) / kRademacherBlock - first_;
    const int64_t whole = (calls + kLanes - 1) / kLanes * kLanes;
    words_.resize(4 * whole);
    for (int64_t call = 0; call < whole; call += kLanes) {
      uint32_t words[4][kLanes];
      philox_words<kLanes>(domain + static_cast<uint32_t>(first_ + call), stream, sample, keys,
                           words);
      for (int i = 0; i < kLanes; ++i) {
        for (int j = 0; j < 4; ++j) words_[4 * (call + i) + j] = words[j][i];
      }
    }
  }
  // 32 bits from `at` on; those behind the end are of no meaning.
  uint32_t bits(int64_t at) const {
    const int64_t local = at - first_ * kRademacherBlock;
    const size_t word = static_cast<size_t>(local / 32);
    const int shift = static_cast<int>(local % 32);
    const uint64_t next = word + 1 < words_.size() ? words_[word + 1] : 0;
    return static_cast<uint32_t>((next << 32 | words_[word]) >> shift);
  }
  bool negative(int64_t at) const { return bits(at) & 1u; }

 private:
  int64_t first_ = 0;  // Philox block of the first word
  std::vector<uint32_t> words_;
};

// +-size for `count` signs from `at` on, in whole vectors: more is written than asked for.
inline void write_signs(const SignBits& signs, int64_t at, int count, float size, float* out) {
  WideBits masks;
  for (int i = 0; i < kWide; ++i) masks[i] = 1u << i;
  const WideFloats plus = WideFloats{} + size;
  for (int i = 0; i < count; i += kWide) {
    const WideBits word = WideBits{} + signs.bits(at + i);
    const WideFloats values = (word & masks) != 0 ? -plus : plus;
    std::memcpy(out + i, &values, sizeof values);
  }
}

// A vector that need not be aligned: a copy by memcpy would go through the stack.
typedef float LooseFloats __attribute__((vector_size(4 * kWide), aligned(4), may_alias));
inline WideFloats load_wide(const float* from) {
  return *reinterpret_cast<const LooseFloats*>(from);
}
inline void store_wide(WideFloats value, float* to) { *reinterpret_cast<LooseFloats*>(to) = value; }

// `value` everywhere. 0 + value would be a sum, as it makes 0 of -0; value - 0 is a copy.
inline WideFloats spread(float value) { return value - WideFloats{}; }

// a * b + c of vectors, where a * b is exact: how often it rounds does not matter.
inline WideFloats add_exact(WideFloats a, WideFloats b, WideFloats c) {
#if defined(__AVX512F__)
  return (WideFloats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (WideFloats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Adds all terms to a block of sums: `rows` of them, `stride` apart. The coefficients of a term are
// `step` apart from those of the next, signs are [terms, kBlockColumns].
template <int rows>
inline void add_block(int64_t terms, const float* coefs, int64_t step, const float* signs,
                      float* sums, int64_t stride) {
  WideFloats sum[rows][kBlockVectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kBlockVectors; ++j) sum[r][j] = load_wide(sums + r * stride + j * kWide);
  }
  for (int64_t k = 0; k < terms; ++k) {
    WideFloats v[kBlockVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kBlockVectors; ++j) v[j] = load_wide(signs + k * kBlockColumns + j * kWide);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const WideFloats coef = spread(coefs[k * step + r]);
#pragma GCC unroll 4
      for (int j = 0; j < kBlockVectors; ++j) sum[r][j] = add_exact(coef, v[j], sum[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kBlockVectors; ++j) store_wide(sum[r][j], sums + r * stride + j * kWide);
  }
}

inline void add_block_of(int rows, int64_t terms, const float* coefs, int64_t step,
                         const float* signs, float* sums, int64_t stride) {
  switch (rows) {
    case 1: return add_block<1>(terms, coefs, step, signs, sums, stride);
    case 2: return add_block<2>(terms, coefs, step, signs, sums, stride);
    case 3: return add_block<3>(terms, coefs, step, signs, sums, stride);
    case 4: return add_block<4>(terms, coefs, step, signs, sums, stride);
    case 5: return add_block<5>(terms, coefs, step, signs, sums, stride);
    default: return add_block<kBlockRows>(terms, coefs, step, signs, sums, stride);
  }
}

// A parameter as a matrix. One of one dimension is a row, whose columns have the signs of rows.
struct Matrix {
  int64_t columns;
  bool vector;
  explicit Matrix(int64_t given)
      : columns(given > 0 ? given : int64_t{1} << 62), vector(given == 0) {}
  uint32_t column_domain() const { return vector ? kRowDomain : kColumnDomain; }
};

// What a thread needs for a unit of work; kept between units.
struct RankOne {
  std::vector<float> weights, sums;             // of a unit; weights between two rounds
  std::vector<uint16_t> random;                 // rounding bits of each element of a unit
  std::vector<SignBits> row_bits, column_bits;  // of each term
  std::vector<float> coefs;                     // [terms, rows in whole vectors], signed
  std::vector<float> signs;                     // [terms, kBlockColumns]

  // Adds a round's terms to the sums of rows [row, row + rows) and columns [begin, end), which
  // start at `sums`. Signs of the rows are in `row_bits`, unless there is one row alone.
  void add(const Prepared::Round& round, const float* coef, const Matrix& matrix, int64_t row,
           int64_t rows, int64_t begin, int64_t end, float* sums) {
    const auto terms = static_cast<int64_t>(round.terms.size());
    const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
    const int64_t step = (rows + kWide - 1) / kWide * kWide;
    coefs.resize(static_cast<size_t>(terms * step));
    signs.resize(static_cast<size_t>(terms * kBlockColumns));
    for (int64_t t = 0; t < terms; ++t) {
      const float size = coef[round.terms[t]];
      if (matrix.vector) {
        coefs[t * step] = size;
      } else {
        write_signs(row_bits[t], row, static_cast<int>(rows), size, &coefs[t * step]);
      }
    }
    for (int64_t c = begin; c < end; c += kBlockColumns) {
      for (int64_t t = 0; t < terms; ++t) {
        write_signs(column_bits[t], c, kBlockColumns, 1.0f, &signs[t * kBlockColumns]);
      }
      const auto width = static_cast<int>(std::min<int64_t>(kBlockColumns, end - c));
      for (int64_t block = 0; block < blocks; ++block) {
        const float* a = &coefs[block * kBlockRows];
        const int count =
            static_cast<int>(std::min<int64_t>(kBlockRows, rows - block * kBlockRows));
        float* at = sums + block * kBlockRows * matrix.columns + (c - begin);
        if (width == kBlockColumns) {
          add_block_of(count, terms, a, step, signs.data(), at, matrix.columns);
          continue;
        }
        // The last columns: what lies behind them is of the next row, or of nobody.
        float edge[kBlockRows][kBlockColumns] = {};
        for (int r = 0; r < count; ++r) {
          std::memcpy(edge[r], at + r * matrix.columns, width * sizeof(float));
        }
        add_block_of(count, terms, a, step, signs.data(), edge[0], kBlockColumns);
        for (int r = 0; r < count; ++r) {
          std::memcpy(at + r * matrix.columns, edge[r], width * sizeof(float));
        }
      }
    }
  }

  // Adds a round's terms to the sums of the elements [begin, end) of a parameter.
  void add_terms(const Prepared& prepared, const Prepared::Round& round, const float* coef,
                 Stream stream, const Matrix& matrix, int64_t begin, int64_t end, float* sums) {
    const int64_t n = matrix.columns;
    const int64_t first = begin / n;
    const int64_t last = (end - 1) / n;
    if (first < last && n > end - begin) {
      // Parts of two long rows: the signs of all their columns would be many more than needed.
      add_terms(prepared, round, coef, stream, matrix, begin, last * n, sums);
      sums += last * n - begin;
      return add_terms(prepared, round, coef, stream, matrix, last * n, end, sums);
    }
    // One row needs its own columns; more than one, all.
    const int64_t low = first == last ? begin - first * n : 0;
    const int64_t high = first == last ? end - first * n : n;
    const size_t terms = round.terms.size();
    if (column_bits.size() < terms) column_bits.resize(terms);
    if (row_bits.size() < terms) row_bits.resize(terms);
    for (size_t t = 0; t < terms; ++t) {
      const int64_t k = round.terms[t];
      const auto sample = static_cast<uint32_t>(prepared.program.samples[k]);
      const PhiloxKeys& keys = prepared.term_keys[k];
      column_bits[t].make(matrix.column_domain(), low, high, stream, sample, keys);
      if (!matrix.vector) row_bits[t].make(kRowDomain, first, last + 1, stream, sample, keys);
    }
    // Whole rows are one block of the matrix; rows that begin or end amid are blocks of their own.
    const int64_t whole_begin = begin == first * n ? first : first + 1;
    const int64_t whole_end = end == (last + 1) * n ? last + 1 : last;
    const auto part = [&](int64_t row, int64_t rows, int64_t from, int64_t to) {
      if (rows <= 0 || from >= to) return;
      add(round, coef, matrix, row, rows, from, to, sums + (row * n + from - begin));
    };
    if (whole_begin > whole_end) return part(first, 1, low, high);  // inside of one row
    if (whole_begin > first) part(first, 1, begin - first * n, n);
    part(whole_begin, whole_end - whole_begin, 0, n);
    if (whole_end <= last) part(last, 1, 0, end - last * n);
  }
};

// All rounds on the elements of a unit that lie in the segment.
template <DType dtype, bool stochastic>
inline void add_rank1(const Prepared& prepared, const Segment& segment, int64_t unit,
                      RankOne& own) {
  constexpr int64_t kSize = 4 / kParts<dtype>;  // bytes an element
  const Stream stream(static_cast<uint64_t>(segment.stream));
  const float* coefs = prepared.program.coefs + segment.group * prepared.program.terms;
  const int64_t size = unit_size(prepared.program.terms);
  const int64_t begin = std::max(segment.offset, unit * size);
  const int64_t end = std::min(segment.offset + segment.numel, (unit + 1) * size);
  const char* src = reinterpret_cast<const char*>(segment.src) + (begin - segment.offset) * kSize;
  char* dst = reinterpret_cast<char*>(segment.dst) + (begin - segment.offset) * kSize;
  const std::vector<Prepared::Round>& rounds = prepared.groups[segment.group];
  if (rounds.empty()) {
    if (src != dst) std::memcpy(dst, src, (end - begin) * kSize);
    return;
  }
  if (own.sums.size() < static_cast<size_t>(size)) {
    own.weights.resize(size);
    own.sums.resize(size);
    own.random.resize(size);
  }
  // float32 weights are worked on where they go to.
  constexpr bool kThere = dtype == DType::kFloat32;
  float* weights = kThere ? reinterpret_cast<float*>(dst) : own.weights.data();
  float* sums = own.sums.data();
  uint16_t* random = own.random.data();
  if (!kThere || src != dst) load_floats<dtype>(src, end - begin, weights);
  for (const Prepared::Round& round : rounds) {
    const float decay = round.decay;
    if constexpr (stochastic) {
      // Made a tile at a time, as for other noise, and the bits kept until the sums are there.
      for (int64_t tile = begin / kTile; tile * kTile < end; ++tile) {
        alignas(64) uint32_t pairs[kTile / 2];
        alignas(64) float dithers[kTile / 2];
        rounding_tile(tile, stream, prepared.rounding_keys[round.index], pairs, dithers);
        alignas(64) uint16_t bits[kTile];
        alignas(64) float dither[kTile];
        for (int i = 0; i < kTile / 2; ++i) {
          bits[2 * i] = static_cast<uint16_t>(pairs[i]);
          bits[2 * i + 1] = static_cast<uint16_t>(pairs[i] >> 16);
          dither[2 * i] = dither[2 * i + 1] = dithers[i];
        }
        const int64_t from = std::max(begin, tile * kTile);
        const int64_t count = std::min(end, (tile + 1) * kTile) - from;
        const int64_t place = from - tile * kTile;
        std::memcpy(random + (from - begin), bits + place, count * sizeof(uint16_t));
        for (int64_t i = 0; i < count; ++i) {
          const int64_t at = from - begin + i;
          sums[at] = rounding_start<dtype>(weights[at], dither[place + i]);
        }
      }
    } else {
      std::fill_n(sums, end - begin, 0.0f);
    }
    if (decay != 0.0f) {
      for (int64_t i = 0; i < end - begin; ++i) sums[i] = fma_rn(weights[i], -decay, sums[i]);
    }
    if (!round.terms.empty()) {
      own.add_terms(prepared, round, coefs, stream, Matrix(segment.columns), begin, end, sums);
    }
    for (int64_t i = 0; i < end - begin; ++i) {
      const float sum = weights[i] + sums[i];
      weights[i] = stochastic ? round_stochastic<dtype>(sum, random[i]) : round_nearest<dtype>(sum);
    }
  }
  if (!kThere) store_floats<dtype>(weights, end - begin, dst);
}

// z of the elements [begin, end) of a parameter.
inline void rank1_values(const Matrix& matrix, Stream stream, uint32_t sample,
                         const PhiloxKeys& keys, int64_t begin, int64_t end, float* out) {
  SignBits rows, columns;
  const int64_t n = matrix.columns;
  const int64_t first = begin / n;
  const int64_t last = (end - 1) / n;
  const int64_t low = first == last ? begin - first * n : 0;
  columns.make(matrix.column_domain(), low, first == last ? end - first * n : n, stream, sample,
               keys);
  if (!matrix.vector) rows.make(kRowDomain, first, last + 1, stream, sample, keys);
  for (int64_t i = begin; i < end;) {
    const int64_t row = i / n;
    const int64_t stop = std::min(end, (row + 1) * n);
    const float u = !matrix.vector && rows.negative(row) ? -1.0f : 1.0f;
    for (; i < stop; ++i) {
      const float v = columns.negative(i - row * n) ? -1.0f : 1.0f;
      out[i - begin] = u * v;
    }
  }
}

}  // namespace ZORBA_ISA
}  // namespace zorba
