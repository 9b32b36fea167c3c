"""What the operations do when they run, with checked arguments or none to check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zorba_kernels.dispatch import choose
from zorba_kernels.noise import DISTRIBUTIONS, MAX_ELEMENTS
from zorba_kernels.program import (
    Program,
    check_choice,
    check_sample,
    check_uint64,
    integer,
    make_program,
)
from zorba_kernels.table import ParamTable


def add_noise(table: ParamTable, out: ParamTable, backend: str | None, **arguments: Any) -> None:
    """``add_noise`` of ``ops.py``, or ``add_noise_`` where ``out`` is the table."""
    program = make_program(num_groups=table.num_groups, **arguments)
    if out is not table:
        table.check_like(out)
        out.check()
    run_program(table, out, program, choose(backend, table.device))


def run_program(table: ParamTable, out: ParamTable, program: Program, module: Any) -> None:
    """Runs a checked program; ``out`` is the table itself, or one like it that is as it was made.

    For callers that use one program on many tables: ``add_noise`` without what is the same for all.

    Args:
        table: the tensors read.
        out: the tensors written.
        program: what to add.
        module: the backend, of ``choose``.
    """
    table.check()
    if table.contiguous and out.contiguous:
        module.add_noise(table, out, program)
    else:
        _through_copies(module, table, out, program)


def fingerprint(table: ParamTable, backend: str | None) -> int:
    """``fingerprint`` of ``ops.py``."""
    table.check()
    module = choose(backend, table.device)
    source = table if table.contiguous else _contiguous_copy(table)
    return int(module.fingerprint(source))


def noise(
    shape: int | Sequence[int],
    seed: int,
    stream: int,
    sample: int,
    distribution: str,
    device: str | torch.device,
    offset: int,
    backend: str | None,
) -> Tensor:
    """``noise`` of ``ops.py``."""
    check_choice("distribution", distribution, DISTRIBUTIONS)
    size = torch.Size((shape,) if isinstance(shape, int) else tuple(shape))
    offset = integer(offset, "offset")
    if any(n < 0 for n in size):
        raise ValueError(f"shape must not be negative, got {tuple(size)}")
    if offset < 0 or offset + size.numel() > MAX_ELEMENTS:
        raise ValueError(f"elements {offset} to {offset + size.numel()} are outside of [0, 2**35)")
    where = torch.device(device)
    z: Tensor = choose(backend, where).noise(
        size.numel(),
        offset,
        check_uint64(seed, "seed"),
        check_uint64(stream, "stream"),
        check_sample(sample),
        distribution,
        where,
    )
    return z.reshape(size)


def _contiguous_copy(table: ParamTable) -> ParamTable:
    return ParamTable(
        {e.name: e.tensor.contiguous() for e in table.entries},
        groups={e.name: e.group for e in table.entries},
        offsets={e.name: e.offset for e in table.entries},
    )


def _through_copies(module: object, table: ParamTable, out: ParamTable, program: Program) -> None:
    """Works on contiguous copies, one tensor at a time, and copies the results to their places."""
    for source, target in zip(table.entries, out.entries, strict=True):
        piece = ParamTable(
            {source.name: source.tensor.clone(memory_format=torch.contiguous_format)},
            groups={source.name: source.group},
            offsets={source.name: source.offset},
            num_groups=table.num_groups,
        )
        module.add_noise(piece, piece, program)  # type: ignore[attr-defined]
        target.tensor.copy_(piece.entries[0].tensor)
