"""compute-sanitizer over the kernels, where the tool is there and the machine lets it work."""

from __future__ import annotations

import re
import sys

import torch

from benchmarks.gpu_check.build import tool
from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.sanitized import DONE
from benchmarks.gpu_check.serving import fast_backends
from benchmarks.gpu_check.sizes import Sizes
from benchmarks.gpu_check.stages import run_process

# tool, what runs under it: signs of Rademacher are shared by the lanes of a warp.
RUNS = (
    ("memcheck", ("gaussian", "rademacher")),
    ("racecheck", ("rademacher",)),
    ("initcheck", ("gaussian", "rademacher")),
)


def run(report: Report, device: torch.device, sizes: Sizes) -> None:
    checker = tool("compute-sanitizer")
    if checker is None:
        report.note(left_out="compute-sanitizer is not present")
        return
    todo = [(*each, backend) for each in RUNS for backend in fast_backends(device)]
    for done, (name, distributions, backend) in enumerate(todo):
        title = f"{name}, {backend}"
        command = [checker, "--tool", name, sys.executable, "-m", "benchmarks.gpu_check.sanitized"]
        command += [backend, device.type, *distributions]
        # What one leaves of its time the others may use.
        limit = min(report.left() - 2, 2 * report.left() / (len(todo) - done))
        outcome, lines = run_process(command, limit, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        output = "\n".join(lines)
        why_not = cannot_run(outcome, output)
        if why_not:
            report.note(**{f"{title}, left out": why_not})
            continue
        with report.check(title):
            assert errors_of(output) == 0, output[-6000:]
            assert DONE in output, output[-6000:]


def cannot_run(outcome: str, output: str) -> str | None:
    """Why a run says nothing about the kernels, or None if it does."""
    if "device not supported" in output.lower():
        return f"the tool does not support this machine: {output[-1000:]}"
    if outcome == "timed out":
        return f"it did not end in time: {output[-1000:]}"
    return None if errors_of(output) is not None else f"it printed no summary: {output[-1000:]}"


def errors_of(output: str) -> int | None:
    """Errors that the tool counted, or None where it printed no summary."""
    memory = re.search(r"ERROR SUMMARY: (\d+) error", output)
    races = re.search(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) error", output)
    found = memory or races
    return int(found[1]) if found else None
