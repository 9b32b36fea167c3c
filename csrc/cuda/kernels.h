// Launchers of the CUDA kernels: device addresses and a stream in, std::runtime_error out. Nothing
// here allocates, copies or waits, so that every call can be captured into a CUDA graph.
#pragma once

#include <cstdint>
#include <string>

#include "../packed.h"

namespace zorba {
namespace cuda {

struct Where {
  int device;
  uintptr_t stream;  // cudaStream_t
};

// Segments and, for each, the number of tiles up to and including it; both in device memory.
struct DeviceTable {
  uintptr_t segments;  // Segment[count]
  uintptr_t ends;      // int64[count]
  int64_t count;
  int64_t tiles;
};

// Why the kernels cannot run on the device; empty if they can.
std::string unavailable(int device);

// Writes the tiles up to and including each of the segments, both in host memory; returns the last.
int64_t tile_ends(const int64_t* segments, int64_t count, int64_t* ends);

// Groups whose coefficients a launch of one term can carry.
int64_t max_groups_of_single();

// One round of one term; the program's arrays are in host memory.
void add_noise_single(const Where& where, const DeviceTable& table, const Program& program);

// Bytes of device memory that add_noise_program() works in.
int64_t workspace_bytes(int64_t terms, int64_t rounds);

// Any program; its arrays are in device memory, and `workspace` is 16-byte aligned.
void add_noise_program(const Where& where, const DeviceTable& table, const Program& program,
                       uintptr_t workspace);

// z at indices offset .. offset + numel, to float[numel]; `columns` as in a segment.
void noise(const Where& where, uintptr_t out, int64_t numel, int64_t offset, uint64_t seed,
           uint64_t stream, uint32_t sample, int64_t distribution, int64_t columns);

// Adds rank-one noise that differs by row of a batch; what is pointed to is in device memory.
void perturb(const Where& where, const Perturbation& perturbation);

// Adds the fingerprint of the table to the uint64 at `result`.
void fingerprint(const Where& where, const DeviceTable& table, uintptr_t result);

}  // namespace cuda
}  // namespace zorba
