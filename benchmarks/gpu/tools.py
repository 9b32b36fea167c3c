"""Programs of CUDA that are beside Python, where they are there."""

from __future__ import annotations

import shutil
import subprocess

CUDA_TOOLS = "/usr/local/cuda/bin"  # where they are if not on the PATH


def tool(name: str) -> str | None:
    """Returns the path of a tool of CUDA, or None."""
    return shutil.which(name) or shutil.which(name, path=CUDA_TOOLS)


def output_of(command: list[str]) -> str | None:
    """Returns what a command prints; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip()[:2000] if done.returncode == 0 else None
