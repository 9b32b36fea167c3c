"""What the operations become while a tracer looks: calls of ``torch.ops.zorba_kernels``.

A graph holds tensors, strings and numbers, not a ``ParamTable``: it comes apart here, and
``library.py`` puts it together again when the graph runs. Seeds travel in int64 tensors with the
bits of the uint64, so that a new seed compiles nothing anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zorba_kernels.noise import as_int64
from zorba_kernels.table import ParamTable


def add_noise(table: ParamTable, out: ParamTable, backend: str | None, **program: Any) -> None:
    """Calls the operator of ``add_noise``, or of ``add_noise_`` where ``out`` is the table."""
    arguments = (
        *_layout(table),
        _words(program["seeds"]),
        _reals(program["coefs"]),
        program["distribution"],
        program["rounding"],
        _words(program["rounding_seed"]),
        _words(program["samples"]),
        program["rounds"],
        _reals(program["decay"]),
        backend,
    )
    if out is table:
        torch.ops.zorba_kernels.add_noise_(_tensors(table), *arguments)
    else:
        torch.ops.zorba_kernels.add_noise(_tensors(table), _tensors(out), *arguments)


def fingerprint(table: ParamTable, backend: str | None) -> int:
    """Calls the operator and reads its result, which is where a graph ends."""
    bits: Tensor = torch.ops.zorba_kernels.fingerprint(_tensors(table), *_layout(table), backend)
    return int(bits.item()) % (1 << 64)


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
    """Calls the operator: float32 of the shape."""
    z: Tensor = torch.ops.zorba_kernels.noise(
        [shape] if isinstance(shape, int) else shape,
        _words(seed),
        _words(stream),
        sample,
        distribution,
        torch.device(device),
        offset,
        backend,
    )
    return z


def _layout(table: ParamTable) -> tuple[list[str], list[int], list[int], int]:
    return (
        [e.name for e in table.entries],
        [e.group for e in table.entries],
        [e.offset for e in table.entries],
        table.num_groups,
    )


def _tensors(table: ParamTable) -> list[Tensor]:
    """As they were given: a tracer must see that they are the parameters of a model."""
    return [e.source for e in table.entries]


def _words(values: int | Sequence[int] | Tensor | None) -> Tensor | None:
    """uint64 values as int64 [n] with the same bits."""
    if values is None:
        return None
    if isinstance(values, Tensor):
        return values.reshape(-1).to(torch.int64)
    listed = [values] if isinstance(values, int) else list(values)
    return torch.tensor([as_int64(v) for v in listed], dtype=torch.int64)


def _reals(values: Any) -> Tensor | None:
    if values is None or isinstance(values, Tensor):
        return values
    return torch.tensor(values, dtype=torch.float64)
