"""Which machine and versions a figure belongs to."""

from __future__ import annotations

import contextlib
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import zorba_kernels as zk


def describe() -> dict[str, Any]:
    """Returns processor, threads, versions and instruction set."""
    cpu = platform.processor()  # on Linux "x86_64", or empty
    with contextlib.suppress(OSError, IndexError):
        cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0].strip()
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
