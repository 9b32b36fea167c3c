"""One pass over 100 M bf16 weights: the primitive against MeZO's pass and a plain pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import zorba_kernels as zk
from benchmarks.peers import mezo

TENSORS = 100
SIDE = 1000
WEIGHTS = TENSORS * SIDE * SIDE
BYTES = 2 * 2 * WEIGHTS  # read once, written once


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return {
        f"layer.{i}.weight": torch.randn(SIDE, SIDE).mul_(0.02).to(torch.bfloat16)
        for i in range(TENSORS)
    }


@pytest.mark.benchmark(group="add_noise_ bf16, 100 M weights")
def bench_plain_pass(measure: Callable[..., None], weights: dict[str, torch.Tensor]) -> None:
    measure(lambda: [w.add_(1e-3) for w in weights.values()], WEIGHTS, BYTES)


@pytest.mark.benchmark(group="add_noise_ bf16, 100 M weights")
def bench_mezo_pass(measure: Callable[..., None], weights: dict[str, torch.Tensor]) -> None:
    measure(lambda: mezo.perturb(weights.values(), 1, 1.0, 1e-3), WEIGHTS, BYTES, rounds=3)


@pytest.mark.benchmark(group="add_noise_ bf16, 100 M weights")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def bench_add_noise(
    measure: Callable[..., None],
    weights: dict[str, torch.Tensor],
    distribution: str,
    rounding: str,
) -> None:
    table = zk.ParamTable(weights)
    measure(lambda: zk.add_noise_(table, 1, 1e-3, distribution, rounding), WEIGHTS, BYTES)


@pytest.mark.benchmark(group="64 seeds in one pass, 10 M bf16 weights")
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("passes", [1, 64])
def bench_many_seeds(
    measure: Callable[..., None],
    weights: dict[str, torch.Tensor],
    distribution: str,
    passes: int,
) -> None:
    few = dict(list(weights.items())[:10])
    table = zk.ParamTable(few)
    seeds = list(range(64))
    coefs = [1e-5] * 64

    def one_pass() -> None:
        zk.add_noise_(table, seeds, coefs, distribution)

    def many_passes() -> None:
        for seed in seeds:
            zk.add_noise_(table, seed, 1e-5, distribution)

    call = one_pass if passes == 1 else many_passes
    measure(call, table.numel, 2 * table.nbytes * passes, rounds=3)


@pytest.mark.benchmark(group="fingerprint, 100 M bf16 weights")
def bench_fingerprint(measure: Callable[..., None], weights: dict[str, torch.Tensor]) -> None:
    table = zk.ParamTable(weights)
    measure(lambda: zk.fingerprint(table), WEIGHTS, BYTES // 2)
