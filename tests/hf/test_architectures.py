"""Tiny models of every architecture in ``tiny.py``: blocks found, steps right, weights exact.

Losses are compared for equality: the same weights, batch and shapes on one thread.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from zorba import ZerothOrderSGD
from zorba.hf import find_blocks

from tests.hf.steps import check_step, explicit_scalar
from tests.hf.tiny import CASES, Case, build, loss_of

LR, EPS = 1e-3, 2**-6  # such an eps moves losses by more than the rounding of bfloat16

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


every_architecture = pytest.mark.parametrize("case", CASES, ids=str)


@every_architecture
def test_blocks(case: Case) -> None:
    model = build(case)
    blocks = find_blocks(model)
    assert [block.name for block in blocks] == case.names
    for block in blocks:
        assert block.module is model.get_submodule(block.name)
    names = [name for block in blocks for name in block.parameters]
    assert len(names) == len(set(names))
    assert set(names) <= set(dict(model.named_parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_architecture
def test_a_step_is_right(case: Case, dtype: torch.dtype) -> None:
    check_step(build(case, dtype), lambda model: loss_of(model, case), LR, EPS)


@every_architecture
def test_in_place_sees_the_same_losses(case: Case) -> None:
    model = build(case)
    untouched = copy.deepcopy(model)
    optimizer = ZerothOrderSGD(model, lr=LR, eps=EPS, placement="inplace")
    optimizer.step(lambda: loss_of(model, case))
    report = optimizer.last_step
    assert report is not None
    wanted = explicit_scalar(untouched, lambda m: loss_of(m, case), report.seed, EPS, in_place=True)
    assert report.scalars == (wanted,)


# --- What is refused, by name --------------------------------------------------------------------


LISTS = {"emb_dim": 32, "n_heads": 4, "n_layers": 3}


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        # Zamba's attention is one module's weights in several layers.
        (
            "zamba",
            {"num_hidden_layers": 12, "hidden_size": 32, "num_attention_heads": 4},
            "shared_transf.self_attn.q_proj.weight",
        ),
        ("xlm", LISTS, "(attentions, layer_norm1, ffns, layer_norm2)"),
        ("flaubert", LISTS, "(attentions, layer_norm1, ffns, layer_norm2)"),
    ],
)
def test_shared_or_scattered_blocks_are_refused(
    kind: str, changes: dict[str, int], told: str
) -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(kind, **changes))
    with pytest.raises(ValueError, match=rf"\(model type {kind}\)") as refused:
        find_blocks(model)
    assert told in str(refused.value)
    assert "as a whole" in str(refused.value)  # what to do instead


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no transformer blocks found in Linear"):
        find_blocks(nn.Linear(3, 3))


# --- The list in the documentation ---------------------------------------------------------------


def table() -> str:
    kinds: dict[tuple[str, str], list[str]] = {}
    for case in CASES:
        lists = ", ".join(f"`{item.split(':')[0]}`" for item in case.blocks.split())
        kinds.setdefault((case.auto, lists), []).append(case.kind)
    lines = ["| Built with | Model types | Lists of blocks |", "|---|---|---|"]
    for (auto, lists), names in kinds.items():
        lines.append(f"| `AutoModel{auto}` | {', '.join(names)} | {lists} |")
    return "\n".join(lines)


def test_the_documented_list_is_what_is_tested() -> None:
    assert table() in PAGE.read_text(), f"docs/models.md must contain:\n{table()}"
