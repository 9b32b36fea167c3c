// The CPU kernels, compiled once for each instruction set (setup.py sets ZORBA_ISA and the flags).
#include "add_noise.h"
#include "perturbed_linear.h"
#include "rank1.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace zorba {
namespace ZORBA_ISA {
namespace {

// Tiles a thread takes at a time: long runs, which the processor's prefetcher likes, but enough
// pieces to keep all threads busy to the end.
int64_t grain(int64_t tiles, int threads) {
  return std::clamp<int64_t>(tiles / (4 * std::max(threads, 1)), 1, 256);
}

// Gradual underflow and round-to-nearest are part of the contract; a caller's thread may have
// switched either off (torch.set_flush_denormal).
class FloatingPointState {
 public:
#if defined(__SSE2__)
  FloatingPointState() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~FloatingPointState() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FloatingPointState() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~FloatingPointState() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

// Pieces of `size` elements, aligned in the whole parameter, that a segment touches.
int64_t first_piece(const Segment& s, int64_t size) { return s.offset / size; }
int64_t piece_count(const Segment& s, int64_t size) {
  return s.numel == 0 ? 0 : (s.offset + s.numel - 1) / size - first_piece(s, size) + 1;
}

using TileFunction = void (*)(const Prepared&, const Segment&, int64_t);

template <bool stochastic>
TileFunction tile_function(int64_t dtype) {
  switch (static_cast<DType>(dtype)) {
    case DType::kBFloat16: return add_tile<DType::kBFloat16, stochastic>;
    case DType::kFloat16: return add_tile<DType::kFloat16, stochastic>;
    default: return add_tile<DType::kFloat32, false>;  // float32 always rounds to nearest
  }
}

template <bool stochastic>
auto unit_function(int64_t dtype) {
  switch (static_cast<DType>(dtype)) {
    case DType::kBFloat16: return add_rank1<DType::kBFloat16, stochastic>;
    case DType::kFloat16: return add_rank1<DType::kFloat16, stochastic>;
    default: return add_rank1<DType::kFloat32, false>;
  }
}

void add_noise(const Segment* segments, int64_t count, const Program& program, int threads) {
  int64_t groups = 1;
  for (int64_t i = 0; i < count; ++i) groups = std::max(groups, segments[i].group + 1);
  const Prepared prepared(program, groups);
  const bool rank1 = static_cast<Distribution>(program.distribution) == Distribution::kRank1;
  const int64_t size = rank1 ? unit_size(program.terms) : kTile;
  std::vector<int64_t> ends(count);  // pieces up to and including each segment
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) ends[i] = total += piece_count(segments[i], size);

  parallel_for(total, grain(total, threads), threads, [&](int64_t begin, int64_t end) {
    const FloatingPointState state;
    // Kept for the thread's life: to fetch fresh memory for each unit takes longer than its work.
    static thread_local RankOne own;
    int64_t at = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (int64_t piece = begin; piece < end; ++piece) {
      while (piece >= ends[at]) ++at;
      const Segment& segment = segments[at];
      const int64_t place = first_piece(segment, size) + piece - (at == 0 ? 0 : ends[at - 1]);
      if (rank1) {
        (program.stochastic ? unit_function<true>(segment.dtype)
                            : unit_function<false>(segment.dtype))(prepared, segment, place, own);
      } else {
        (program.stochastic ? tile_function<true>(segment.dtype)
                            : tile_function<false>(segment.dtype))(prepared, segment, place);
      }
    }
    streamed();
  });
}

void noise(float* out, int64_t numel, int64_t offset, uint64_t seed, uint64_t stream,
           uint32_t sample, int64_t distribution, int64_t columns, int threads) {
  const Segment run{0, 0, numel, offset, 0, 0, 0, columns};
  const PhiloxKeys keys = philox_keys(seed);
  const bool rank1 = static_cast<Distribution>(distribution) == Distribution::kRank1;
  const int64_t size = rank1 ? unit_size(1) : kTile;
  const int64_t pieces = piece_count(run, size);
  parallel_for(pieces, grain(pieces, threads), threads, [&](int64_t begin, int64_t end) {
    const FloatingPointState state;
    alignas(64) float z[1][kTile];
    const int64_t first = first_piece(run, size);
    for (int64_t piece = first + begin; piece < first + end; ++piece) {
      const int64_t lo = std::max(piece * size, offset);
      const int64_t hi = std::min((piece + 1) * size, offset + numel);
      if (rank1) {
        rank1_values(Matrix(columns), Stream(stream), sample, keys, lo, hi, out + (lo - offset));
        continue;
      }
      noise_tile<1>(static_cast<Distribution>(distribution), piece, Stream(stream), sample, keys,
                    z);
      std::memcpy(out + (lo - offset), z[0] + (lo - piece * kTile), (hi - lo) * sizeof(float));
    }
  });
}

void perturb(const Perturbation& p, int threads) {
  const PhiloxKeys keys = philox_keys(p.seed);
  const int64_t tokens = p.rows * p.tokens;
  parallel_for(tokens, std::clamp<int64_t>(tokens / (4 * std::max(threads, 1)), 8, 256), threads,
               [&](int64_t begin, int64_t end) {
                 const FloatingPointState state;
                 switch (static_cast<DType>(p.dtype)) {
                   case DType::kBFloat16:
                     return perturb_tokens<DType::kBFloat16>(p, keys, begin, end);
                   case DType::kFloat16:
                     return perturb_tokens<DType::kFloat16>(p, keys, begin, end);
                   default: return perturb_tokens<DType::kFloat32>(p, keys, begin, end);
                 }
               });
}

// Sum of the lanes [begin, end) of a parameter, and its last lane filled up with zero bytes.
uint64_t lanes_sum(const unsigned char* bytes, int64_t size, uint64_t stream, int64_t begin,
                   int64_t end) {
  uint64_t sum = 0;
  const int64_t whole = std::min(end, size / 8);
  for (int64_t lane = begin; lane < whole; ++lane) {
    uint64_t value;
    std::memcpy(&value, bytes + 8 * lane, 8);
    sum += fingerprint_lane(value, stream, static_cast<uint64_t>(lane));
  }
  if (whole < end) {
    uint64_t value = 0;
    std::memcpy(&value, bytes + 8 * whole, size % 8);
    sum += fingerprint_lane(value, stream, static_cast<uint64_t>(whole));
  }
  return sum;
}

uint64_t fingerprint(const Segment* segments, int64_t count, int threads) {
  std::atomic<uint64_t> total{0};
  for (int64_t i = 0; i < count; ++i) {
    const Segment& s = segments[i];
    const DType dtype = static_cast<DType>(s.dtype);
    const int64_t size = s.numel * (dtype == DType::kFloat32 ? 4 : 2);
    const auto* bytes = reinterpret_cast<const unsigned char*>(s.src);
    const uint64_t stream = static_cast<uint64_t>(s.stream);
    total += fingerprint_header(static_cast<uint64_t>(s.numel), dtype, stream);
    parallel_for((size + 7) / 8, 1 << 16, threads, [&](int64_t begin, int64_t end) {
      total += lanes_sum(bytes, size, stream, begin, end);
    });
  }
  return total;
}

}  // namespace

#define ZORBA_STRING_OF(x) #x
#define ZORBA_STRING(x) ZORBA_STRING_OF(x)
extern const Kernels kKernels{ZORBA_STRING(ZORBA_ISA), add_noise, noise, fingerprint, perturb};

}  // namespace ZORBA_ISA
}  // namespace zorba
