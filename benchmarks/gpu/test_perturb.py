"""A linear layer whose noise differs by row of the batch, against the product alone.

What ``zk.perturbed_linear`` adds to a forward is one pass over the layer's input and output.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import zorba_kernels as zk
from benchmarks.bench import Bench, Times

pytestmark = pytest.mark.gpu

LEAST = 0.9  # of the plain layer's tokens a second: EGGROLL reports 0.91 for whole models
STEP = 2.0**-7  # of a bfloat16, relative
Noise = dict[str, int | Tensor]


def test_perturb(bench: Bench) -> None:
    for inputs, outputs in bench.sizes.layers:
        weight = normals(bench, outputs, inputs) * inputs**-0.5
        for rows, tokens in bench.sizes.batches:
            x, noise = normals(bench, rows, tokens, inputs), noise_of(bench, rows)
            calls = {
                b: partial(zk.perturbed_linear, x, weight, **noise, backend=b)  # type: ignore[arg-type]
                for b in bench.backends
            }
            # A speed counts for nothing where the values are wrong.
            for b in bench.backends:
                check(x, weight, noise, b)
            plain = partial(linear, x, weight)
            times = bench.in_turn({"product alone": plain, **calls})
            report(bench, f"{rows} x {tokens} tokens, {inputs} to {outputs}, bf16", x, times)


def check(x: Tensor, weight: Tensor, noise: Noise, backend: str) -> None:
    """One row of the batch against the oracle: sums have another order, so to a step of bf16."""
    row = {k: v[:1] if isinstance(v, Tensor) else v for k, v in noise.items()}
    actual, expected = (
        zk.perturbed_linear(x[:1], weight, **row, backend=b)  # type: ignore[arg-type]
        for b in (backend, "reference")
    )
    off = (actual.float() - expected.float()).abs().max()
    most = STEP * float(expected.abs().max())
    assert float(off) <= most, f"{backend} is {float(off)} off the oracle, at most {most} is right"


def report(bench: Bench, group: str, x: Tensor, times: dict[str, Times]) -> None:
    plain = times["product alone"]
    for name, t in times.items():
        bench.measure(
            group, name,
            ms=t.median * 1e3,
            times_the_product=t.median / plain.median,
            of_inference=plain.median / t.median,
            m_tokens_per_s=x.shape[0] * x.shape[1] / t.median / 1e6,
        )  # fmt: skip
        if name != "product alone":
            figure = plain.median / t.median
            unit = "of the plain layer's throughput"
            bench.target(f"{name}, {group}", figure, unit, least=LEAST)


def normals(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=bench.device)


def noise_of(bench: Bench, rows: int) -> Noise:
    """Each row has a sample of its own, and a size that shows in bf16."""
    samples = torch.tensor([bench.rng.getrandbits(31) for _ in range(rows)])
    scale = torch.tensor([bench.rng.choice((-1.0, 1.0)) * 0.01 for _ in range(rows)])
    return {
        "seed": bench.rng.getrandbits(64), "stream": zk.noise.stream_of("w"),
        "samples": samples.to(bench.device), "scale": scale.to(bench.device),
    }  # fmt: skip
