// w <- round(w - decay * w + sum_k coef[group, k] * z(seed_k, stream, sample_k, .)): one persistent
// launch for a whole table. warp.h has the arithmetic. Compiled, counted (benchmarks/sass) and
// proven on the host (tests/kernels/test_cuda_host.py); not measured on a GPU yet.
#include <cstring>

#include "launch.h"

namespace zorba {
namespace cuda {
namespace {

using device::Distribution;
using device::Many;
using device::Round;
using device::Single;
using device::Table;
using device::Term;
using DType = device::DType;

// Without spills one term fits 128 registers, and a program 170; but ptxas takes more for programs
// with signs on sm_100.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kSignBlocks = 2;
#else
constexpr int kSignBlocks = 3;
#endif
template <typename Program>
constexpr int kBlockThreads = Program::kSingle ? 256 : 128;
template <Distribution distribution, typename Program>
constexpr int kBlocksResident = Program::kSingle                          ? 2
                                : distribution == Distribution::kGaussian ? 3
                                                                          : kSignBlocks;

template <Distribution distribution, bool stochastic, typename Program>
__global__ void __launch_bounds__(kBlockThreads<Program>, kBlocksResident<distribution, Program>)
    add_noise(const Table table, const __grid_constant__ Program program) {
  // Signs that a warp shares; a Gaussian kernel has none.
  constexpr bool kShares = distribution != Distribution::kGaussian;
  constexpr int kSignWords = Program::template kSignWords<distribution>;
  constexpr int kWarps = kBlockThreads<Program> / device::kLanes;
  __shared__ uint4 shared[kShares ? kWarps * kSignWords / 4 : 1];
  auto* signs = reinterpret_cast<uint32_t*>(shared) +
                (kShares ? threadIdx.x / device::kLanes * kSignWords : 0);
  int64_t at = 0;
  for (int64_t piece = first_piece(); piece < table.tiles; piece += piece_step()) {
    at = device::find_segment(table, piece, at);
    const Segment& segment = table.segments[at];
    const int64_t before = at == 0 ? 0 : table.ends[at - 1];
    const int64_t tile = device::first_tile(segment) + piece - before;
    switch (static_cast<DType>(segment.dtype)) {
      case DType::kBFloat16:
        device::add_to_tile<DType::kBFloat16, distribution, stochastic>(program, segment, tile,
                                                                        signs);
        break;
      case DType::kFloat16:
        device::add_to_tile<DType::kFloat16, distribution, stochastic>(program, segment, tile,
                                                                       signs);
        break;
      default:  // float32 always rounds to nearest
        device::add_to_tile<DType::kFloat32, distribution, false>(program, segment, tile, signs);
    }
  }
}

// Round keys of every seed, once a launch: seeds may only be known on the device.
__global__ void prepare(const zorba::Program program, Term* term, Round* round) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t k = first; k < program.terms; k += step) {
    term[k].keys = device::philox_keys(program.seeds[k]);
    term[k].sample = static_cast<uint32_t>(program.samples[k]);
  }
  for (int64_t r = first; r < program.rounds; r += step) {
    round[r].keys = device::philox_keys(program.rounding_seeds[r]);
    round[r].begin = r == 0 ? 0 : static_cast<int32_t>(program.round_ends[r - 1]);
    round[r].end = static_cast<int32_t>(program.round_ends[r]);
  }
}

template <typename Form>
using Kernel = void (*)(Table, Form);

template <Distribution distribution, typename Form>
Kernel<Form> rounded(bool stochastic) {
  return stochastic ? add_noise<distribution, true, Form> : add_noise<distribution, false, Form>;
}

template <typename Form>
Kernel<Form> kernel_for(const zorba::Program& program) {
  switch (static_cast<Distribution>(program.distribution)) {
    case Distribution::kGaussian: return rounded<Distribution::kGaussian, Form>(program.stochastic);
    case Distribution::kRademacher:
      return rounded<Distribution::kRademacher, Form>(program.stochastic);
    case Distribution::kRank1: return rounded<Distribution::kRank1, Form>(program.stochastic);
  }
  throw std::runtime_error("no such distribution");
}

// Starts the kernel of a program that is in the form of `Single` or `Many`.
template <typename Form>
void run(const Where& where, const DeviceTable& table, const zorba::Program& program,
         const Form& form) {
  launch(where, "add_noise", table.tiles, kBlockThreads<Form>, kernel_for<Form>(program),
         view(table), form);
}

}  // namespace

std::string unavailable(int device) {
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return std::string("there is no usable CUDA device: ") + cudaGetErrorString(status);
  }
  if (device < 0 || device >= count) {
    return "there is no CUDA device " + std::to_string(device) + ", only " + std::to_string(count);
  }
  try {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, add_noise<Distribution::kGaussian, false, Single>),
          "the kernels were not compiled for this device (see ZORBA_CUDA_ARCHS)");
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

int64_t tile_ends(const int64_t* segments, int64_t count, int64_t* ends) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    Segment segment;
    std::memcpy(&segment, segments + 8 * i, sizeof segment);
    ends[i] = total += device::tile_count(segment);
  }
  return total;
}

int64_t max_groups_of_single() { return device::kInlineGroups; }

void add_noise_single(const Where& where, const DeviceTable& table, const Program& program) {
  if (program.groups > device::kInlineGroups) {
    throw std::runtime_error("too many groups for one launch");
  }
  Single single;
  single.term_keys = device::philox_keys(program.seeds[0]);
  single.rounding_keys = device::philox_keys(program.rounding_seeds[0]);
  single.term_sample = static_cast<uint32_t>(program.samples[0]);
  for (int64_t g = 0; g < program.groups; ++g) {
    single.steps[g] = {program.coefs[g], program.decays[g]};
  }
  run(where, table, program, single);
}

int64_t workspace_bytes(int64_t terms, int64_t rounds) {
  return terms * static_cast<int64_t>(sizeof(Term)) + rounds * static_cast<int64_t>(sizeof(Round));
}

void add_noise_program(const Where& where, const DeviceTable& table, const Program& program,
                       uintptr_t workspace) {
  const int64_t most = std::max(program.terms, program.rounds);
  if (most > INT32_MAX) throw std::runtime_error("too many terms or rounds for one launch");
  if (table.tiles == 0) return;
  auto* term = reinterpret_cast<Term*>(workspace);
  auto* round = reinterpret_cast<Round*>(term + program.terms);
  launch(where, "prepare", (most + device::kLanes - 1) / device::kLanes, kThreads, prepare, program,
         term, round);
  const Many many{term,
                  round,
                  program.coefs,
                  program.decays,
                  static_cast<int32_t>(program.terms),
                  static_cast<int32_t>(program.rounds)};
  run(where, table, program, many);
}

}  // namespace cuda
}  // namespace zorba
