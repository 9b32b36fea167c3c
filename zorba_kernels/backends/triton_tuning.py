"""How large the pieces of work of the Triton kernels are. The results do not depend on it.

Large tables get the fastest of a few candidates, measured by ``triton.autotune`` at the first use
of a kernel on a device: on scratch memory, never on weights. Triton keeps what it found on disk.
Small tables, and a pass that a CUDA graph captures before the kernel was tuned, get the default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from zorba_kernels.table import DTYPE_CODES

FLOAT16 = DTYPE_CODES[torch.float16]

TILE = 8192
"""Elements that a program takes at a time, aligned in the whole parameter."""

SIZES = (1 << 22, 1 << 25)
"""Elements of the scratch memory that stands for tables of at least so many; others are small."""

Flags = dict[str, Any]
Rehearse = Callable[[Any, Flags, int, torch.device], None]


@dataclass(frozen=True)
class Config:
    """A choice: ``strip`` elements in the registers of ``warps`` warps."""

    strip: int
    warps: int

    def options(self) -> dict[str, Any]:
        """What a launch needs besides the kernel's arguments."""
        return {"STRIP": self.strip, "num_warps": self.warps, "num_stages": 1}


def candidates(flags: Flags) -> tuple[Config, ...]:
    """Returns what may serve a kernel of ``add_noise`` with these flags; first the default.

    A Philox call makes the signs of 128 elements, so that Rademacher noise wants that many of them
    in each thread; the sums of a program of many terms, and stochastic float16, need the registers.
    """
    if flags["GAUSSIAN"]:
        return Config(512, 1), Config(1024, 1), Config(1024, 2), Config(2048, 4)
    if flags["MANY"] or (flags["STOCHASTIC"] and flags["DTYPE"] == FLOAT16):
        return Config(1024, 1), Config(2048, 2), Config(4096, 4)
    return Config(2048, 1), Config(4096, 2), Config(8192, 4)


_chosen: dict[tuple[Any, ...], Config] = {}


def choose(
    kernel: Any,
    flags: Flags,
    elements: int,
    device: torch.device,
    rehearse: Rehearse,
) -> Config:
    """Returns the configuration for a pass over tables of so many elements.

    Args:
        kernel: ``kernels.add_noise.add_noise``.
        flags: its compile-time flags.
        elements: of the table.
        device: where the table is.
        rehearse: runs a kernel that it is given, on scratch memory.
    """
    default = candidates(flags)[0]
    size = max((size for size in SIZES if size <= elements), default=0)
    if size == 0:
        return default
    key = (device, size, *flags.values())
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return default  # measuring would be captured too
        try:
            _chosen[key] = _measured(kernel, flags, size, device, rehearse)
        except torch.OutOfMemoryError:
            _chosen[key] = default
    return _chosen[key]


def _measured(
    kernel: Any, flags: Flags, size: int, device: torch.device, rehearse: Rehearse
) -> Config:
    import triton

    configs = {
        triton.Config({"STRIP": c.strip}, num_warps=c.warps, num_stages=1): c
        for c in candidates(flags)
    }
    tuner = triton.autotune(list(configs), key=["tiles", *flags], cache_results=True)(kernel)
    rehearse(tuner, flags, size, device)
    return configs[tuner.best_config]
