// Python functions of the CUDA part.
#pragma once

#include <pybind11/pybind11.h>

namespace zorba {

void bind_cuda(pybind11::module_& m);

}  // namespace zorba
