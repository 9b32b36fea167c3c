"""Weights of every dtype after a pass, and their fingerprints, are the same on every backend."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import zorba_kernels as zk
from benchmarks.bench import Bench, assert_equal_bits, reference_chunk
from zorba_kernels.noise import DISTRIBUTIONS

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REFERENCE_CHUNK = 1 << 25  # elements


def program(kind: str, rng: random.Random) -> dict[str, Any]:
    """Returns arguments of ``add_noise``: a perturbation, or rounds with groups and decay."""
    if kind == "one term":
        return {"seeds": rng.getrandbits(64), "coefs": 1e-3, "samples": rng.getrandbits(31)}
    return {
        "seeds": [rng.getrandbits(64) for _ in range(3)],
        "samples": [rng.getrandbits(31) for _ in range(3)],
        "coefs": [[rng.gauss(0, 1e-3) for _ in range(3)] for _ in range(3)],
        "rounds": [2, 1],
        "decay": [[0.01, 0.0], [0.0, 0.0], [0.0, 0.002]],
    }


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("kind", ["one term", "rounds of terms"])
def test_weights(bench: Bench, kind: str, distribution: str, rounding: str) -> None:
    """The cpu backend gives what the others, the oracle on the device among them, must give."""
    weights = {
        f"{i}.{dtype}": torch.randn(shape).mul_(0.02).to(dtype)
        for dtype in DTYPES
        for i, shape in enumerate(bench.sizes.weights)
    }
    there = {name: w.to(bench.device, copy=True) for name, w in weights.items()}
    call = {**program(kind, bench.rng), "distribution": distribution, "rounding": rounding}
    groups = {name: i % 3 for i, name in enumerate(weights)}
    expected_table = zk.ParamTable(weights, groups=groups)
    zk.add_noise_(expected_table, **call, backend="cpu")
    fingerprint = zk.fingerprint(expected_table, backend="cpu")
    expected = {name: w.to(bench.device) for name, w in weights.items()}
    bench.facts["elements"] = expected_table.numel
    bench.facts["backends"] = ["cpu", *bench.backends, "reference"]

    table = zk.ParamTable(there, groups=groups)
    for backend in [*bench.backends, "reference"]:
        # Not a number wherever a backend leaves something out.
        apart = {name: torch.full_like(w, torch.nan) for name, w in there.items()}
        inside = {name: w.clone() for name, w in there.items()}
        out, place = (zk.ParamTable(some, groups=groups) for some in (apart, inside))
        with reference_chunk(REFERENCE_CHUNK):
            zk.add_noise(table, out, **call, backend=backend)
            zk.add_noise_(place, **call, backend=backend)
            for where, some in (("out of place", out), ("in place", place)):
                for entry in some.entries:
                    title = f"{backend}, {where}, {entry.name}"
                    assert_equal_bits(entry.tensor, expected[entry.name], title)
                assert zk.fingerprint(some, backend=backend) == fingerprint, f"{backend}, {where}"
