// 64-bit hash of the exact bits of a table. Sums of integers: any order gives the same result.
#include "launch.h"

namespace zorba {
namespace cuda {
namespace {

using device::kLanes;
using device::kTile;
using device::Table;
using DType = device::DType;

// 8 bytes at a 2-byte aligned address, or as many as are left, low bytes first.
__device__ __forceinline__ uint64_t load_lane(const uint16_t* at, int64_t halves) {
  uint64_t value = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < halves) value |= static_cast<uint64_t>(at[i]) << (16 * i);
  }
  return value;
}

// A piece of work is kTile elements of a segment, counted from its first one. There are as many
// pieces as tiles, of which the last may be empty: tiles are aligned in the whole parameter.
__global__ void __launch_bounds__(kThreads) fingerprint_sum(const Table table, uint64_t* result) {
  uint64_t sum = 0;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = thread; i < table.count; i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const Segment& s = table.segments[i];
    sum += device::fingerprint_header(static_cast<uint64_t>(s.numel), static_cast<DType>(s.dtype),
                                      static_cast<uint64_t>(s.stream));
  }
  int64_t at = 0;
  for (int64_t piece = first_piece(); piece < table.tiles; piece += piece_step()) {
    at = device::find_segment(table, piece, at);
    const Segment s = table.segments[at];
    const int64_t first = (piece - (at == 0 ? 0 : table.ends[at - 1])) * kTile;
    const int64_t halves_each = static_cast<DType>(s.dtype) == DType::kFloat32 ? 2 : 1;
    const int64_t halves = s.numel * halves_each;
    const int64_t end = (first + kTile < s.numel ? first + kTile : s.numel) * halves_each;
    const auto stream = static_cast<uint64_t>(s.stream);
    const auto* base = reinterpret_cast<const uint16_t*>(s.src);
    const bool aligned = s.src % 16 == 0;
    for (int64_t h = first * halves_each + 8 * (threadIdx.x % kLanes); h < end; h += 8 * kLanes) {
      uint64_t low, high;
      if (aligned && h + 8 <= halves) {
        const ulonglong2 both = __ldcs(reinterpret_cast<const ulonglong2*>(base + h));
        low = both.x;
        high = both.y;
      } else {
        low = load_lane(base + h, halves - h);
        high = load_lane(base + h + 4, halves - h - 4);
      }
      const auto lane = static_cast<uint64_t>(h / 4);
      sum += device::fingerprint_lane(low, stream, lane);
      if (h + 4 < halves) sum += device::fingerprint_lane(high, stream, lane + 1);
    }
  }
  for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
  if (threadIdx.x % kLanes == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(result), static_cast<unsigned long long>(sum));
  }
}

}  // namespace

void fingerprint(const Where& where, const DeviceTable& table, uintptr_t result) {
  // Headers need a launch even where every tensor is empty.
  const int64_t work = std::max(table.tiles, (table.count + kLanes - 1) / kLanes);
  launch(where, "fingerprint", work, kThreads, fingerprint_sum, view(table),
         reinterpret_cast<uint64_t*>(result));
}

}  // namespace cuda
}  // namespace zorba
