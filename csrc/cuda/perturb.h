// y[r, t] += scale[r] * (x[r, t] . v) * u: what one block of threads does to a token, as one code
// for the GPU and for the host (see warp.h).
//
// The threads make the signs of a piece of the token in shared memory, a Philox call each, and then
// take blocks of 8 elements. Neighbouring tokens mostly are of one row of the batch: what fits in a
// piece is made once for them.
#pragma once

#include "values.h"

namespace zorba {
namespace device {

constexpr int kTokenThreads = 128;  // that share a token
constexpr int kTokenWarps = kTokenThreads / kLanes;
constexpr int kPiece = kTokenThreads * kRademacherBlock;  // elements, one call a thread

// --- Threads -------------------------------------------------------------------------------------

// The same for the threads of a block as tables.h has for the lanes of a warp.
template <typename F>
ZORBA_HD void each_thread(const F& f) {
#if defined(__CUDA_ARCH__)
  f(static_cast<int>(threadIdx.x));
#else
  for (int thread = 0; thread < kTokenThreads; ++thread) f(thread);
#endif
}

ZORBA_HD void block_sync() {
#if defined(__CUDA_ARCH__)
  __syncthreads();
#endif
}

template <typename T>
struct PerThread {
#if defined(__CUDA_ARCH__)
  T value;
  ZORBA_HD T& operator[](int) { return value; }
#else
  T values[kTokenThreads];
  T& operator[](int thread) { return values[thread]; }
#endif
};

// The sum over all threads, in every one of them and always in the same order.
ZORBA_HD float sum_of_block(PerThread<float>& part, float* shared) {
#if defined(__CUDA_ARCH__)
  float sum = part[0];
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  __syncthreads();  // the last token's sums have been read
  if (threadIdx.x % kLanes == 0) shared[threadIdx.x / kLanes] = sum;
  __syncthreads();
#else
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int thread = 0; thread < kTokenThreads; ++thread) {
      if (thread % kLanes < step) part[thread] += part[thread + step];
    }
  }
  for (int warp = 0; warp < kTokenWarps; ++warp) shared[warp] = part[kLanes * warp];
#endif
  float total = shared[0];
#pragma unroll
  for (int warp = 1; warp < kTokenWarps; ++warp) total += shared[warp];
  return total;
}

// --- A token -------------------------------------------------------------------------------------

// Shared by the threads.
struct TokenShared {
  alignas(16) uint32_t v[kPiece / 32];
  alignas(16) uint32_t u[kPiece / 32];
  float sums[kTokenWarps];
};

// What the words of u or v hold.
struct HeldSigns {
  int64_t sample = -1;
  int64_t from = 0;
};

// Makes the signs of the rows or columns from `from` on, `count` of them, unless they are there.
ZORBA_HD void make_piece(uint32_t domain, int64_t from, int64_t count, int64_t sample,
                         Stream stream, const PhiloxKeys& keys, HeldSigns& held, uint32_t* words) {
  if (held.sample == sample && held.from == from) return;
  held.sample = sample;
  held.from = from;
  block_sync();  // the last ones have been read
  each_thread([&](int thread) {
    if (static_cast<int64_t>(thread) * kRademacherBlock >= count) return;
    const uint32_t call = static_cast<uint32_t>(from / kRademacherBlock) + thread;
    store_words(words + 4 * thread, philox4x32(domain + call, stream.lo, stream.hi,
                                               static_cast<uint32_t>(sample), keys));
  });
  block_sync();
}

// Calls f(thread, block, count, whole) for the blocks of 8 of `elements` at `at`, with how many of
// the 8 there are, and whether they can be moved 16 bytes at a time.
template <typename F>
ZORBA_HD void each_block(const char* at, int elements, const F& f) {
  const bool aligned = reinterpret_cast<uintptr_t>(at) % 16 == 0;
  each_thread([&](int thread) {
#pragma unroll 1
    for (int block = thread; block * kGaussianBlock < elements; block += kTokenThreads) {
      const int left = elements - block * kGaussianBlock;
      f(thread, block, left, aligned && left >= kGaussianBlock);
    }
  });
}

template <DType dtype>
ZORBA_HD void load_values(const char* at, int left, bool whole, float (&values)[kGaussianBlock]) {
  if (whole) {
    uint32_t words[kWords<dtype>];
    load_block<dtype, false>(at, words);
#pragma unroll
    for (int e = 0; e < kGaussianBlock; ++e) values[e] = element<dtype>(words, e);
  } else {
#pragma unroll
    for (int e = 0; e < kGaussianBlock; ++e) {
      values[e] = e < left ? load_element<dtype>(at + e * kBytes<dtype>) : 0.0f;
    }
  }
}

