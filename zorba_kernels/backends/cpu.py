"""The compiled CPU backend: C++ threads, AVX-512, AVX2 or baseline code chosen at run time."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from zorba_kernels.build import extension
from zorba_kernels.noise import Distribution, as_int64
from zorba_kernels.program import Program
from zorba_kernels.table import ParamTable


def unavailable(device: torch.device) -> str | None:
    """Returns why this backend cannot serve tensors on the device, or None."""
    if device.type != "cpu":
        return f"it serves CPU tensors, not {device.type}"
    compiled, reason = extension()
    if compiled is None:
        return reason
    if not compiled.cpu_runs(isa()):
        return (
            f"ZORBA_CPU_ISA={isa()!r} is unknown, was not built, or this processor lacks it; "
            "expected avx512, avx2 or baseline"
        )
    return None


def isa() -> str:
    """Instruction set that ``ZORBA_CPU_ISA`` forces; empty for the best there is."""
    return os.environ.get("ZORBA_CPU_ISA", "")


def add_noise(table: ParamTable, out: ParamTable, program: Program) -> None:
    """``out <- round(table + sum of noises)``, see ``zorba_kernels.add_noise_``."""
    segments = table.packed(out)
    seeds = _uint64(program.seeds)
    rounding_seeds = _uint64(program.rounding_seeds)
    samples = torch.tensor(program.samples, dtype=torch.int64).to(torch.int32)
    round_ends = torch.tensor(program.round_ends, dtype=torch.int64)
    extension()[0].cpu_add_noise(
        isa(),
        torch.get_num_threads(),
        segments.data_ptr(),
        len(segments),
        seeds.data_ptr(),
        samples.data_ptr(),
        program.coefs.data_ptr(),
        program.decays.data_ptr(),
        program.coefs.shape[1],
        round_ends.data_ptr(),
        rounding_seeds.data_ptr(),
        len(program.round_ends),
        program.distribution == "gaussian",
        program.rounding == "stochastic",
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
    """Returns z at indices ``offset .. offset + numel``: float32 [numel]."""
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
        distribution == "gaussian",
    )
    return z


def fingerprint(table: ParamTable) -> int:
    """Returns the 64-bit fingerprint of the table's tensors."""
    segments = table.packed(table)
    return int(
        extension()[0].cpu_fingerprint(
            isa(), torch.get_num_threads(), segments.data_ptr(), len(segments)
        )
    )


def _uint64(values: tuple[int, ...]) -> Tensor:
    return torch.tensor([as_int64(v) for v in values], dtype=torch.int64)
