// What every launch needs: checked calls, the right device, a grid that fills it once.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "kernels.h"
#include "warp.h"

namespace zorba {
namespace cuda {

constexpr int kThreads = 256;

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error of ours must not surface in the caller's next check
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

// Makes a device current and the previous one current again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "current device");
    changed_ = device != previous_;
    if (changed_) check(cudaSetDevice(device), "select device");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Blocks that the device holds at a time; asked once for each kernel and device.
inline int resident_blocks(const void* kernel, int threads, int device) {
  static std::mutex mutex;
  static std::unordered_map<const void*, std::unordered_map<int, int>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& blocks = known[kernel][device];
  if (blocks == 0) {
    int processors = 0;
    int each = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
          "number of processors");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, 0), "occupancy");
    if (each == 0) throw std::runtime_error("CUDA: a kernel does not fit on this device");
    blocks = processors * each;
  }
  return blocks;
}

// Starts a persistent kernel whose warps share `work` pieces, `threads` a block.
template <typename... Parameters, typename... Arguments>
void launch(const Where& where, const char* what, int64_t work, int threads,
            void (*kernel)(Parameters...), const Arguments&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument a parameter");
  if (work == 0) return;
  const DeviceGuard guard(where.device);
  const auto* function = reinterpret_cast<const void*>(kernel);
  const int warps = threads / device::kLanes;
  const int64_t wanted = (work + warps - 1) / warps;
  const auto blocks = static_cast<unsigned>(
      std::min<int64_t>(wanted, resident_blocks(function, threads, where.device)));
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  check(cudaLaunchKernel(function, dim3(blocks), dim3(static_cast<unsigned>(threads)), addresses, 0,
                         reinterpret_cast<cudaStream_t>(where.stream)),
        what);
}

inline device::Table view(const DeviceTable& table) {
  return {reinterpret_cast<const Segment*>(table.segments),
          reinterpret_cast<const int64_t*>(table.ends), table.count, table.tiles};
}

// A warp's first piece of work, and the step to its next one.
__device__ __forceinline__ int64_t first_piece() {
  return static_cast<int64_t>(blockIdx.x) * (blockDim.x / device::kLanes) +
         threadIdx.x / device::kLanes;
}
__device__ __forceinline__ int64_t piece_step() {
  return static_cast<int64_t>(gridDim.x) * (blockDim.x / device::kLanes);
}

}  // namespace cuda
}  // namespace zorba
