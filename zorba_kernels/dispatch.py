"""Which backend serves a call."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from zorba_kernels.backends import cpu, cuda, reference, triton

_BACKENDS: dict[str, ModuleType] = {
    "cuda": cuda,
    "triton": triton,
    "cpu": cpu,
    "reference": reference,
}
"""In order of preference."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for that cannot serve."""


@dataclass(frozen=True)
class BackendStatus:
    """One row of ``backends()``."""

    name: str
    available: bool
    reason: str | None  # why not


def backends(device: str | torch.device = "cpu") -> list[BackendStatus]:
    """Returns every backend, in order of preference, and whether it can serve the device."""
    where = torch.device(device)
    rows = []
    for name, module in _BACKENDS.items():
        reason = module.unavailable(where)
        rows.append(BackendStatus(name, reason is None, reason))
    return rows


def choose(name: str | None, device: torch.device) -> Any:
    """Returns the backend module for tensors on the device.

    Args:
        name: a backend, or None for what ``ZORBA_BACKEND`` names, or else the first that can serve
            (for CPU tensors ``cpu`` when ``ZORBA_CPU_ISA`` is set, and never ``triton``).
        device: where the tensors are.

    Raises:
        ValueError: an unknown name.
        BackendUnavailableError: the named one, or every one, cannot serve; the message says why.
    """
    asked = name or os.environ.get("ZORBA_BACKEND") or None
    if asked is None and device.type == "cpu" and cpu.isa():
        asked = "cpu"  # ZORBA_CPU_ISA asks for it: no quiet fall back on a slower one
    if asked is None:
        reasons = {}
        for candidate, module in _BACKENDS.items():
            if candidate == "triton" and device.type == "cpu":
                continue  # its interpreter is for tests: nobody gets it unasked
            reasons[candidate] = module.unavailable(device)
            if reasons[candidate] is None:
                return module
        raise BackendUnavailableError(f"no backend can serve {device} tensors: {reasons}")
    if asked not in _BACKENDS:
        raise ValueError(f"unknown backend {asked!r}; there are {', '.join(_BACKENDS)}")
    reason = _BACKENDS[asked].unavailable(device)
    if reason is not None:
        raise BackendUnavailableError(f"backend {asked!r} cannot serve this call: {reason}")
    return _BACKENDS[asked]
