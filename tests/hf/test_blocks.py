"""Names of blocks, and prefixes in front of them. Which blocks are found: test_architectures.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from zorba.hf import extend_prefix, find_blocks, run_prefix, run_suffix

from tests.hf.tiny import build, case_of
from tests.tolerances import bound


class Layer(GradientCheckpointingLayer):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)


class Group(Layer):
    pass


class Odd(nn.Module):
    """Lists that are no blocks, and a config within the config."""

    def __init__(self, **lists: list[nn.Module]) -> None:
        super().__init__()
        text = SimpleNamespace(model_type="text", num_hidden_layers=3)
        self.config = SimpleNamespace(model_type="odd", text_config=text)
        for name, members in lists.items():
            setattr(self, name, nn.ModuleList(members))


LLAMA = case_of("llama")
GEMMA = case_of("gemma3_text")


def test_two_of_three_signs_make_a_block() -> None:
    """Marked, as deep as the config says, large: one of them alone is an accident."""
    one_sign = {
        "norms": [nn.LayerNorm(4) for _ in range(3)],
        "stem": [Layer(4) for _ in range(2)],
        "towers": [nn.Linear(60, 60) for _ in range(4)],
    }
    two_signs = {
        "layers": [Layer(4) for _ in range(3)],
        "plain": [nn.Linear(60, 60) for _ in range(3)],
        "groups": [Group(60) for _ in range(2)],
    }
    for name, members in two_signs.items():
        blocks = find_blocks(Odd(**one_sign, **{name: members}))
        assert [b.name for b in blocks] == [f"{name}.{i}" for i in range(len(members))]


def test_one_sign_is_enough_where_no_list_shows_two() -> None:
    small = Odd(big=[nn.Linear(90, 90)], few=[nn.Linear(4, 4) for _ in range(3)])
    assert [b.name for b in find_blocks(small)] == ["few.0", "few.1", "few.2"]
    bare = nn.Sequential(nn.ModuleList(nn.Linear(4, 4) for _ in range(5)))
    assert len(find_blocks(bare)) == 5


def test_wrappers_do_not_show_in_names() -> None:
    model = build(LLAMA)
    wrapped = nn.DataParallel(model)
    assert [b.name for b in find_blocks(wrapped)] == [b.name for b in find_blocks(model)]


@pytest.mark.parametrize("door", [0, 1, 2])
def test_prefix_and_suffix_equal_the_whole_forward(door: int, generator: torch.Generator) -> None:
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
            limit = bound("padded logits")
            torch.testing.assert_close(mine, whole, rtol=limit, atol=limit)


def test_models_that_have_no_prefix_there_are_refused() -> None:
    """Gemma 3 hands sliding and full layers different masks: one prefix cannot serve both."""
    with pytest.raises(ValueError, match="never reached"):
        run_prefix(build(LLAMA), nn.Linear(2, 2), [[1, 2]], [0])
    model = build(GEMMA)
    with pytest.raises(ValueError, match="several types"):
        run_prefix(model, find_blocks(model)[1].module, [[1, 2]], [0])
