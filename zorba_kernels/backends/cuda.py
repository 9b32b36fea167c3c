"""The compiled CUDA backend: one launch for all tensors of a table, on torch's current stream."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from zorba_kernels.build import extension
from zorba_kernels.noise import Distribution, as_int64
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
    target = _device_table(table, out)
    # Everything but the table travels with the launch: no copy, no allocation.
    extension()[0].cuda_add_noise_single(
        *target.arguments(),
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
    target = _device_table(table, table)
    result = torch.zeros(1, dtype=torch.int64, device=table.device)
    extension()[0].cuda_fingerprint(*target.arguments(), result.data_ptr())
    return int(result.item()) % (1 << 64)


class DeviceProgram:
    """A program whose seeds and coefficients live in device memory.

    ``run`` neither allocates nor waits, so it can be captured into a CUDA graph once its tables
    have been used; a replay then reads what the tensors hold at that time. The tensors may be
    written, not resized.

    Attributes:
        seeds: int64 [terms], bits of the uint64 seeds.
        samples: int64 [terms].
        coefs: float32 [groups, terms].
        decays: float32 [groups, rounds].
        round_ends: int64 [rounds].
        rounding_seeds: int64 [rounds], bits of the uint64 seeds.
    """

    def __init__(self, program: Program, device: torch.device) -> None:
        """Copies the program to the device, in one transfer that the host does not wait for."""
        terms, rounds = len(program.seeds), len(program.round_ends)
        self._distribution, self._rounding = program.distribution, program.rounding
        words = torch.tensor(
            [
                *map(as_int64, program.seeds),
                *program.samples,
                *program.round_ends,
                *map(as_int64, program.rounding_seeds),
            ],
            dtype=torch.int64,
        )
        floats = torch.cat([program.coefs.reshape(-1), program.decays.reshape(-1)])
        packed = torch.cat([words.view(torch.uint8), floats.view(torch.uint8)])
        held = packed.pin_memory().to(device, non_blocking=True)
        integers = held[: words.numel() * 8].view(torch.int64)
        reals = held[words.numel() * 8 :].view(torch.float32)
        self.seeds, self.samples, self.round_ends, self.rounding_seeds = torch.split(
            integers, [terms, terms, rounds, rounds]
        )
        self.coefs = reals[: program.coefs.numel()].view(program.coefs.shape)
        self.decays = reals[program.coefs.numel() :].view(program.decays.shape)
        size = extension()[0].cuda_workspace_bytes(terms, rounds)
        self._workspace = torch.empty(size, dtype=torch.uint8, device=device)

    def run(self, table: ParamTable, out: ParamTable) -> None:
        """``out <- round(table + sum of noises)``, on the current stream of the table's device."""
        target = _device_table(table, out)
        extension()[0].cuda_add_noise_program(
            *target.arguments(),
            self.seeds.data_ptr(),
            self.samples.data_ptr(),
            self.coefs.data_ptr(),
            self.decays.data_ptr(),
            self.round_ends.data_ptr(),
            self.rounding_seeds.data_ptr(),
            len(self.seeds),
            len(self.round_ends),
            self._workspace.data_ptr(),
            self._distribution == "gaussian",
            self._rounding == "stochastic",
        )


@dataclass(frozen=True)
class _DeviceTable:
    """A packed table in device memory."""

    segments: Tensor  # int64 [count, 7]
    ends: Tensor  # int64 [count], tiles up to and including each segment
    tiles: int
    made_on: torch.cuda.Stream

    def arguments(self) -> tuple[int, ...]:
        """The leading arguments of the functions of ``_C``: where to run, and the table."""
        device = self.segments.device
        current = torch.cuda.current_stream(device)
        if current != self.made_on:
            self.segments.record_stream(current)
            self.ends.record_stream(current)
        return (
            _index(device),
            current.cuda_stream,
            self.segments.data_ptr(),
            self.ends.data_ptr(),
            len(self.segments),
            self.tiles,
        )


_tables: WeakKeyDictionary[ParamTable, WeakKeyDictionary[ParamTable, _DeviceTable]] = (
    WeakKeyDictionary()
)


def _device_table(table: ParamTable, out: ParamTable) -> _DeviceTable:
    """The table in device memory: copied once, and kept as long as both tables are alive."""
    for each in (table, out):
        if each.device.type != "cuda":
            raise ValueError(
                f"the cuda backend serves CUDA tensors; this table is on {each.device}"
            )
    by_out = _tables.setdefault(table, WeakKeyDictionary())
    if out not in by_out:
        packed = table.packed(out)
        ends = torch.empty(len(packed), dtype=torch.int64)
        tiles = extension()[0].cuda_tile_ends(packed.data_ptr(), len(packed), ends.data_ptr())
        by_out[out] = _DeviceTable(
            packed.to(table.device),
            ends.to(table.device),
            tiles,
            torch.cuda.current_stream(table.device),
        )
    return by_out[out]


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream
