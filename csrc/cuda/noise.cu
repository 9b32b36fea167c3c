// The values themselves: z(seed, stream, sample, offset + i) as float32.
#include "launch.h"
#include "rank1.h"

namespace zorba {
namespace cuda {
namespace {

using device::Distribution;
using device::kGaussianBlock;
using device::kLanes;

// A lane makes the 8 elements of a block; a piece of work is 32 blocks.
template <Distribution distribution>
__global__ void __launch_bounds__(kThreads)
    noise_values(float* out, int64_t numel, int64_t offset, device::Stream stream, uint32_t sample,
                 const __grid_constant__ device::PhiloxKeys keys, int64_t columns, int64_t pieces) {
  const int64_t first_block = offset / kGaussianBlock;
  for (int64_t piece = first_piece(); piece < pieces; piece += piece_step()) {
    const int64_t block = first_block + piece * kLanes + threadIdx.x % kLanes;
    const int64_t start = block * kGaussianBlock - offset;
    if (start >= numel) continue;
    float z[kGaussianBlock];
    const device::BlockNoise<distribution> noise(static_cast<uint32_t>(block), columns);
    noise.values(stream, sample, keys, z);
    const bool whole = start >= 0 && start + kGaussianBlock <= numel &&
                       reinterpret_cast<uintptr_t>(out + start) % 16 == 0;
    if (whole) {
      __stcs(reinterpret_cast<float4*>(out + start), make_float4(z[0], z[1], z[2], z[3]));
      __stcs(reinterpret_cast<float4*>(out + start + 4), make_float4(z[4], z[5], z[6], z[7]));
      continue;
    }
#pragma unroll
    for (int e = 0; e < kGaussianBlock; ++e) {
      if (start + e >= 0 && start + e < numel) out[start + e] = z[e];
    }
  }
}

using Kernel = void (*)(float*, int64_t, int64_t, device::Stream, uint32_t, device::PhiloxKeys,
                        int64_t, int64_t);

Kernel kernel_for(int64_t distribution) {
  switch (static_cast<Distribution>(distribution)) {
    case Distribution::kGaussian: return noise_values<Distribution::kGaussian>;
    case Distribution::kRademacher: return noise_values<Distribution::kRademacher>;
    case Distribution::kRank1: return noise_values<Distribution::kRank1>;
  }
  throw std::runtime_error("no such distribution");
}

}  // namespace

void noise(const Where& where, uintptr_t out, int64_t numel, int64_t offset, uint64_t seed,
           uint64_t stream, uint32_t sample, int64_t distribution, int64_t columns) {
  if (numel == 0) return;
  const int64_t blocks = (offset + numel - 1) / kGaussianBlock - offset / kGaussianBlock + 1;
  const int64_t pieces = (blocks + kLanes - 1) / kLanes;
  const device::Stream halves{static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)};
  launch(where, "noise", pieces, kThreads, kernel_for(distribution), reinterpret_cast<float*>(out),
         numel, offset, halves, sample, device::philox_keys(seed), columns, pieces);
}

}  // namespace cuda
}  // namespace zorba
