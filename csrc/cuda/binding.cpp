// Python functions of the CUDA part: addresses, sizes, a device and a stream in. The callers in
// zorba_kernels/backends/cuda.py check every argument. A CUDA error becomes a RuntimeError.
#include "binding.h"

#include "kernels.h"

namespace py = pybind11;

namespace zorba {
namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.attr("cuda_max_groups_of_single") = cuda::max_groups_of_single();

  m.def("cuda_unavailable", &cuda::unavailable, py::call_guard<py::gil_scoped_release>());

  m.def("cuda_tile_ends", [](uintptr_t segments, int64_t count, uintptr_t ends) {
    return cuda::tile_ends(at<const int64_t>(segments), count, at<int64_t>(ends));
  });

  m.def("cuda_workspace_bytes", &cuda::workspace_bytes);

  m.def("cuda_add_noise_single",
        [](int device, uintptr_t stream, uintptr_t segments, uintptr_t ends, int64_t count,
           int64_t tiles, uintptr_t program) {
          py::gil_scoped_release release;
          cuda::add_noise_single({device, stream}, {segments, ends, count, tiles},
                                 *at<const Program>(program));
        });

  m.def("cuda_add_noise_program",
        [](int device, uintptr_t stream, uintptr_t segments, uintptr_t ends, int64_t count,
           int64_t tiles, uintptr_t program, uintptr_t workspace) {
          py::gil_scoped_release release;
          cuda::add_noise_program({device, stream}, {segments, ends, count, tiles},
                                  *at<const Program>(program), workspace);
        });

  m.def("cuda_noise",
        [](int device, uintptr_t cuda_stream, uintptr_t out, int64_t numel, int64_t offset,
           uint64_t seed, uint64_t stream, uint32_t sample, int64_t distribution, int64_t columns) {
          py::gil_scoped_release release;
          cuda::noise({device, cuda_stream}, out, numel, offset, seed, stream, sample, distribution,
                      columns);
        });

  m.def("cuda_perturb",
        [](int device, uintptr_t cuda_stream, uintptr_t x, uintptr_t y, uintptr_t samples,
           uintptr_t scale, int64_t rows, int64_t tokens, int64_t inputs, int64_t outputs,
           int64_t dtype, uint64_t seed, uint64_t stream, bool transposed) {
          py::gil_scoped_release release;
          cuda::perturb(
              {device, cuda_stream},
              {at<const char>(x), at<char>(y), at<const int64_t>(samples), at<const float>(scale),
               rows, tokens, inputs, outputs, dtype, seed, stream, transposed});
        });

  m.def("cuda_fingerprint", [](int device, uintptr_t stream, uintptr_t segments, uintptr_t ends,
                               int64_t count, int64_t tiles, uintptr_t result) {
    py::gil_scoped_release release;
    cuda::fingerprint({device, stream}, {segments, ends, count, tiles}, result);
  });
}

}  // namespace zorba
