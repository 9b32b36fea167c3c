"""Seeded noise added to weights in one fused pass: the kernels of zeroth-order fine-tuning.

Stateless operations on tensors. Works with torch alone.
"""

import sys

from zorba_kernels import backends as _backends  # noqa: F401  # registers them
from zorba_kernels.build import build_info
from zorba_kernels.dispatch import BackendStatus, BackendUnavailableError, backends
from zorba_kernels.noise import NOISE_VERSION
from zorba_kernels.ops import add_noise, add_noise_, fingerprint, noise
from zorba_kernels.perturbed_linear import perturb_, perturbed_linear, perturbed_vector
from zorba_kernels.program import Program
from zorba_kernels.table import ParamTable

__all__ = [
    "NOISE_VERSION",
    "BackendStatus",
    "BackendUnavailableError",
    "ParamTable",
    "Program",
    "add_noise",
    "add_noise_",
    "backends",
    "build_info",
    "fingerprint",
    "noise",
    "perturb_",
    "perturbed_linear",
    "perturbed_vector",
]

# The op `noise` hides the module of that name from attribute access: what the module offers stays
# reachable, as zorba_kernels.noise.philox4x32.
_module = sys.modules["zorba_kernels.noise"]
for _name in _module.__all__:
    setattr(noise, _name, getattr(_module, _name))
