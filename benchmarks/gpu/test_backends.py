"""The machine, its versions, and whether the compiled part and both GPU backends serve it.

    python -m benchmarks.gpu.test_backends PART PARTS

compiles a share of the some 100 Triton kernels that later stages launch or tune, which Triton would
compile one after the other.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch
from zorba import machine

import zorba_kernels as zk
from benchmarks.bench import GPU_BACKENDS, Bench
from benchmarks.gpu.stages import output_of, tool

pytestmark = pytest.mark.gpu

CLOCKS = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,"
    "temperature.gpu,memory.total,memory.used"
)
PATIENCE = 90.0  # seconds for compiling ahead


def test_description(bench: Bench) -> None:
    built = zk.build_info()
    bench.facts.update(
        machine.describe(),
        triton=machine.version_of("triton"),
        pytest=machine.version_of("pytest"),
        processors=os.cpu_count(),
        nvcc=output_of(tool("nvcc") or "nvcc", "--version"),
        compiler=output_of(os.environ.get("CXX", "c++"), "--version"),
        nvidia_smi=output_of("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv"),
        build_info=built,
        cuda_of_torch=torch.version.cuda,
    )
    if bench.device.type == "cuda":
        bench.facts["gpu"] = str(torch.cuda.get_device_properties(bench.device))
    assert built["compiled"], built["reason"]


def test_backends_serve(bench: Bench) -> None:
    rows = {row.name: row for row in zk.backends(bench.device)}
    bench.facts.update({name: row.reason or "serves" for name, row in rows.items()})
    for name in GPU_BACKENDS if bench.device.type == "cuda" else ("cpu",):
        assert rows[name].available, f"{name}: {rows[name].reason}"


def test_triton_compiles_ahead(bench: Bench) -> None:
    """On all processors at once; kernels that are not ready in time are compiled where they run."""
    if "triton" not in bench.backends:
        pytest.skip("triton does not serve this device")
    parts = min(os.cpu_count() or 1, 16)
    command = [sys.executable, "-m", "benchmarks.gpu.test_backends"]
    running = [subprocess.Popen([*command, f"{part}", f"{parts}"]) for part in range(parts)]
    end = time.monotonic() + PATIENCE
    good = 0
    for process in running:
        try:
            good += process.wait(max(end - time.monotonic(), 0.1)) == 0
        except subprocess.TimeoutExpired:
            process.kill()
    bench.facts.update(processes=parts, done=good)


def precompile(part: int, parts: int) -> None:
    """Compiles every ``parts``-th variant for the current device, as a launch would, and runs none.

    Triton finds a kernel in its cache only by what a launch makes of the arguments: ``warmup`` goes
    the same way. No argument is specialised on, so that any value stands for all.
    """
    from zorba_kernels.backends import triton
    from zorba_kernels.backends.triton_variants import variants

    for variant in list(variants(every_candidate=True))[part::parts]:
        kernel = triton.kernel(variant.op)
        arguments = {p.name: 0 for p in kernel.params if not p.is_constexpr}
        kernel.warmup(grid=(1,), **arguments, **variant.flags, **variant.options)


if __name__ == "__main__":
    precompile(int(sys.argv[1]), int(sys.argv[2]))
