"""64 seeds over 10 M bf16 weights, in one pass and in 64: what catching up costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import zorba_kernels as zk

SEEDS = 64


@pytest.fixture(scope="module")
def table() -> zk.ParamTable:
    shape = (1000, 1000)
    return zk.ParamTable(
        {f"layer.{i}": torch.randn(shape).mul_(0.02).to(torch.bfloat16) for i in range(10)}
    )


@pytest.mark.benchmark(group="64 seeds over 10 M bf16 weights")
@pytest.mark.parametrize("passes", [1, SEEDS])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def bench_seeds(
    measure: Callable[..., None], table: zk.ParamTable, distribution: str, passes: int
) -> None:
    def at_once() -> None:
        zk.add_noise_(table, range(SEEDS), [1e-5] * SEEDS, distribution)

    def one_by_one() -> None:
        for seed in range(SEEDS):
            zk.add_noise_(table, seed, 1e-5, distribution)

    measure(at_once if passes == 1 else one_by_one, table.numel, 2 * table.nbytes * passes, 3)
