"""What a step allocates above the forward that it is made of, counted by torch's allocator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from zorba import ZerothOrderSGD

from benchmarks.bench import peak_bytes
from benchmarks.peers import mezo

MIB = 1 << 20


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """An embedding of 6 MiB, so that a mebibyte more is none of the rest."""
    config = LlamaConfig(
        vocab_size=12_000, hidden_size=256, intermediate_size=2048, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@pytest.fixture
def closure(model: LlamaForCausalLM) -> Callable[[], torch.Tensor]:
    ids = torch.arange(16).reshape(2, 8)
    return lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1).logits.float().mean()


def bytes_of(parameters: Any) -> int:
    return max(p.numel() * p.element_size() for p in parameters)


@pytest.mark.parametrize("two_pass", [False, True])
def test_in_place_allocates_nothing(
    model: LlamaForCausalLM, closure: Callable[[], torch.Tensor], two_pass: bool
) -> None:
    with torch.no_grad():
        inference = peak_bytes(closure)
    optimizer = ZerothOrderSGD(model, lr=1e-6, placement="inplace", two_pass=two_pass)
    assert peak_bytes(lambda: optimizer.step(closure)) <= inference + MIB


@pytest.mark.filterwarnings("ignore:placement='fused'")  # the embedding stays as it is
def test_fused_allocates_nothing(model: LlamaForCausalLM) -> None:
    ids = torch.arange(32).reshape(4, 8)

    def losses() -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits.float().mean(dim=(1, 2))

    with torch.no_grad():
        inference = peak_bytes(losses)
    optimizer = ZerothOrderSGD(
        model, lr=1e-6, placement="fused", directions="own", examples_per_direction=1
    )
    assert peak_bytes(lambda: optimizer.step(losses)) <= inference + MIB


@pytest.mark.parametrize(
    ("blocks", "distribution"), [("all", "gaussian"), ("last:1", "rademacher")]
)
def test_scratch_allocates_the_largest_active_parameter(
    model: LlamaForCausalLM, closure: Callable[[], torch.Tensor], blocks: str, distribution: Any
) -> None:
    with torch.no_grad():
        inference = peak_bytes(closure)
    optimizer = ZerothOrderSGD(model, lr=1e-6, blocks=blocks, distribution=distribution)
    largest = bytes_of(e.tensor for e in optimizer.placement.table.entries)

    def first_and_second() -> None:
        again = ZerothOrderSGD(model, lr=1e-6, blocks=blocks, distribution=distribution)
        again.step(closure)
        again.step(closure)

    # A step alone finds the scratch of the first one; a whole run allocates it.
    assert peak_bytes(lambda: optimizer.step(closure)) <= inference + MIB
    whole = peak_bytes(first_and_second)
    assert whole <= inference + largest + MIB
    assert whole >= largest, "or the scratch was not counted"


@pytest.mark.filterwarnings("ignore:the first evaluation")
def test_scratch_makes_the_rows_of_an_embedding_that_a_batch_reads() -> None:
    embed = torch.nn.Embedding(100_000, 64)  # 24 MiB
    layer = torch.nn.Linear(64, 64)
    model, ids = torch.nn.Sequential(embed, layer), torch.arange(512)

    def two_steps() -> None:
        optimizer = ZerothOrderSGD(model, lr=0.0)
        for _ in range(2):
            optimizer.step(lambda: model(ids).square().mean())

    assert peak_bytes(two_steps) <= MIB


def test_the_count_sees_what_mezo_allocates(
    model: LlamaForCausalLM, closure: Callable[[], torch.Tensor]
) -> None:
    """Or the tests above would prove nothing: its pass makes z, and more, of every parameter."""
    largest = bytes_of(model.parameters())
    weights = list(model.parameters())
    assert peak_bytes(lambda: mezo.perturb(weights, 1, 1.0, 1e-3)) >= 2 * largest
