"""The compiled CPU backend: C++ threads, AVX-512, AVX2 or baseline code chosen at run time."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from zorba_kernels.build import extension
from zorba_kernels.dispatch import Backend
from zorba_kernels.noise import DISTRIBUTION_CODES, Distribution
from zorba_kernels.program import Program
from zorba_kernels.table import ParamTable


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
    segments = table.packed(out)
    extension()[0].cpu_add_noise(
        program.once("isa", isa),
        torch.get_num_threads(),
        segments.data_ptr(),
        segments.shape[0],
        program.packed(table.num_groups).address,
    )


def noise(
    numel: int,
    offset: int,
    seed: int,
    stream: int,
    sample: int,
    distribution: Distribution,
    device: torch.device,
) -> Tensor:
    """See ``dispatch.NoiseFunction``."""
    # Written whole by the kernel: no need to clear it.
    z = torch.empty(numel, dtype=torch.float32, device=device)
    extension()[0].cpu_noise(
        isa(),
        torch.get_num_threads(),
        z.data_ptr(),
        numel,
        offset,
        seed,
        stream,
        sample,
        DISTRIBUTION_CODES[distribution],
    )
    return z


def fingerprint(table: ParamTable) -> int:
    """See ``dispatch.Backend``."""
    segments = table.packed(table)
    return int(
        extension()[0].cpu_fingerprint(
            isa(), torch.get_num_threads(), segments.data_ptr(), len(segments)
        )
    )


BACKEND = Backend("cpu", ("cpu",), unavailable, run, noise, fingerprint)
