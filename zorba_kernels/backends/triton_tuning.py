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

from zorba_kernels.noise import DISTRIBUTION_CODES
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
    """A choice: ``strip`` elements in the registers of ``warps`` warps.

    Without a limit of ours, ptxas takes lower limits for the registers of a thread where that lets
    more warps run, and spills.
    """

    strip: int
    warps: int
    registers: int | None = None  # of a thread, at most; not for AMD's compiler

    def options(self) -> dict[str, Any]:
        """What a launch needs besides the kernel's arguments."""
        options = {"STRIP": self.strip, "num_warps": self.warps, "num_stages": 1}
        return options | ({} if self.registers is None else {"maxnreg": self.registers})


def candidates(flags: Flags) -> tuple[Config, ...]:
    """Returns what may serve a kernel of ``add_noise`` with these flags; first the default.

    A Philox call makes the signs of 128 elements, so that noise of signs wants that many of them
    in each thread; the sums of a program of many terms, stochastic float16, and rank-one noise,
    which finds its rows and columns, need the registers.
    """
    most = 255 if torch.version.hip is None else None
    if flags["DISTRIBUTION"] == DISTRIBUTION_CODES["gaussian"]:
        most = most if flags["MANY"] else None
        return tuple(Config(s, w, most) for s, w in ((512, 1), (1024, 1), (1024, 2), (2048, 4)))
    rank1 = flags["DISTRIBUTION"] == DISTRIBUTION_CODES["rank1"]
    if flags["MANY"] or rank1 or (flags["STOCHASTIC"] and flags["DTYPE"] == FLOAT16):
        return tuple(Config(1024 * w, w, most) for w in (1, 2, 4))
    return tuple(Config(2048 * w, w, most) for w in (1, 2, 4))


_chosen: dict[tuple[Any, ...], Config] = {}


def choose(
    kernel: Any, flags: Flags, elements: int, device: torch.device, rehearse: Rehearse
) -> Config:
    """Returns the configuration for a pass of ``add_noise`` over tables of so many elements.

    ``rehearse`` runs a kernel that it is given, on scratch memory.
    """
    # Small tables take microseconds whatever the choice: they are not worth a measurement.
    default = candidates(flags)[0]
    size = max((size for size in SIZES if size <= elements), default=0)
    if size == 0:
        return default
    # By size class, not by size: a table that grows by a layer is not measured again.
    key = (device, size, *flags.values())
    if key not in _chosen:
        # A graph would replay the measurements at every step.
        if torch.cuda.is_current_stream_capturing():
            return default
        try:
            _chosen[key] = _measured(kernel, flags, size, device, rehearse)
        # Scratch memory is a luxury: whoever has filled the GPU still gets a pass.
        except torch.OutOfMemoryError:
            _chosen[key] = default
    return _chosen[key]


def _measured(
    kernel: Any, flags: Flags, size: int, device: torch.device, rehearse: Rehearse
) -> Config:
    import triton

    # Triton's tuner takes its own configurations; what it finds best is looked up again as ours.
    configs = {
        triton.Config({"STRIP": c.strip}, num_warps=c.warps, num_stages=1, maxnreg=c.registers): c
        for c in candidates(flags)
    }
    tuner = triton.autotune(list(configs), key=["tiles", *flags], cache_results=True)(kernel)
    rehearse(tuner, flags, size, device)
    return configs[tuner.best_config]
