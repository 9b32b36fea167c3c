"""One pass over 100 M bf16 weights: the primitive against MeZO's pass and a plain pass.

Twice, because MeZO's temporaries depend on the tensors: matrices of 1000 x 1000, which stay in the
cache, and of 4096 x 4096, as in a model of 7 B weights, where each temporary is mapped anew.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import zorba_kernels as zk
from benchmarks.peers import mezo

Weights = dict[str, torch.Tensor]
SIDES = {1000: 100, 4096: 6}  # side of the matrices, how many of them


@pytest.fixture(scope="module", params=SIDES)
def weights(request: pytest.FixtureRequest) -> Weights:
    side = request.param
    return {
        f"layer.{i}.weight": torch.randn(side, side).mul_(0.02).to(torch.bfloat16)
        for i in range(SIDES[side])
    }


@pytest.fixture
def one_pass(
    benchmark: object, measure: Callable[..., None], weights: Weights
) -> Callable[..., None]:
    """Times a pass that reads and writes every weight once."""
    side = next(iter(weights.values())).shape[0]
    count = sum(w.numel() for w in weights.values())
    benchmark.group = f"one pass over {count / 1e6:.0f} M bf16 weights, {side} x {side}"  # type: ignore[attr-defined]
    return lambda call, rounds=15: measure(call, count, 2 * 2 * count, rounds)


def bench_plain(one_pass: Callable[..., None], weights: Weights) -> None:
    one_pass(lambda: [w.add_(1e-3) for w in weights.values()])


def bench_mezo(one_pass: Callable[..., None], weights: Weights) -> None:
    one_pass(lambda: mezo.perturb(weights.values(), 1, 1.0, 1e-3), rounds=5)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def bench_zorba(
    one_pass: Callable[..., None], weights: Weights, distribution: str, rounding: str
) -> None:
    table = zk.ParamTable(weights)
    one_pass(lambda: zk.add_noise_(table, 1, 1e-3, distribution, rounding))


def bench_fingerprint(benchmark: object, measure: Callable[..., None], weights: Weights) -> None:
    table = zk.ParamTable(weights)
    benchmark.group = "fingerprint of 100 M bf16 weights"  # type: ignore[attr-defined]
    measure(lambda: zk.fingerprint(table), table.numel, table.nbytes)
