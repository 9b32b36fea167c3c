"""The compiled CPU backend: C++ threads, AVX-512, AVX2 or baseline code chosen at run time."""

from __future__ import annotations

import os
from weakref import WeakKeyDictionary

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
    packed = _packed.get(program)
    if packed is None:
        packed = _packed[program] = _PackedProgram(program)
    segments = table.packed(out)
    extension()[0].cpu_add_noise(
        packed.isa,
        torch.get_num_threads(),
        segments.data_ptr(),
        segments.shape[0],
        *packed.arguments,
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


class _PackedProgram:
    """A program in memory as the compiled code reads it: made once, for any number of passes."""

    def __init__(self, program: Program) -> None:
        self.isa = isa()
        self._memory = (  # lives as long as its addresses are in use
            _uint64(program.seeds),
            torch.tensor(program.samples, dtype=torch.int32),
            program.coefs,
            program.decays,
            torch.tensor(program.round_ends, dtype=torch.int64),
            _uint64(program.rounding_seeds),
        )
        seeds, samples, coefs, decays, round_ends, rounding_seeds = (
            tensor.data_ptr() for tensor in self._memory
        )
        self.arguments = (
            *(seeds, samples, coefs, decays, len(program.seeds)),
            *(round_ends, rounding_seeds, len(program.round_ends)),
            program.distribution == "gaussian",
            program.rounding == "stochastic",
        )


_packed: WeakKeyDictionary[Program, _PackedProgram] = WeakKeyDictionary()


def _uint64(values: tuple[int, ...]) -> Tensor:
    return torch.tensor([as_int64(v) for v in values], dtype=torch.int64)
