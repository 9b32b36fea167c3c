"""An update of many rank-one terms: nanoseconds a weight, and its share of the fused multiply-adds.

    python -m pytest benchmarks/bench_terms.py

A term is a multiply-add a weight, so with many of them the machine's rate of these is the limit. A
product of two float32 matrices, timed in turn, tells that rate.
"""

from __future__ import annotations

import pytest
import torch

import zorba_kernels as zk
from benchmarks.bench import Bench
from benchmarks.sizes import count_of, squares

SIDE = 1024  # of the matrices of the product
TARGETS: dict[int, tuple[str, dict[str, float]]] = {
    40: ("ns_per_weight", {"most": 1.0}),
    320: ("of_multiply_adds", {"least": 0.5}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("terms", TARGETS)
def bench_terms(bench: Bench, dtype: torch.dtype, terms: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = bench.sizes.many_seeds()
    weights = {
        name: torch.randn(shape, generator=generator).to(bench.device, dtype)
        for name, shape in shapes.items()
    }
    table = zk.ParamTable(weights)
    seed, coefs = bench.rng.getrandbits(64), [bench.rng.gauss(0.0, 1e-4) for _ in range(terms)]
    square = squares(1, SIDE if bench.sizes.runs > 3 else 64)
    a = torch.randn(*square.values(), generator=generator).to(bench.device)
    for backend in bench.backends:

        def update(backend: str = backend) -> None:
            samples = range(terms)
            zk.add_noise_(table, [seed] * terms, coefs, "rank1", samples=samples, backend=backend)

        times = bench.in_turn({"product": lambda: a @ a, "update": update})
        rate = a.shape[0] ** 3 / times["product"].median  # multiply-adds a second
        each = times["update"].median / table.numel
        figures = {"ns_per_weight": each * 1e9, "of_multiply_adds": terms / each / rate}
        kind = str(dtype).removeprefix("torch.")
        group = f"rank-one terms over {count_of(table.numel)} weights, {backend}"
        bench.measure(group, f"{terms} terms, {kind}", **figures)
        what, bound = TARGETS[terms]
        bench.target(f"{terms} terms, {kind}, {backend}: {what}", figures[what], "", **bound)
