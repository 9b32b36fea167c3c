"""What a run ran on, and how much memory it took."""

from __future__ import annotations

import contextlib
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import zorba_kernels as zk

_STATUS = Path("/proc/self/status")


def describe() -> dict[str, Any]:
    """Returns processor, threads, versions and instruction set."""
    cpu = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        "zorba_kernels": version_of("zorba-kernels"),
        "cpu_isas": zk.build_info()["cpu_isas"],
    }


def version_of(package: str) -> str | None:
    """Returns the version of an installed package; None for one that is run from its sources."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def reset_peak_memory() -> None:
    """Starts the peak of this process anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Returns the most bytes that this process had resident since the last reset."""
    with contextlib.suppress(OSError, StopIteration):
        lines = _STATUS.read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
