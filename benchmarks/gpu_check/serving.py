"""Which backends a stage compares and measures, and where its random inputs come from."""

from __future__ import annotations

import os
import random
import secrets

import torch

import zorba_kernels as zk
from benchmarks.gpu_check.report import Report

GPU_BACKENDS = ("cuda", "triton")
"""Both must serve an NVIDIA GPU."""


def fast_backends(device: torch.device) -> list[str]:
    """Backends to measure on the device, the preferred one first."""
    wanted = GPU_BACKENDS if device.type == "cuda" else ("cpu",)
    serving = {row.name for row in zk.backends(device) if row.available}
    return [name for name in wanted if name in serving]


def fresh(report: Report) -> random.Random:
    """Inputs that differ every run; ``ZORBA_TEST_SEED`` repeats them."""
    seed = int(os.environ.get("ZORBA_TEST_SEED") or secrets.randbits(32))
    report.note(seed=seed)
    return random.Random(seed)
