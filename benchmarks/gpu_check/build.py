"""The compiled part for this GPU, what it was built with, and whether both backends serve."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.sizes import Sizes

ROOT = Path(__file__).resolve().parents[2]
CLOCKS = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,"
    "temperature.gpu,memory.total,memory.used"
)
CUDA_TOOLS = Path("/usr/local/cuda/bin")  # where they are if not on the PATH


def run(report: Report, device: torch.device, sizes: Sizes) -> None:
    with report.check("the compiled part builds") as facts:
        facts.update(build(device))
    report.note(**describe(device))
    import zorba_kernels as zk  # not earlier: it loads the compiled part

    report.note(build_info=zk.build_info(), nvidia_smi=nvidia_smi())
    rows = {row.name: row for row in zk.backends(device)}
    report.note(backends={row.name: row.reason or "serves" for row in rows.values()})
    for name in ("cuda", "triton") if device.type == "cuda" else ("cpu",):
        with report.check(f"{name} serves {device.type} tensors"):
            assert name in rows, f"there is no backend {name}, only {', '.join(rows)}"
            assert rows[name].available, rows[name].reason
    if device.type == "cuda" and "triton" in rows and rows["triton"].available:
        from benchmarks.gpu_check.precompile import precompile

        precompile(report, device)


def build(device: torch.device) -> dict[str, Any]:
    """Builds in the source tree: for the GPU's architecture alone, which must work."""
    environment = dict(os.environ)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        environment |= {"ZORBA_CUDA": "1", "ZORBA_CUDA_ARCHS": f"{major}{minor}"}
        nvcc = tool("nvcc")
        environment |= {"NVCC": nvcc} if nvcc else {}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return {k: v for k, v in environment.items() if k.startswith(("ZORBA_CUDA", "NVCC"))}


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and its versions."""
    from zorba import machine

    about = machine.describe() | {
        "triton": machine.version_of("triton"),
        "pytest": machine.version_of("pytest"),
        "processors": os.cpu_count(),
        "nvcc": first_words([tool("nvcc") or "nvcc", "--version"]),
        "c++": first_words([os.environ.get("CXX", "c++"), "--version"]),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "gpu_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "cuda_of_torch": torch.version.cuda,
        }
    return about


def nvidia_smi() -> str | None:
    """Clocks, power and memory of the GPU; None where the tool is not."""
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv"]
    return first_words(command)


def tool(name: str) -> str | None:
    """Path of a tool of CUDA, or None."""
    return shutil.which(name) or shutil.which(name, path=str(CUDA_TOOLS))


def first_words(command: list[str]) -> str | None:
    """What a command prints; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip()[:2000] if done.returncode == 0 else None
