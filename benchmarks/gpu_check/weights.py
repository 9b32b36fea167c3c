"""Weights of every dtype after a pass, and their fingerprints, are the same on every backend."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

import zorba_kernels as zk
from benchmarks.gpu_check.bits import assert_equal_bits
from benchmarks.gpu_check.identity import reference_chunk
from benchmarks.gpu_check.report import Report
from benchmarks.gpu_check.serving import fast_backends, fresh
from benchmarks.gpu_check.sizes import Sizes
from zorba_kernels.noise import DISTRIBUTIONS, ROUNDINGS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REFERENCE_CHUNK = 1 << 25  # elements

Weights = dict[str, Tensor]


def run(report: Report, device: torch.device, sizes: Sizes) -> None:
    rng = fresh(report)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    weights = {
        f"{i}.{dtype}": torch.randn(shape, generator=generator).mul_(0.02).to(dtype)
        for dtype in DTYPES
        for i, shape in enumerate(sizes.weights)
    }
    groups = {name: i % 3 for i, name in enumerate(weights)}
    there = {name: w.to(device) for name, w in weights.items()}
    programs = {"one term": one_term(rng), "rounds of terms": rounds_of_terms(rng)}
    for what, program in programs.items():
        for distribution in DISTRIBUTIONS:
            for rounding in ROUNDINGS:
                call = {**program, "distribution": distribution, "rounding": rounding}
                title = f"weights, {what}, {distribution}, {rounding}"
                one_program(report, device, title, weights, there, groups, call)


def one_term(rng: random.Random) -> dict[str, Any]:
    """What a perturbation is."""
    return {"seeds": rng.getrandbits(64), "coefs": 1e-3, "samples": rng.getrandbits(31)}


def rounds_of_terms(rng: random.Random) -> dict[str, Any]:
    """Two rounds, three groups with coefficients of their own, decay."""
    return {
        "seeds": [rng.getrandbits(64) for _ in range(3)],
        "samples": [rng.getrandbits(31) for _ in range(3)],
        "coefs": [[rng.gauss(0, 1e-3) for _ in range(3)] for _ in range(3)],
        "rounds": [2, 1],
        "decay": [[0.01, 0.0], [0.0, 0.0], [0.0, 0.002]],
    }


def one_program(
    report: Report,
    device: torch.device,
    title: str,
    weights: Weights,
    there: Weights,
    groups: dict[str, int],
    call: dict[str, Any],
) -> None:
    """The cpu backend gives what the others, the oracle on the device among them, must give."""
    with report.check(title, elements=sum(w.numel() for w in weights.values())) as facts:
        expected = {name: w.clone() for name, w in weights.items()}
        expected_table = zk.ParamTable(expected, groups=groups)
        zk.add_noise_(expected_table, **call, backend="cpu")
        fingerprint = zk.fingerprint(expected_table, backend="cpu")
        on_device = {name: w.to(device) for name, w in expected.items()}
        facts["backends"] = ["cpu", *fast_backends(device), "reference"]

        def compare(got: Weights, backend: str, where: str) -> None:
            for name, tensor in got.items():
                assert_equal_bits(tensor, on_device[name], f"{backend}, {where}, {name}")
            same = zk.fingerprint(zk.ParamTable(got, groups=groups), backend=backend)
            assert same == fingerprint, f"{backend}: fingerprint {same}, expected {fingerprint}"

        table = zk.ParamTable(there, groups=groups)
        with reference_chunk(REFERENCE_CHUNK):
            for backend in facts["backends"][1:]:
                apart = {name: torch.full_like(w, torch.nan) for name, w in there.items()}
                out = zk.ParamTable(apart, groups=groups)
                zk.add_noise(table, out, **call, backend=backend)
                compare(apart, backend, "out of place")
                if backend != "reference":  # which makes a copy anyway
                    inside = {name: w.clone() for name, w in there.items()}
                    place = zk.ParamTable(inside, groups=groups)
                    zk.add_noise_(place, **call, backend=backend)
                    compare(inside, backend, "in place")
