"""64 seeds in one pass over the weights against 64 passes: equal bits, and how much faster.

python -m pytest benchmarks/bench_seeds.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import zorba_kernels as zk
from benchmarks.bench import Bench, Call, assert_equal_bits
from benchmarks.sizes import count_of, flat_weights
from zorba_kernels.noise import DISTRIBUTIONS

SEEDS = 64
FASTER = 10.0  # target of Rademacher on a GPU

pytestmark = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
Ways = Callable[[zk.ParamTable, str], dict[str, Call]]


@pytest.fixture
def ways(bench: Bench, distribution: str) -> Ways:
    """Returns the ways to add the same 64 terms to a table with a backend."""
    seeds = [bench.rng.getrandbits(64) for _ in range(SEEDS)]
    coefs = [bench.rng.gauss(0.0, 1e-4) for _ in range(SEEDS)]

    def of(table: zk.ParamTable, backend: str) -> dict[str, Call]:
        def add(*terms: object, **more: object) -> None:
            zk.add_noise_(table, *terms, distribution, backend=backend, **more)  # type: ignore[arg-type]

        return {
            "64 passes": lambda: [add(*term) for term in zip(seeds, coefs, strict=True)],
            "one pass, one round": lambda: add(seeds, coefs),
            "one pass, 64 rounds": lambda: add(seeds, coefs, rounds=[1] * SEEDS),
        }

    return of


def bench_bits(bench: Bench, ways: Ways) -> None:
    """64 rounds of a term are 64 passes; a round of 64 terms is what the cpu backend makes."""
    shapes = bench.sizes.many_seeds()
    flat, _ = flat_weights(shapes, bench.device)

    def after(way: str, backend: str, place: torch.device) -> torch.Tensor:
        own, views = flat_weights(shapes, place, like=flat)
        ways(zk.ParamTable(views), backend)[way]()
        return own.to(bench.device)

    bench.facts["elements"] = flat.numel()
    on_cpu = after("one pass, one round", "cpu", torch.device("cpu"))
    names = ("64 passes", "one pass, one round", "one pass, 64 rounds")
    for b in bench.backends:
        passes, one, rounds = (after(name, b, bench.device) for name in names)
        assert_equal_bits(rounds, passes, f"{b}, 64 rounds against 64 passes")
        assert_equal_bits(one, on_cpu, f"{b}, one round of 64 terms")


def bench_speed(bench: Bench, distribution: str, ways: Ways) -> None:
    _, weights = flat_weights(bench.sizes.many_seeds(), bench.device)
    table = zk.ParamTable(weights)
    for b in bench.backends:
        times = bench.in_turn(ways(table, b))
        group = f"64 seeds over {count_of(table.numel)} bf16 weights, {b}, {distribution}"
        for name, t in times.items():
            faster = times["64 passes"].median / t.median
            bench.measure(group, name, ms=t.median * 1e3, times_as_fast=faster)
            if name != "64 passes" and distribution == "rademacher":
                unit = "times as fast as 64 passes"
                bench.target(f"{b}, 64 seeds in {name}", faster, unit, least=FASTER)
