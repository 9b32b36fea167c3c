// Weights and activations as floats, and back.
#pragma once

#include "../noise.h"

namespace zorba {
namespace ZORBA_ISA {

template <DType dtype>
inline void load_floats(const char* from, int64_t count, float* to) {
  if constexpr (dtype == DType::kFloat32) {
    std::memcpy(to, from, count * sizeof(float));
  } else {
    const auto* halves = reinterpret_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < count; ++i) {
      to[i] = dtype == DType::kBFloat16 ? load_bfloat16(halves[i]) : load_float16(halves[i]);
    }
  }
}

// Exact: the values are on the grid of the dtype.
template <DType dtype>
inline void store_floats(const float* from, int64_t count, char* to) {
  if constexpr (dtype == DType::kFloat32) {
    std::memcpy(to, from, count * sizeof(float));
  } else {
    auto* halves = reinterpret_cast<uint16_t*>(to);
    for (int64_t i = 0; i < count; ++i) {
      halves[i] = dtype == DType::kBFloat16 ? store_bfloat16(from[i]) : store_float16(from[i]);
    }
  }
}

}  // namespace ZORBA_ISA
}  // namespace zorba
