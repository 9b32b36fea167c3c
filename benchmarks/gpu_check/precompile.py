"""Compiles the Triton kernels that later stages launch or tune, on all processors at once.

``triton.autotune`` compiles one candidate after the other, some 100 in all: a few minutes. Here
each process compiles a share of them and leaves it in Triton's cache.

    python -m benchmarks.gpu_check.precompile PART PARTS DEVICE
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import torch

from benchmarks.gpu_check.report import Report
from zorba_kernels.backends import triton
from zorba_kernels.backends.triton_variants import variants

PATIENCE = 90.0  # seconds


def precompile(report: Report, device: torch.device) -> None:
    """Runs the processes. What they leave undone is compiled, later, where it is used."""
    parts = min(os.cpu_count() or 1, 16)
    command = [sys.executable, "-m", "benchmarks.gpu_check.precompile"]
    start = time.monotonic()
    running = [
        subprocess.Popen([*command, str(part), str(parts), str(device)]) for part in range(parts)
    ]
    good = 0
    for process in running:
        try:
            good += process.wait(max(start + PATIENCE - time.monotonic(), 0.1)) == 0
        except subprocess.TimeoutExpired:
            process.kill()
    seconds = round(time.monotonic() - start, 1)
    report.note(triton_precompiled={"processes": parts, "done": good, "seconds": seconds})


def main(part: int, parts: int) -> None:
    """Compiles every ``parts``-th variant for the current device, as a launch would, and runs none.

    Triton finds a kernel in its cache only by what a launch makes of the arguments: ``warmup`` goes
    the same way. No argument is specialised on, so that any value stands for all.
    """
    for variant in list(variants(every_candidate=True))[part::parts]:
        kernel = triton.kernel(variant.op)
        arguments = {p.name: 0 for p in kernel.params if not p.is_constexpr}
        kernel.warmup(grid=(1,), **arguments, **variant.flags, **variant.options)


if __name__ == "__main__":
    with torch.cuda.device(sys.argv[3]):
        main(int(sys.argv[1]), int(sys.argv[2]))
