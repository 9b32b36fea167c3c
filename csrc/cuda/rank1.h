// Signs of rank-one noise, put together from those of rows and columns.
//
// A run is what a warp works on: consecutive elements of a parameter. Its lanes make the Philox
// calls that have the signs of its columns and rows, and leave them in shared memory, a bit a sign.
// From there a lane takes 32 elements at a time: the bits of their columns, flipped where their row
// is -1.
#pragma once

#include "values.h"

namespace zorba {
namespace device {

constexpr uint32_t kCall = kRademacherBlock;  // signs of a Philox call
constexpr uint64_t kEndless = uint64_t{1} << 62;

// A parameter as a matrix. One of one dimension is a row, whose columns have the signs of rows.
struct Matrix {
  uint64_t columns;
  bool vector;
  ZORBA_HD explicit Matrix(int64_t given)
      : columns(given > 0 ? static_cast<uint64_t>(given) : kEndless), vector(given == 0) {}
  ZORBA_HD uint32_t column_domain() const { return vector ? kRowDomain : kColumnDomain; }
};

// Where an element of a parameter is.
struct Corner {
  uint64_t row, column;
};

// Of element `units` * 2^bits. A division of 64-bit numbers is a call, which costs a kernel that
// has its registers full more than these steps.
template <int bits>
ZORBA_HD Corner corner_of(uint32_t units, const Matrix& matrix) {
  if (matrix.vector) return {0, static_cast<uint64_t>(units) << bits};
  const bool wide = matrix.columns > 0xFFFFFFFFu;
  const uint32_t whole = wide ? 0 : units / static_cast<uint32_t>(matrix.columns);
  Corner at{whole, units - whole * matrix.columns};
#pragma unroll 1
  for (int i = 0; i < bits; ++i) {
    at = {2 * at.row, 2 * at.column};
    if (at.column >= matrix.columns) at = {at.row + 1, at.column - matrix.columns};
  }
  return at;
}

// --- Runs ----------------------------------------------------------------------------------------

// Columns of a run are counted from the first of a call: the call that has the first element's, or,
// where the run may have whole rows, that of column 0. Behind the end of the first row come those
// of column 0 and up, for all further rows. Distances that no run reaches are cut to kFar.
struct Run {
  uint32_t column_calls;   // that the run has
  uint32_t calls;          // with those of the rows, which follow
  uint32_t first_counter;  // Philox counters: of call i, with i to be added, up to the row's end,
  uint32_t again_counter;  // behind it,
  uint32_t row_counter;    // and of rows; 0: all of them are +1
  uint32_t column, row;    // of the first element; the row counts from the first of its call
  uint32_t row_end;        // where the columns of the first row end
  uint32_t again;          // where column 0 comes
  uint32_t columns;
};

constexpr uint32_t kFar = 1u << 20;

ZORBA_HD uint32_t near(uint64_t distance) {
  return distance < kFar ? static_cast<uint32_t>(distance) : kFar;
}

// `elements` from units * 2^bits on.
template <int elements, int bits>
ZORBA_HD Run run_of(uint32_t units, int64_t columns) {
  const Matrix matrix(columns);
  const Corner first = corner_of<bits>(units, matrix);
  const bool rows = matrix.columns <= elements;
  const uint64_t call = rows ? 0 : first.column / kCall;
  const uint64_t before = call * kCall;
  Run run;
  run.column = static_cast<uint32_t>(first.column - before);
  run.row = static_cast<uint32_t>(first.row % kCall);
  run.row_end = near(matrix.columns - before);
  run.again = rows ? 0 : near((matrix.columns + kCall - 1) / kCall * kCall - before);
  run.columns = near(matrix.columns);
  const uint32_t last = run.column + elements - 1;
  uint32_t last_row = run.row;
  uint32_t end = last + 1;  // of the columns
  if (last >= run.row_end) {
    const uint32_t past = last - run.row_end;
    last_row += 1 + past / run.columns;
    end = rows ? run.columns : run.again + past + 1;
  }
  run.column_calls = (end + kCall - 1) / kCall;
  // At most four calls more than full ones: columns may begin and end amid a call, end with the row
  // and begin again, in two rows whose signs are in two calls.
  run.calls = run.column_calls + last_row / kCall + 1;
  run.first_counter = matrix.column_domain() + static_cast<uint32_t>(call);
  run.again_counter = matrix.column_domain() - run.again / kCall;
  run.row_counter = matrix.vector ? 0 : kRowDomain + static_cast<uint32_t>(first.row / kCall);
  return run;
}

// The words of a call, which go to word 4 * call of the run's.
ZORBA_HD Words run_words(const Run& run, uint32_t call, Stream stream, uint32_t sample,
                         const PhiloxKeys& keys) {
  const bool of_rows = call >= run.column_calls;
  if (of_rows && run.row_counter == 0) return {0, 0, 0, 0};
  const uint32_t first = call * kCall < run.again ? run.first_counter : run.again_counter;
  const uint32_t counter = call + (of_rows ? run.row_counter - run.column_calls : first);
  return philox4x32(counter, stream.lo, stream.hi, sample, keys);
}

// Where the signs of an element are: bits of the words of the columns, and of those of the rows.
struct Spot {
  uint32_t column, row;
  uint32_t room;  // elements up to the end of the row
};

// Of the element `distance` behind the first of the run.
ZORBA_HD Spot spot_of(const Run& run, uint32_t distance) {
  const uint32_t at = run.column + distance;
  if (at < run.row_end) return {at, run.row, run.row_end - at};
  const uint32_t past = at - run.row_end;
  const uint32_t rows = past / run.columns;
  const uint32_t column = past - rows * run.columns;
  return {run.again + column, run.row + 1 + rows, run.columns - column};
}

// Bits [shift, shift + 32) of two words; shift is below 32.
ZORBA_HD uint32_t shift_right(uint32_t low, uint32_t high, uint32_t shift) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_r(low, high, shift);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> shift);
#endif
}

