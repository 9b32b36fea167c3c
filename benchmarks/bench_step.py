"""A whole step on a model of SmolLM2-135M's size, over its two forwards and beside MeZO's.

Weights are random: neither time nor memory depends on their values. bf16, 16 sequences of 32
tokens; the loss reads the logits of the last position alone, as prompt-based classification does.
Two forwards run in turn with every step, since a shared machine drifts by more than what is sought:
the ratio of a step to those beside it is what counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from zorba import ZerothOrderSGD
from zorba.machine import peak_bytes

from benchmarks.peers import mezo

ROUNDS = 9
GROUP = "step of a 135 M model, bf16, 16 x 32 tokens"
SCHEMES: dict[str, dict[str, Any]] = {
    "scratch": {},
    "inplace": {"placement": "inplace"},
    "two passes": {"placement": "inplace", "two_pass": True},
    "last 6 blocks": {"blocks": "last:6"},
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def closure(model: LlamaForCausalLM) -> Callable[[], torch.Tensor]:
    ids = torch.randint(0, 49152, (16, 32), generator=torch.Generator().manual_seed(1))
    answers = torch.arange(16) % 2

    def loss() -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1, :2]
        return torch.nn.functional.cross_entropy(logits.float(), answers)

    return loss


@pytest.fixture
def measure_step(
    benchmark: Any,
    measure: Any,
    model: LlamaForCausalLM,
    closure: Callable[[], torch.Tensor],
    over_forwards: list[str],
) -> Callable[..., None]:
    count = sum(p.numel() for p in model.parameters())

    def run(call: Callable[[], object]) -> None:
        benchmark.group = GROUP
        benchmark.extra_info["peak_mib"] = peak_bytes(call) / 2**20
        forwards: list[float] = []

        def beside() -> None:
            started = time.perf_counter()
            two_forwards(closure)
            forwards.append(time.perf_counter() - started)

        measure(call, count, 2 * 2 * count, rounds=ROUNDS, before=beside)
        steps, beside_them = benchmark.stats.stats.data, forwards[-ROUNDS:]
        ratio = statistics.median(s / f for s, f in zip(steps, beside_them, strict=True))
        fastest = min(steps) / min(beside_them)
        benchmark.extra_info["over_forwards"] = {"median": ratio, "fastest": fastest}
        over_forwards.append(f"{benchmark.name:44}{ratio:10.3f}{fastest:10.3f}")

    return run


@pytest.fixture(scope="module")
def over_forwards() -> Iterator[list[str]]:
    """Lines of a table, printed when all is measured (``-s`` shows it)."""
    lines: list[str] = []
    yield lines
    print("\n".join([f"\n{'over two forwards in turn':44}{'median':>10}{'fastest':>10}", *lines]))


def two_forwards(closure: Callable[[], torch.Tensor]) -> None:
    with torch.no_grad():
        closure()
        closure()


def bench_two_forwards(measure_step: Any, closure: Callable[[], torch.Tensor]) -> None:
    measure_step(lambda: two_forwards(closure))


def bench_mezo(
    measure_step: Any, model: LlamaForCausalLM, closure: Callable[[], torch.Tensor]
) -> None:
    weights = list(model.parameters())
    measure_step(lambda: mezo.step(weights, closure, 1, 1e-3, 1e-7))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def bench_zorba(
    measure_step: Any,
    model: LlamaForCausalLM,
    closure: Callable[[], torch.Tensor],
    distribution: Any,
    scheme: str,
) -> None:
    optimizer = ZerothOrderSGD(model, lr=1e-7, distribution=distribution, **SCHEMES[scheme])
    measure_step(lambda: optimizer.step(closure))
    optimizer.flush()
