"""The compiled CUDA backend: one launch for all tensors of a table, on torch's current stream."""

from __future__ import annotations

import torch
from torch import Tensor

from zorba_kernels.backends.device_table import DeviceTable, HeldProgram, OncePerPair
from zorba_kernels.build import extension
from zorba_kernels.noise import Distribution
from zorba_kernels.program import Program
from zorba_kernels.table import ParamTable

_usable: set[int] = set()  # devices that unavailable() has found fit


def unavailable(device: torch.device) -> str | None:
    """Returns why this backend cannot serve tensors on the device, or None."""
    if device.type != "cuda":
        return f"it serves CUDA tensors, not {device.type}"
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm, and the compiled part for CUDA"
    compiled, reason = extension()
    if compiled is None:
        return reason
    if not compiled.cuda:
        return (
            "the compiled part was built without CUDA; install the package again with nvcc on the "
            "PATH (ZORBA_CUDA=1 makes a missing one an error)"
        )
    if not torch.cuda.is_available():
        return compiled.cuda_unavailable(0) or "torch finds no usable CUDA device"
    index = _index(device)
    if index not in _usable:
        why: str = compiled.cuda_unavailable(index)
        if why:
            return why
        _usable.add(index)
    return None


def add_noise(table: ParamTable, out: ParamTable, program: Program) -> None:
    """``out <- round(table + sum of noises)``, see ``zorba_kernels.add_noise_``."""
    single = len(program.seeds) == 1 and len(program.round_ends) == 1
    groups = len(program.coefs)
    if not single or groups > extension()[0].cuda_max_groups_of_single:
        DeviceProgram(program, table.device).run(table, out)
        return
    # Everything but the table travels with the launch: no copy, no allocation.
    extension()[0].cuda_add_noise_single(
        *_target(table, out),
        program.seeds[0],
        program.samples[0],
        program.coefs.data_ptr(),
        program.decays.data_ptr(),
        groups,
        program.rounding_seeds[0],
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
    extension()[0].cuda_noise(
        _index(device),
        _stream(device),
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
    """Returns the 64-bit fingerprint of the table's tensors; waits for it."""
    result = torch.zeros(1, dtype=torch.int64, device=table.device)
    extension()[0].cuda_fingerprint(*_target(table, table), result.data_ptr())
    return int(result.item()) % (1 << 64)


class DeviceProgram(HeldProgram):
    """A program whose seeds and coefficients live in device memory.

    ``run`` neither allocates nor waits, so it can be captured into a CUDA graph once its tables
    have been used; a replay then reads what the tensors hold at that time. The tensors may be
    written, not resized.
    """

    def __init__(self, program: Program, device: torch.device) -> None:
        """Copies the program to the device, in one transfer that the host does not wait for."""
        super().__init__(program, device)
        terms, rounds = len(program.seeds), len(program.round_ends)
        size = extension()[0].cuda_workspace_bytes(terms, rounds)
        self._workspace = torch.empty(size, dtype=torch.uint8, device=device)

    def run(self, table: ParamTable, out: ParamTable) -> None:
        """``out <- round(table + sum of noises)``, on the current stream of the table's device."""
        extension()[0].cuda_add_noise_program(
            *_target(table, out),
            self.seeds.data_ptr(),
            self.samples.data_ptr(),
            self.coefs.data_ptr(),
            self.decays.data_ptr(),
            self.round_ends.data_ptr(),
            self.rounding_seeds.data_ptr(),
            len(self.seeds),
            len(self.round_ends),
            self._workspace.data_ptr(),
            self.distribution == "gaussian",
            self.rounding == "stochastic",
        )


_tables: OncePerPair[DeviceTable] = OncePerPair()


def _target(table: ParamTable, out: ParamTable) -> tuple[int, ...]:
    """The leading arguments of the functions of ``_C``: where to run, and the table."""
    for each in (table, out):
        if each.device.type != "cuda":
            raise ValueError(
                f"the cuda backend serves CUDA tensors; this table is on {each.device}"
            )

    def make() -> DeviceTable:
        packed = table.packed(out)
        ends = torch.empty(len(packed), dtype=torch.int64)
        tiles = extension()[0].cuda_tile_ends(packed.data_ptr(), len(packed), ends.data_ptr())
        return DeviceTable.copy(packed, ends, tiles, table.device)

    held = _tables.get(table, out, make)
    current = torch.cuda.current_stream(table.device)
    held.for_stream(current)
    return (
        _index(table.device),
        current.cuda_stream,
        held.segments.data_ptr(),
        held.ends.data_ptr(),
        len(held.segments),
        held.tiles,
    )


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream
