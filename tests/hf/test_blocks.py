"""Names of blocks, and prefixes in front of them. Which blocks are found: test_architectures.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zorba.hf import extend_prefix, find_blocks, run_prefix, run_suffix

from tests.hf.tiny import CASES, build

LLAMA = next(case for case in CASES if case.kind == "llama")
GEMMA = next(case for case in CASES if case.kind == "gemma3_text")


def test_names_are_those_of_the_whole_model() -> None:
    model = build(LLAMA)
    names = set(dict(model.named_parameters()))
    for block in find_blocks(model):
        assert set(block.parameters) <= names
        assert block.numel == sum(p.numel() for p in block.module.parameters())


def test_wrappers_do_not_show_in_names() -> None:
    model = build(LLAMA)
    wrapped = nn.DataParallel(model)
    assert [b.name for b in find_blocks(wrapped)] == [b.name for b in find_blocks(model)]


@pytest.mark.parametrize("door", [0, 1, 2])
def test_prefix_and_suffix_equal_the_whole_forward(door: int, generator: torch.Generator) -> None:
    """Row by row and unpadded, the model gives the logits that the padded, cut run gives."""
    model = build(LLAMA)
    lengths = [3, 7, 5]
    rows = [torch.randint(1, 100, (n,), generator=generator).tolist() for n in lengths]
    blocks = [block.module for block in find_blocks(model)]
    head = model.get_output_embeddings().weight.detach()[[5, 9]]
    with torch.no_grad():
        prefix = run_prefix(model, blocks[door], rows, [0, 1, 0])
        logits = run_suffix(prefix, blocks[door:], model.model.norm, head)
        if door == 0:
            later = run_suffix(
                extend_prefix(prefix, blocks[:2]), blocks[2:], model.model.norm, head
            )
            assert torch.equal(later, logits)
        for row, mine in zip(rows, logits, strict=True):
            whole = model(torch.tensor([row])).logits[0, -1, [5, 9]]
            # Padding changes the shapes of matrix products, so the order of float32 sums.
            torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-5)


def test_a_block_that_is_never_reached_is_refused() -> None:
    model = build(LLAMA)
    with pytest.raises(ValueError, match="never reached"):
        run_prefix(model, nn.Linear(2, 2), [[1, 2]], [0])


def test_prefix_of_mixed_layer_types_is_refused() -> None:
    """Gemma 3 hands sliding and full layers different masks: one prefix cannot serve both."""
    model = build(GEMMA)
    with pytest.raises(ValueError, match="several types"):
        run_prefix(model, find_blocks(model)[1].module, [[1, 2]], [0])
