// Rank-one noise in the output of a linear layer, for each row of a batch its own. perturb.h has
// the arithmetic. Compiled, counted and proven on the host; not measured on a GPU yet.
#include "launch.h"
#include "perturb.h"

namespace zorba {
namespace cuda {
namespace {

using device::kTokenThreads;
using DType = device::DType;

// A block takes neighbouring tokens: those of one row have the same signs.
template <DType dtype>
__global__ void __launch_bounds__(kTokenThreads)
    perturb_outputs(const __grid_constant__ Perturbation perturbation,
                    const __grid_constant__ device::PhiloxKeys keys) {
  __shared__ device::TokenShared shared;
  const int64_t tokens = perturbation.rows * perturbation.tokens;
  const int64_t each = tokens / gridDim.x;
  const int64_t longer = tokens % gridDim.x;  // blocks that take one more
  const int64_t begin = blockIdx.x * each + (blockIdx.x < longer ? blockIdx.x : longer);
  const int64_t end = begin + each + (blockIdx.x < longer ? 1 : 0);
  device::perturb_tokens<dtype>(perturbation, keys, begin, end, shared);
}

using Kernel = void (*)(Perturbation, device::PhiloxKeys);

Kernel kernel_for(int64_t dtype) {
  switch (static_cast<DType>(dtype)) {
    case DType::kBFloat16: return perturb_outputs<DType::kBFloat16>;
    case DType::kFloat16: return perturb_outputs<DType::kFloat16>;
    case DType::kFloat32: return perturb_outputs<DType::kFloat32>;
  }
  throw std::runtime_error("no such dtype");
}

}  // namespace

void perturb(const Where& where, const Perturbation& perturbation) {
  // A token is a block's work, not a warp's.
  const int64_t work = perturbation.rows * perturbation.tokens * device::kTokenWarps;
  launch(where, "perturb", work, kTokenThreads, kernel_for(perturbation.dtype), perturbation,
         device::philox_keys(perturbation.seed));
}

}  // namespace cuda
}  // namespace zorba
