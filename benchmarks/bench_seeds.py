"""64 seeds in one pass over the weights against 64 passes: equal bits, and how much faster.

python -m pytest benchmarks/bench_seeds.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import zorba_kernels as zk
from benchmarks.bench import Bench
from benchmarks.gpu.bits import assert_equal_bits
from benchmarks.timing import Call, count_of, flat_weights
from zorba_kernels.noise import DISTRIBUTIONS

SEEDS = 64
FASTER = 10.0  # target of Rademacher on a GPU

pytestmark = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
Ways = dict[str, Callable[[zk.ParamTable], object]]


@pytest.fixture
def ways(bench: Bench, distribution: str) -> Callable[[str], Ways]:
    """Returns the same 64 terms, by backend, in the ways to add them."""
    seeds = [bench.rng.getrandbits(64) for _ in range(SEEDS)]
    coefs = [bench.rng.gauss(0.0, 1e-4) for _ in range(SEEDS)]

    def of(backend: str) -> Ways:
        def add(table: zk.ParamTable, seeds: object, coefs: object, **more: object) -> None:
            zk.add_noise_(table, seeds, coefs, distribution, backend=backend, **more)  # type: ignore[arg-type]

        def passes(table: zk.ParamTable) -> None:
            for seed, coef in zip(seeds, coefs, strict=True):
                add(table, seed, coef)

        return {
            "64 passes": passes,
            "one pass, one round": lambda table: add(table, seeds, coefs),
            "one pass, 64 rounds": lambda table: add(table, seeds, coefs, rounds=[1] * SEEDS),
        }

    return of


def bench_bits(bench: Bench, ways: Callable[[str], Ways]) -> None:
    """64 rounds of a term are 64 passes; a round of 64 terms is what the cpu backend makes."""
    shapes = bench.sizes.many_seeds()
    flat, _ = flat_weights(shapes, bench.device)

    def after(backend: str, way: str, place: torch.device) -> torch.Tensor:
        own, views = flat_weights(shapes, place, like=flat)
        ways(backend)[way](zk.ParamTable(views))
        return own.to(bench.device)

    bench.facts["elements"] = flat.numel()
    on_cpu = after("cpu", "one pass, one round", torch.device("cpu"))
    for b in bench.backends:
        passes, one, rounds = (after(b, way, bench.device) for way in ways(b))
        assert_equal_bits(rounds, passes, f"{b}, 64 rounds against 64 passes")
        assert_equal_bits(one, on_cpu, f"{b}, one round of 64 terms")


def bench_speed(bench: Bench, distribution: str, ways: Callable[[str], Ways]) -> None:
    _, weights = flat_weights(bench.sizes.many_seeds(), bench.device)
    table = zk.ParamTable(weights)
    for b in bench.backends:
        calls: dict[str, Call] = {n: lambda way=way: way(table) for n, way in ways(b).items()}
        times = bench.in_turn(calls)
        group = f"64 seeds over {count_of(table.numel)} bf16 weights, {b}, {distribution}"
        for name, t in times.items():
            faster = times["64 passes"].median / t.median
            bench.measure(group, name, ms=t.median * 1e3, times_as_fast=faster)
            if name != "64 passes" and distribution == "rademacher":
                unit = "times as fast as 64 passes"
                bench.target(f"{b}, 64 seeds in {name}", faster, unit, least=FASTER)
