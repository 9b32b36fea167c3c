// Python binding: raw addresses and sizes in, no torch headers. The callers in
// zorba_kernels/backends check every argument; here only what would corrupt memory is checked
// again.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "noise.h"

#if defined(ZORBA_WITH_CUDA)
#include "cuda/binding.h"
#endif

namespace py = pybind11;

namespace {

const zorba::Kernels& kernels_for(const std::string& isa) {
  const zorba::Kernels* kernels = zorba::find_kernels(isa.c_str());
  if (kernels == nullptr) {
    throw std::invalid_argument("instruction set '" + isa +
                                "' is not available: it is unknown, was not built, or this "
                                "processor lacks it");
  }
  return *kernels;
}

bool runs(const std::string& isa) { return zorba::find_kernels(isa.c_str()) != nullptr; }

template <typename T>
const T* at(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of zorba_kernels.";
  m.attr("noise_version") = zorba::ZORBA_ISA::kNoiseVersion;
  m.attr("program_fields") = sizeof(zorba::Program) / sizeof(int64_t);
  m.attr("compiler") = __VERSION__;
#if defined(ZORBA_WITH_CUDA)
  m.attr("cuda") = true;
  zorba::bind_cuda(m);
#else
  m.attr("cuda") = false;
#endif

  m.def("cpu_isa", [](const std::string& isa) { return std::string(kernels_for(isa).isa); });
  m.def("cpu_runs", &runs);

  m.def("cpu_add_noise", [](const std::string& isa, int threads, uintptr_t segments, int64_t count,
                            uintptr_t program) {
    const zorba::Kernels& kernels = kernels_for(isa);
    py::gil_scoped_release release;
    kernels.add_noise(at<zorba::Segment>(segments), count, *at<zorba::Program>(program), threads);
  });

  m.def("cpu_noise",
        [](const std::string& isa, int threads, uintptr_t out, int64_t numel, int64_t offset,
           uint64_t seed, uint64_t stream, uint32_t sample, int64_t distribution, int64_t columns) {
          const zorba::Kernels& kernels = kernels_for(isa);
          py::gil_scoped_release release;
          kernels.noise(reinterpret_cast<float*>(out), numel, offset, seed, stream, sample,
                        distribution, columns, threads);
        });

  m.def("cpu_perturb",
        [](const std::string& isa, int threads, uintptr_t x, uintptr_t y, uintptr_t samples,
           uintptr_t scale, int64_t rows, int64_t tokens, int64_t inputs, int64_t outputs,
           int64_t dtype, uint64_t seed, uint64_t stream, bool transposed) {
          const zorba::Kernels& kernels = kernels_for(isa);
          py::gil_scoped_release release;
          kernels.perturb(
              {at<char>(x), reinterpret_cast<char*>(y), at<int64_t>(samples), at<float>(scale),
               rows, tokens, inputs, outputs, dtype, seed, stream, transposed},
              threads);
        });

  m.def("cpu_fingerprint",
        [](const std::string& isa, int threads, uintptr_t segments, int64_t count) {
          const zorba::Kernels& kernels = kernels_for(isa);
          py::gil_scoped_release release;
          return kernels.fingerprint(at<zorba::Segment>(segments), count, threads);
        });
}
