"""The compiled CPU backend: C++ threads, AVX-512, AVX2 or baseline code chosen at run time."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from zorba_kernels.build import extension
from zorba_kernels.dispatch import Backend, NoiseKey, RowNoise
from zorba_kernels.noise import DISTRIBUTION_CODES
from zorba_kernels.program import Program
from zorba_kernels.table import DTYPE_CODES, ParamTable


def unavailable(device: torch.device) -> str | None:
    """Returns why this backend cannot serve tensors on the device, or None."""
    if device.type != "cpu":
        return f"it serves CPU tensors, not {device.type}"
    compiled, reason = extension()
    if compiled is None:
        return reason
    # Forced instruction sets are for tests and measurements: an unknown one is no wish for less.
    if not compiled.cpu_runs(isa()):
        return (
            f"ZORBA_CPU_ISA={isa()!r} is unknown, was not built, or this processor lacks it; "
            "expected avx512, avx2 or baseline"
        )
    return None


def isa() -> str:
    """Instruction set that ``ZORBA_CPU_ISA`` forces; empty for the best there is."""
    return os.environ.get("ZORBA_CPU_ISA", "")


def run(table: ParamTable, out: ParamTable, program: Program) -> None:
    """See ``dispatch.Backend``."""
    # The instruction set is kept with the program: no look at the environment in each run.
    forced = program.once("isa", isa)
    rows, packed = table.packed(out), program.packed(table.num_groups)
    given = (rows.data_ptr(), len(rows), packed.address)
    extension()[0].cpu_add_noise(forced, torch.get_num_threads(), *given)


def noise(numel: int, offset: int, key: NoiseKey, device: torch.device) -> Tensor:
    """See ``dispatch.Backend``."""
    # Written whole by the kernel: no need to clear it.
    z = torch.empty(numel, dtype=torch.float32, device=device)
    *words, distribution, columns = key
    given = (z.data_ptr(), numel, offset, *words, DISTRIBUTION_CODES[distribution], columns)
    extension()[0].cpu_noise(isa(), torch.get_num_threads(), *given)
    return z


def fingerprint(table: ParamTable) -> int:
    """See ``dispatch.Backend``."""
    rows = table.packed(table)
    given = (isa(), torch.get_num_threads(), rows.data_ptr(), len(rows))
    return int(extension()[0].cpu_fingerprint(*given))


def perturb(x: Tensor | None, y: Tensor, noise: RowNoise) -> None:
    """See ``dispatch.Backend``."""
    rows, tokens, outputs = y.shape
    address, inputs = (0, 0) if x is None else (x.data_ptr(), x.shape[2])
    places = (address, y.data_ptr(), noise.samples.data_ptr(), noise.scale.data_ptr())
    sizes = (rows, tokens, inputs, outputs, DTYPE_CODES[y.dtype])
    key = (noise.seed, noise.stream, noise.transposed)
    extension()[0].cpu_perturb(isa(), torch.get_num_threads(), *places, *sizes, *key)


BACKEND = Backend("cpu", ("cpu",), unavailable, run, noise, fingerprint, perturb)
