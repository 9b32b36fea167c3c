"""A whole step on a model of SmolLM2-135M's size, over its two forwards and beside MeZO's.

    python -m pytest benchmarks/bench_step.py

Weights are random: neither time nor memory depends on their values. 16 sequences of 32
tokens; the loss reads the logits of the last position alone, as prompt-based classification does.
Two forwards run in turn with every step, since a shared machine drifts by more than the difference
that is sought: the median ratio of a step to the forwards beside it is what counts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zorba import ZerothOrderSGD

from benchmarks.bench import Bench, peak_bytes
from benchmarks.peers import mezo
from benchmarks.sizes import random_llama, smollm_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = torch.randint(0, 49152, (16, 32), generator=torch.Generator().manual_seed(1))
BATCH = (IDS.to(DEVICE), torch.arange(16, device=DEVICE) % 2)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MOST_OVER_FORWARDS = 1.06  # target of the fused placement
MOST_MIB = 2  # target of its memory above a forward's
SCHEMES: dict[str, dict[str, Any]] = {
    "scratch": {},
    "inplace": {"placement": "inplace"},
    "two passes": {"placement": "inplace", "two_pass": True},
    "last 6 blocks": {"blocks": "last:6"},
}


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(dtype: str) -> Any:
    return random_llama(smollm_config(), DTYPES[dtype], DEVICE)


@pytest.fixture(scope="module")
def losses(model: Any) -> Any:
    """A closure that returns the loss of each sequence of a batch, by default of ``BATCH``."""

    def each(batch: tuple[torch.Tensor, torch.Tensor] = BATCH) -> torch.Tensor:
        ids, answers = batch
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1, :2]
        return torch.nn.functional.cross_entropy(logits.float(), answers, reduction="none")

    return each


@pytest.fixture(scope="module")
def closure(losses: Any) -> Any:
    return lambda: losses().mean()


@torch.no_grad()
def two_forwards(closure: Any) -> None:
    closure()
    closure()


def measure(bench: Bench, dtype: str, closure: Any, name: str, step: Any) -> dict[str, float]:
    times = bench.in_turn({"forwards": lambda: two_forwards(closure), "step": step})
    forwards, of_step = times["forwards"], times["step"]
    ratios = {
        "over_forwards": of_step.over(forwards),
        "fastest": min(of_step.each) / min(forwards.each),
    }
    peak = peak_bytes(step, DEVICE) / 2**20
    group = f"step of a 135 M model, {dtype}, 16 x 32 tokens"
    bench.measure(group, name, ms=of_step.median * 1e3, **ratios, peak_mib=peak)
    return {**ratios, "peak_mib": peak}


def bench_two_forwards(bench: Bench, dtype: str, closure: Any) -> None:
    """Against themselves: how far a ratio is off by chance."""
    measure(bench, dtype, closure, "two forwards", lambda: two_forwards(closure))


def bench_mezo(bench: Bench, dtype: str, model: Any, closure: Any) -> None:
    weights = list(model.parameters())
    measure(bench, dtype, closure, "MeZO", lambda: mezo.step(weights, closure, 1, 1e-3, 1e-7))


@pytest.mark.filterwarnings("ignore:placement='fused'")  # the embedding, also the head, stays
def bench_fused(bench: Bench, dtype: str, model: Any, losses: Any) -> None:
    """Own directions: two of eight sequences each."""
    optimizer = ZerothOrderSGD(model, lr=1e-7, placement="fused", directions="own")
    name = "fused, own directions, both signs in a batch"
    measure(bench, dtype, losses, name, lambda: optimizer.step(losses, BATCH))
    name = "fused, own directions"
    found = measure(bench, dtype, losses, name, lambda: optimizer.step(losses))
    alone = peak_bytes(lambda: two_forwards(losses), DEVICE) / 2**20
    over, more = found["over_forwards"], found["peak_mib"] - alone
    bench.target(f"{name}, {dtype}: over its forwards", over, "", most=MOST_OVER_FORWARDS)
    bench.target(f"{name}, {dtype}: memory above a forward", more, "MiB", most=MOST_MIB)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def bench_zorba(
    bench: Bench, dtype: str, model: Any, closure: Any, distribution: Any, scheme: str
) -> None:
    optimizer = ZerothOrderSGD(model, lr=1e-7, distribution=distribution, **SCHEMES[scheme])
    measure(bench, dtype, closure, f"{scheme}, {distribution}", lambda: optimizer.step(closure))
    optimizer.flush()
