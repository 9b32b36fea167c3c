"""The compiled CUDA backend: one launch for all tensors of a table, on torch's current stream."""

from __future__ import annotations

import torch
from torch import Tensor

from zorba_kernels.backends.device_table import DeviceTable, OncePerPair
from zorba_kernels.build import extension
from zorba_kernels.dispatch import Backend, NoiseKey, RowNoise
from zorba_kernels.noise import DISTRIBUTION_CODES
from zorba_kernels.program import PackedProgram, Program
from zorba_kernels.table import DTYPE_CODES, ParamTable

_usable: set[int] = set()  # devices that unavailable() has found fit


def unavailable(device: torch.device) -> str | None:
    """Returns why this backend cannot serve tensors on the device, or None."""
    if device.type != "cuda":
        return f"it serves CUDA tensors, not {device.type}"
    # ROCm builds of PyTorch call their devices "cuda" too.
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
    # The driver is asked once a device; only success is kept, so that a failure can be mended.
    index = _index(device)
    if index not in _usable:
        why: str = compiled.cuda_unavailable(index)
        if why:
            return why
        _usable.add(index)
    return None


def run(table: ParamTable, out: ParamTable, program: Program) -> None:
    """See ``dispatch.Backend``."""
    single = len(program.seeds) == 1 and len(program.round_ends) == 1
    if single and table.num_groups <= extension()[0].cuda_max_groups_of_single:
        # The usual case of a step, perturb or update with one direction.
        # Everything but the table travels with the launch: no copy, no allocation.
        packed = program.packed(table.num_groups)
        extension()[0].cuda_add_noise_single(*_target(table, out), packed.address)
        return
    # Copied once for each stream: a launch on another one would have to wait for the copy.
    key = ("cuda", table.device, _stream(table.device), table.num_groups)
    program.once(key, lambda: DeviceProgram(program, table)).run(table, out)


def noise(numel: int, offset: int, key: NoiseKey, device: torch.device) -> Tensor:
    """See ``dispatch.Backend``."""
    z = torch.empty(numel, dtype=torch.float32, device=device)
    *words, distribution, columns = key
    given = (z.data_ptr(), numel, offset, *words, DISTRIBUTION_CODES[distribution], columns)
    extension()[0].cuda_noise(_index(device), _stream(device), *given)
    return z


def perturb(x: Tensor | None, y: Tensor, noise: RowNoise) -> None:
    """See ``dispatch.Backend``."""
    if y.device.type != "cuda":
        raise ValueError(f"the cuda backend serves CUDA tensors; these are on {y.device}")
    address, inputs = (0, 0) if x is None else (x.data_ptr(), x.shape[2])
    places = (address, y.data_ptr(), noise.samples.data_ptr(), noise.scale.data_ptr())
    given = (*places, *y.shape[:2], inputs, y.shape[2], DTYPE_CODES[y.dtype])
    where = (_index(y.device), _stream(y.device))
    extension()[0].cuda_perturb(*where, *given, noise.seed, noise.stream, noise.transposed)


def fingerprint(table: ParamTable) -> int:
    """See ``dispatch.Backend``; waits for the result."""
    # The bits of a uint64 sum: int64 wraps alike.
    result = torch.zeros(1, dtype=torch.int64, device=table.device)
    extension()[0].cuda_fingerprint(*_target(table, table), result.data_ptr())
    return int(result.item()) % (1 << 64)


class DeviceProgram(PackedProgram):
    """A program whose seeds and coefficients live in device memory, for tables of one size.

    ``run`` neither allocates nor waits, so it can be captured into a CUDA graph once its tables
    have been used; a replay then reads the values of ``arrays`` at that time. The arrays may be
    written, not resized.
    """

    def __init__(self, program: Program, table: ParamTable) -> None:
        """Copies the program to the table's device, for tables of its number of groups."""
        super().__init__(program, table.num_groups, table.device)
        terms, rounds = len(program.seeds), len(program.round_ends)
        size = extension()[0].cuda_workspace_bytes(terms, rounds)
        self._workspace = torch.empty(size, dtype=torch.uint8, device=table.device)

    def run(self, table: ParamTable, out: ParamTable) -> None:
        """``out <- round(table + sum of noises)``, on the current stream of the table's device."""
        place = (*_target(table, out), self.address, self._workspace.data_ptr())
        extension()[0].cuda_add_noise_program(*place)


_tables: OncePerPair[DeviceTable] = OncePerPair()


def _target(table: ParamTable, out: ParamTable) -> tuple[int, ...]:
    """The leading arguments of the functions of ``_C``: where to run, and the table."""
    # A host address in a launch would be a fault of the device, which ends its context.
    for device in (table.device, out.device):
        if device.type != "cuda":
            raise ValueError(f"the cuda backend serves CUDA tensors; this table is on {device}")

    def make() -> DeviceTable:
        packed = table.packed(out)
        ends = torch.empty(len(packed), dtype=torch.int64)
        tiles = extension()[0].cuda_tile_ends(packed.data_ptr(), len(packed), ends.data_ptr())
        return DeviceTable.copy(packed, ends, tiles, table.device)

    # The rows are copied once a pair of tables; another stream that reads them must be recorded.
    held = _tables.get(table, out, make)
    current = torch.cuda.current_stream(table.device)
    held.for_stream(current)
    arrays = (held.segments.data_ptr(), held.ends.data_ptr(), len(held.segments))
    return (_index(table.device), current.cuda_stream, *arrays, held.tiles)


def _index(device: torch.device) -> int:
    # A device without an index is the current one, which may differ between calls.
    return torch.cuda.current_device() if device.index is None else device.index


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


BACKEND = Backend("cuda", ("cuda",), unavailable, run, noise, fingerprint, perturb)
