// What Python packs and passes by address: the rows of a table, and a program. Fields of 8 bytes,
// in the order of zorba_kernels/table.py and zorba_kernels/program.py.
#pragma once

#include <cstdint>
#include <type_traits>

namespace zorba {

// One contiguous run of a parameter.
struct Segment {
  int64_t src;      // address of the first element read
  int64_t dst;      // address of the first element written; src for an in-place pass
  int64_t numel;    // elements
  int64_t offset;   // row-major index of the first element in the whole parameter
  int64_t stream;   // bits of the uint64 stream
  int64_t dtype;    // noise.h DType
  int64_t group;    // row of coefs
  int64_t columns;  // elements of a row of the whole parameter; 0: it has one dimension
};

// What a pass adds: rounds of noise terms, each with a share of the weight itself taken off. The
// struct is in host memory; its arrays are where the kernels run.
struct Program {
  const uint64_t* seeds;           // [terms]
  const int64_t* samples;          // [terms], below 2^31
  const int64_t* round_ends;       // [rounds], index one past each round's last term
  const uint64_t* rounding_seeds;  // [rounds]
  const float* coefs;              // [groups, terms]
  const float* decays;             // [groups, rounds]
  int64_t terms;
  int64_t rounds;
  int64_t groups;
  int64_t distribution;  // noise.h Distribution
  int64_t stochastic;    // else to nearest even
};

// Rank-one noise that differs by row of a batch: y[r, t] += scale[r] * (x[r, t] . v) * u. What it
// points to is where the kernels run.
struct Perturbation {
  const char* x;           // [rows, tokens, inputs], or null: y[r, t] += scale[r] * u
  char* y;                 // [rows, tokens, outputs], of the same dtype
  const int64_t* samples;  // [rows], below 2^31
  const float* scale;      // [rows]
  int64_t rows, tokens, inputs, outputs;
  int64_t dtype;  // noise.h DType
  uint64_t seed, stream;
  int64_t transposed;  // x meets the signs of rows, and y those of columns
};

// Python writes int64: another size or layout would make addresses of counts.
static_assert(sizeof(Segment) == 8 * sizeof(int64_t), "Python packs eight int64 a row");
static_assert(sizeof(Program) == 11 * sizeof(int64_t), "Python packs eleven int64 a program");
static_assert(std::is_standard_layout<Program>::value, "fields in the order they are declared");

}  // namespace zorba
