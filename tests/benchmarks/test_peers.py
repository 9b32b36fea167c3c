"""What the primitive is measured against does the job that it is measured at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.peers import mezo
from tests.tolerances import sampling_error

ROOT = Path(__file__).resolve().parents[2]
COUNT = 40_000


def assert_normal(z: torch.Tensor) -> None:
    assert abs(float(z.mean())) < sampling_error(z.numel())
    assert abs(float(z.var()) - 1.0) < 2**0.5 * sampling_error(z.numel())


@pytest.mark.parametrize(
    "perturb",
    [mezo.perturb, lambda *given: mezo.perturb_compiled(*given, backend="eager")],
    ids=["published", "compiled"],
)
def test_mezo(perturb):
    """The seed gives the noise back, so that a pass of the opposite sign takes it off."""
    parameters = [torch.nn.Parameter(torch.zeros(COUNT), requires_grad=False) for _ in range(2)]
    perturb(parameters, 1, 1.0, 0.5)
    first, second = (p.detach().clone() / 0.5 for p in parameters)
    assert_normal(first)
    assert_normal(second)
    assert abs(float((first * second).mean())) < sampling_error(COUNT)
    perturb(parameters, 1, -1.0, 0.5)
    assert all(float(p.abs().max()) == 0.0 for p in parameters)


def test_tl_randn():
    """In Triton's interpreter, which a process has to ask for before it imports Triton."""
    pytest.importorskip("triton")
    code = f"""
import torch
from benchmarks.peers import tl_randn
from tests.benchmarks.test_peers import assert_normal
weights = [torch.ones({COUNT} + extra) for extra in (0, 7)]
tl_randn.perturb(weights, 1, 0.5)
for w in weights:
    assert_normal((w - 1) / 0.5)
assert not torch.equal(weights[0], weights[1][:{COUNT}])
narrow = torch.ones(5000, dtype=torch.bfloat16)
tl_randn.perturb([narrow], 1, 0.5)
near = (narrow.float() - weights[0][:5000]).abs() / weights[0][:5000].abs()
assert float(near.max()) <= 2**-7  # a bfloat16 step: the interpreter need not round to nearest
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
