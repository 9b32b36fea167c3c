"""Which backend serves a call: backends register by name, with the devices that they are for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from zorba_kernels.noise import Distribution

if TYPE_CHECKING:
    from zorba_kernels.program import Program
    from zorba_kernels.table import ParamTable


class BackendUnavailableError(RuntimeError):
    """A backend was asked for that cannot serve."""


class NoiseKey(NamedTuple):
    """What tells one noise from another; all in range."""

    seed: int
    stream: int
    sample: int
    distribution: Distribution
    columns: int = 0  # elements of a row of the parameter; 0: it has one dimension


class RowNoise(NamedTuple):
    """Rank-one noise of a parameter that differs by row of a batch."""

    seed: int
    stream: int
    samples: Tensor  # int64 [rows], on the device: which perturbation each row has
    scale: Tensor  # float32 [rows], on the device: what its noise is multiplied by
    transposed: bool = False  # whether x meets the signs of rows, and y those of columns


@dataclass(frozen=True)
class Backend:
    """Functions that serve the operations. All backends give the same bits."""

    name: str  # that ``backend=`` and ``ZORBA_BACKEND`` know it by
    devices: tuple[str, ...] | None  # types that it serves without being named; None: all it can
    # Returns why it cannot serve tensors on a device, or None.
    unavailable: Callable[[torch.device], str | None]
    # ``out <- round(table + noise)``, of a table, its ``out`` and a program; both tables are
    # contiguous, alike, and on the device.
    run: Callable[[ParamTable, ParamTable, Program], None]
    # Makes z at indices ``offset .. offset + numel``, float32 [numel], of numel, offset, key.
    noise: Callable[[int, int, NoiseKey, torch.device], Tensor]
    fingerprint: Callable[[ParamTable], int]  # of a contiguous table, in [0, 2**64)
    # ``y[r, t] += scale[r] * (x[r, t] . v) * u`` in place, with u and v the signs of the rows and
    # columns of the parameter for sample r; without x: ``y[r, t] += scale[r] * u``. Contiguous
    # x [rows, tokens, columns] and y [rows, tokens, parameter's rows] of one dtype, in float32.
    perturb: Callable[[Tensor | None, Tensor, RowNoise], None]


@dataclass(frozen=True)
class BackendStatus:
    """One row of ``backends()``."""

    name: str
    available: bool
    reason: str | None  # why not


_registered: dict[str, Backend] = {}  # in order of preference


def register(backend: Backend) -> None:
    """Adds a backend, behind those that are registered already."""
    _registered[backend.name] = backend


def backends(device: str | torch.device = "cpu") -> list[BackendStatus]:
    """Returns every backend, in order of preference, and whether it can serve the device."""
    where = torch.device(device)
    reasons = {name: backend.unavailable(where) for name, backend in _registered.items()}
    return [BackendStatus(name, reason is None, reason) for name, reason in reasons.items()]


def choose(name: str | None, device: torch.device) -> Backend:
    """Returns the backend of a name for tensors on the device.

    Without a name it is the one that ``ZORBA_BACKEND`` names, or else the first that can serve (for
    CPU tensors ``cpu`` when ``ZORBA_CPU_ISA`` is set).

    Raises:
        ValueError: an unknown name.
        BackendUnavailableError: the named one, or every one, cannot serve; the message says why.
    """
    # Read at every choice, not at import: tests and users change the environment in between.
    asked = name or os.environ.get("ZORBA_BACKEND")
    if not asked and device.type == "cpu" and os.environ.get("ZORBA_CPU_ISA"):
        asked = "cpu"  # it was asked for by its instruction set: no quiet fall back on a slower one
    if asked:
        if asked not in _registered:
            raise ValueError(f"unknown backend {asked!r}; there are {', '.join(_registered)}")
        # Whoever names a backend measures or tests it: another one must not step in.
        reason = _registered[asked].unavailable(device)
        if reason is not None:
            raise BackendUnavailableError(f"backend {asked!r} cannot serve this call: {reason}")
        return _registered[asked]
    reasons = {}
    for backend in _registered.values():
        # Triton's interpreter can serve CPU tensors, for tests: nobody gets it unasked.
        if backend.devices is not None and device.type not in backend.devices:
            continue
        reason = backend.unavailable(device)
        if reason is None:
            return backend
        reasons[backend.name] = reason
    raise BackendUnavailableError(f"no backend can serve {device} tensors: {reasons}")
