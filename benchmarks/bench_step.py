"""A whole step on a model of SmolLM2-135M's size, over its two forwards and beside MeZO's.

    python -m pytest benchmarks/bench_step.py

Weights are random: neither time nor memory depends on their values. bf16, 16 sequences of 32
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
GROUP = "step of a 135 M model, bf16, 16 x 32 tokens"
SCHEMES: dict[str, dict[str, Any]] = {
    "scratch": {},
    "inplace": {"placement": "inplace"},
    "two passes": {"placement": "inplace", "two_pass": True},
    "last 6 blocks": {"blocks": "last:6"},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return random_llama(smollm_config(), torch.bfloat16, DEVICE)


@pytest.fixture(scope="module")
def closure(model: Any) -> Any:
    ids = torch.randint(0, 49152, (16, 32), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    answers = torch.arange(16, device=DEVICE) % 2

    def loss() -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1, :2]
        return torch.nn.functional.cross_entropy(logits.float(), answers)

    return loss


@torch.no_grad()
def two_forwards(closure: Any) -> None:
    closure()
    closure()


def measure(bench: Bench, closure: Any, name: str, step: Any) -> None:
    times = bench.in_turn({"forwards": lambda: two_forwards(closure), "step": step})
    forwards, of_step = times["forwards"], times["step"]
    ratios = {
        "over_forwards": of_step.over(forwards),
        "fastest": min(of_step.each) / min(forwards.each),
    }
    peak = peak_bytes(step, DEVICE) / 2**20
    bench.measure(GROUP, name, ms=of_step.median * 1e3, **ratios, peak_mib=peak)


def bench_two_forwards(bench: Bench, closure: Any) -> None:
    """Against themselves: how far a ratio is off by chance."""
    measure(bench, closure, "two forwards", lambda: two_forwards(closure))


def bench_mezo(bench: Bench, model: Any, closure: Any) -> None:
    weights = list(model.parameters())
    measure(bench, closure, "MeZO", lambda: mezo.step(weights, closure, 1, 1e-3, 1e-7))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def bench_zorba(bench: Bench, model: Any, closure: Any, distribution: Any, scheme: str) -> None:
    optimizer = ZerothOrderSGD(model, lr=1e-7, distribution=distribution, **SCHEMES[scheme])
    measure(bench, closure, f"{scheme}, {distribution}", lambda: optimizer.step(closure))
    optimizer.flush()