// Signs of 32 elements from a spot on. `words` are the run's.
ZORBA_HD uint32_t signs_from(const Run& run, const uint32_t* words, Spot spot) {
  const uint32_t* rows = words + 4 * run.column_calls;
  uint32_t signs = 0;
  uint32_t done = 0;
#pragma unroll 1
  while (true) {
    const uint32_t* at = words + spot.column / 32;
    const uint32_t row = rows[spot.row / 32] << (31 - spot.row % 32);
    const uint32_t flip = static_cast<uint32_t>(static_cast<int32_t>(row) >> 31);
    // What is behind the row's end is of no meaning, and the next row covers it.
    const uint32_t piece = shift_right(at[0], at[1], spot.column % 32) ^ flip;
    signs = (signs & ((1u << done) - 1)) | piece << done;
    done += spot.room;
    if (done >= 32) return signs;
    spot = {run.again, spot.row + 1, run.columns};
  }
}

// Makes the signs of a tile: byte i of `shared` has those of its block i.
ZORBA_HD void make_tile_signs(uint32_t strip, int64_t columns, Stream stream, uint32_t sample,
                              const PhiloxKeys& keys, uint32_t* shared) {
  const Run run = run_of<kTile, kStripBits>(strip, columns);
  PerLane<Words> made;
  warp_sync();
  each_lane([&](int lane) {
#pragma unroll 1
    for (uint32_t call = lane; call < run.calls; call += kLanes) {
      store_words(shared + 4 * call, run_words(run, call, stream, sample, keys));
    }
  });
  warp_sync();
  each_lane([&](int lane) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = signs_from(run, shared, spot_of(run, kCall * lane + 32 * i));
    }
    made[lane] = {words[0], words[1], words[2], words[3]};
  });
  warp_sync();
  each_lane([&](int lane) { store_words(shared + 4 * lane, made[lane]); });
  warp_sync();
}

// --- A block -------------------------------------------------------------------------------------

// Bit `at` of four words, as the lowest.
ZORBA_HD uint32_t bit_at(const Words& words, uint32_t at) {
  const uint32_t low = at < 32 ? words.w0 : words.w1;
  const uint32_t high = at < 96 ? words.w2 : words.w3;
  return (at < 64 ? low : high) >> (at % 32);
}

// z of the 8 elements of a block that begins at `at`, without help from other lanes.
ZORBA_HD void rank1_block(const Matrix& matrix, Corner at, Stream stream, uint32_t sample,
                          const PhiloxKeys& keys, float (&z)[kGaussianBlock]) {
  Words columns{}, rows{};
  uint32_t column_counter = 0, row_counter = 0;  // no domain has 0
  uint32_t signs = 0;
#pragma unroll 1
  for (int e = 0; e < kGaussianBlock; ++e) {
    const uint32_t of_column = matrix.column_domain() + static_cast<uint32_t>(at.column / kCall);
    if (of_column != column_counter) {
      column_counter = of_column;
      columns = philox4x32(of_column, stream.lo, stream.hi, sample, keys);
    }
    const uint32_t of_row = kRowDomain + static_cast<uint32_t>(at.row / kCall);
    if (of_row != row_counter && !matrix.vector) {
      row_counter = of_row;
      rows = philox4x32(of_row, stream.lo, stream.hi, sample, keys);
    }
    const uint32_t u = bit_at(rows, static_cast<uint32_t>(at.row % kCall));
    const uint32_t v = bit_at(columns, static_cast<uint32_t>(at.column % kCall));
    signs |= ((u ^ v) & 1u) << e;
    if (++at.column == matrix.columns) at = {at.row + 1, 0};
  }
#pragma unroll
  for (int e = 0; e < kGaussianBlock; ++e) z[e] = rademacher(signs, e);
}

// z of one block, of any noise and any number of terms.
template <Distribution distribution>
struct BlockNoise {
  uint32_t block;
  ZORBA_HD BlockNoise(uint32_t given, int64_t) : block(given) {}
  ZORBA_HD void values(Stream stream, uint32_t sample, const PhiloxKeys& keys,
                       float (&z)[kGaussianBlock]) const {
    noise_block<distribution>(block, stream, sample, keys, z);
  }
};

template <>
struct BlockNoise<Distribution::kRank1> {
  Matrix matrix;
  Corner at;
  ZORBA_HD BlockNoise(uint32_t block, int64_t columns)
      : matrix(columns), at(corner_of<3>(block, matrix)) {}
  ZORBA_HD void values(Stream stream, uint32_t sample, const PhiloxKeys& keys,
                       float (&z)[kGaussianBlock]) const {
    rank1_block(matrix, at, stream, sample, keys, z);
  }
};

}  // namespace device
}  // namespace zorba
