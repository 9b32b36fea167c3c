"""Compiles the Triton kernels that later stages tune, on all processors at once.

``triton.autotune`` compiles one candidate after the other, some 75 for what is measured here: a few
minutes. Processes that each run a share of them on a scrap of memory leave them in Triton's cache.

    python -m benchmarks.gpu_check.precompile PART PARTS DEVICE
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu_check.report import Report
from zorba_kernels.backends import triton, triton_tuning
from zorba_kernels.table import DTYPE_CODES

SCRAP = 1 << 13  # elements
PATIENCE = 90.0  # seconds


def precompile(report: Report, device: torch.device) -> None:
    """Runs the processes. What they leave undone is compiled, later, where it is used."""
    parts = min(os.cpu_count() or 1, 16)
    command = [sys.executable, "-m", "benchmarks.gpu_check.precompile"]
    start = time.monotonic()
    running = [
        subprocess.Popen([*command, str(part), str(parts), device.type]) for part in range(parts)
    ]
    good = 0
    for process in running:
        try:
            good += process.wait(max(start + PATIENCE - time.monotonic(), 0.1)) == 0
        except subprocess.TimeoutExpired:
            process.kill()
    seconds = round(time.monotonic() - start, 1)
    report.note(triton_precompiled={"processes": parts, "done": good, "seconds": seconds})


def variants() -> Iterator[dict[str, Any]]:
    """Compile-time flags of every kernel and candidate that a stage may tune."""
    for dtype, code in DTYPE_CODES.items():
        for gaussian in (True, False):
            for many in (True, False):
                for stochastic in (False,) if dtype == torch.float32 else (False, True):
                    flags = {
                        "GAUSSIAN": gaussian,
                        "STOCHASTIC": stochastic,
                        "MANY": many,
                        "DECAYS": many,
                        "TILE": triton_tuning.TILE,
                        "DTYPE": code,
                    }
                    for config in triton_tuning.candidates(flags):
                        yield flags | config.options()


def main(part: int, parts: int, device: torch.device) -> None:
    """Compiles every ``parts``-th variant."""
    kernel = triton._kernel("add_noise")
    for flags in list(variants())[part::parts]:
        triton._rehearse(kernel, flags, SCRAP, device)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), torch.device(sys.argv[3]))