template <DType dtype>
ZORBA_HD void store_values(char* at, int left, bool whole, const float (&values)[kGaussianBlock]) {
  if (whole) {
    uint32_t words[kWords<dtype>];
#pragma unroll
    for (int e = 0; e < kGaussianBlock; e += 2) {
      if constexpr (dtype == DType::kFloat32) {
        words[e] = as_bits(values[e]);
        words[e + 1] = as_bits(values[e + 1]);
      } else {
        words[e / 2] = pack_nearest<dtype>(values[e], values[e + 1]);
      }
    }
    store_block<dtype, false>(at, words);
  } else {
#pragma unroll
    for (int e = 0; e < kGaussianBlock; ++e) {
      if (e < left) store_element<dtype>(at + e * kBytes<dtype>, round_nearest<dtype>(values[e]));
    }
  }
}

ZORBA_HD float with_sign(float value, uint32_t byte, int e) {
  return as_float(as_bits(value) ^ ((byte << (31 - e)) & 0x80000000u));
}

// x . v of the first `count` elements of a piece, in the part of each thread.
template <DType dtype>
ZORBA_HD void add_dots(const char* x, int count, const uint32_t* v, PerThread<float>& part) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(v);
  each_block(x, count, [&](int thread, int block, int left, bool whole) {
    float values[kGaussianBlock];
    load_values<dtype>(x + block * (kGaussianBlock * kBytes<dtype>), left, whole, values);
    const uint32_t byte = bytes[block];
#pragma unroll
    for (int e = 0; e < kGaussianBlock; ++e) values[e] = with_sign(values[e], byte, e);
    part[thread] += ((values[0] + values[1]) + (values[2] + values[3])) +
                    ((values[4] + values[5]) + (values[6] + values[7]));
  });
}

template <DType dtype>
ZORBA_HD void add_size(char* y, int count, const uint32_t* u, float size) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(u);
  each_block(y, count, [&](int, int block, int left, bool whole) {
    char* at = y + block * (kGaussianBlock * kBytes<dtype>);
    float values[kGaussianBlock];
    load_values<dtype>(at, left, whole, values);
    const uint32_t byte = bytes[block];
#pragma unroll
    for (int e = 0; e < kGaussianBlock; ++e) values[e] += with_sign(size, byte, e);
    store_values<dtype>(at, left, whole, values);
  });
}

// Tokens [begin, end) of all rows, one after the other.
template <DType dtype>
ZORBA_HD void perturb_tokens(const Perturbation& p, const PhiloxKeys& keys, int64_t begin,
                             int64_t end, TokenShared& shared) {
  const Stream stream{static_cast<uint32_t>(p.stream), static_cast<uint32_t>(p.stream >> 32)};
  HeldSigns held_v, held_u;
#pragma unroll 1
  for (int64_t token = begin; token < end; ++token) {
    const int64_t row = token / p.tokens;
    float size = p.scale[row];
    if (size == 0.0f) continue;
    const int64_t sample = p.samples[row];
    const auto in_pieces = [&](int64_t count, auto piece) {
#pragma unroll 1
      for (int64_t from = 0; from < count; from += kPiece) {
        piece(from, static_cast<int>(count - from < kPiece ? count - from : kPiece));
      }
    };
    if (p.x != nullptr) {
      const char* x = p.x + token * p.inputs * kBytes<dtype>;
      PerThread<float> part;
      each_thread([&](int thread) { part[thread] = 0.0f; });
      in_pieces(p.inputs, [&](int64_t from, int count) {
        make_piece(p.transposed ? kRowDomain : kColumnDomain, from, count, sample, stream, keys,
                   held_v, shared.v);
        add_dots<dtype>(x + from * kBytes<dtype>, count, shared.v, part);
      });
      size *= sum_of_block(part, shared.sums);
    }
    char* y = p.y + token * p.outputs * kBytes<dtype>;
    in_pieces(p.outputs, [&](int64_t from, int count) {
      make_piece(p.transposed ? kColumnDomain : kRowDomain, from, count, sample, stream, keys,
                 held_u, shared.u);
      add_size<dtype>(y + from * kBytes<dtype>, count, shared.u, size);
    });
  }
}

}  // namespace device
}  // namespace zorba
