// y[r, t] += scale[r] * (x[r, t] . v) * u: rank-one noise in the output of a linear layer, where
// each row r of a batch has signs u and v of its own. Without x: y[r, t] += scale[r] * u.
#pragma once

#include "floats.h"
#include "rank1.h"

namespace zorba {
namespace ZORBA_ISA {

// Signs of one sample as +-1; neighbouring rows of a batch mostly share theirs.
struct RowSigns {
  int64_t sample = -1;
  std::vector<float> u, v;
};

inline void expand_signs(uint32_t domain, int64_t count, Stream stream, uint32_t sample,
                         const PhiloxKeys& keys, std::vector<float>& out) {
  if (count == 0) return;
  SignBits bits;
  bits.make(domain, 0, count, stream, sample, keys);
  out.resize(static_cast<size_t>((count + kWide - 1) / kWide * kWide));
  for (int64_t at = 0; at < count; at += kWide) write_signs(bits, at, kWide, 1.0f, &out[at]);
}

// In kDots sums, so that the adds overlap; the order is fixed by the instruction set.
inline float dot(const float* a, const float* b, int64_t count) {
  constexpr int kDots = 4;
  WideFloats sums[kDots] = {};
  int64_t i = 0;
  for (; i + kDots * kWide <= count; i += kDots * kWide) {
#pragma GCC unroll 4
    for (int j = 0; j < kDots; ++j) {
      sums[j] = add_exact(load_wide(a + i + j * kWide), load_wide(b + i + j * kWide), sums[j]);
    }
  }
  const WideFloats all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float total = 0.0f;
  for (int j = 0; j < kWide; ++j) total += all[j];
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

// Tokens [begin, end) of all rows.
template <DType dtype>
inline void perturb_tokens(const Perturbation& p, const PhiloxKeys& keys, int64_t begin,
                           int64_t end) {
  constexpr int64_t kSize = dtype == DType::kFloat32 ? 4 : 2;
  constexpr int kPiece = 1024;  // of a token that is widened at a time
  const Stream stream(p.stream);
  RowSigns signs;
  float wide[kPiece];
  for (int64_t token = begin; token < end; ++token) {
    const int64_t row = token / p.tokens;
    float size = p.scale[row];
    if (size == 0.0f) continue;
    if (signs.sample != p.samples[row]) {
      signs.sample = p.samples[row];
      const auto sample = static_cast<uint32_t>(signs.sample);
      expand_signs(p.transposed ? kColumnDomain : kRowDomain, p.outputs, stream, sample, keys,
                   signs.u);
      if (p.x != nullptr) {
        expand_signs(p.transposed ? kRowDomain : kColumnDomain, p.inputs, stream, sample, keys,
                     signs.v);
      }
    }
    if (p.x != nullptr) {
      const char* x = p.x + token * p.inputs * kSize;
      float total = 0.0f;
      if constexpr (dtype == DType::kFloat32) {
        total = dot(reinterpret_cast<const float*>(x), signs.v.data(), p.inputs);
      } else {
        for (int64_t at = 0; at < p.inputs; at += kPiece) {
          const int64_t count = std::min<int64_t>(kPiece, p.inputs - at);
          load_floats<dtype>(x + at * kSize, count, wide);
          total += dot(wide, &signs.v[at], count);
        }
      }
      size *= total;
    }
    char* y = p.y + token * p.outputs * kSize;
    if constexpr (dtype == DType::kFloat32) {
      auto* out = reinterpret_cast<float*>(y);
      const float* u = signs.u.data();
#pragma GCC ivdep
      for (int64_t i = 0; i < p.outputs; ++i) out[i] += size * u[i];
    } else {
      for (int64_t at = 0; at < p.outputs; at += kPiece) {
        const int64_t count = std::min<int64_t>(kPiece, p.outputs - at);
        load_floats<dtype>(y + at * kSize, count, wide);
        const float* u = &signs.u[at];
        for (int64_t i = 0; i < count; ++i) wide[i] = round_nearest<dtype>(wide[i] + size * u[i]);
        store_floats<dtype>(wide, count, y + at * kSize);
      }
    }
  }
}

}  // namespace ZORBA_ISA
}  // namespace zorba
