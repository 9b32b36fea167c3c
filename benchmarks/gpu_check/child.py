"""One stage in a process of its own: a broken CUDA context ends with it.

python -m benchmarks.gpu_check.child STAGE --report FILE --deadline SECONDS --device cuda|cpu
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.sizes import FULL, SMALL


def main() -> int:
    """Returns 1 if a check failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage")
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True, help="of time.monotonic()")
    parser.add_argument("--device", required=True)
    given = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    stage = importlib.import_module(f"benchmarks.gpu_check.{given.stage}")
    report = Report(given.report, given.deadline)
    sizes = FULL if given.device == "cuda" else SMALL
    stage.run(report, torch.device(given.device), sizes)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
