"""compute-sanitizer over the kernels, where the tool is there and the machine lets it work."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from benchmarks.bench import Bench
from benchmarks.gpu.sanitized import DONE
from benchmarks.gpu.tools import tool

pytestmark = pytest.mark.gpu

# Signs of Rademacher are shared by the lanes of a warp: only they can race.
RUNS = {
    "memcheck": ("gaussian", "rademacher"),
    "racecheck": ("rademacher",),
    "initcheck": ("gaussian", "rademacher"),
}


@pytest.mark.parametrize("place", [0, 1], ids=["first backend", "second backend"])
@pytest.mark.parametrize("name", RUNS)
def test_sanitizer(bench: Bench, name: str, place: int) -> None:
    checker = tool("compute-sanitizer")
    if checker is None or place >= len(bench.backends):
        pytest.skip("compute-sanitizer or the backend is not there")
    script = [sys.executable, "-m", "benchmarks.gpu.sanitized"]
    command = [
        checker,
        "--tool",
        name,
        *script,
        bench.backends[place],
        bench.device.type,
        *RUNS[name],
    ]
    # Memory that is not pooled, so that each tensor has bounds of its own.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    limit = max(1.0, bench.left() / 2)
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"left out: it did not end within {limit:.0f} s")
    output = done.stdout + done.stderr
    errors = errors_of(output)
    if errors is None:
        pytest.skip(f"left out: it says nothing about the kernels: {output[-1000:]}")
    assert errors == 0, output[-6000:]
    assert DONE in output, output[-6000:]


def errors_of(output: str) -> int | None:
    """Returns the errors that the tool counted, or None where it could not watch."""
    memory = re.search(r"ERROR SUMMARY: (\d+) error", output)
    races = re.search(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) error", output)
    found = memory or races
    if found is None or "device not supported" in output.lower():
        return None
    return int(found[1])
