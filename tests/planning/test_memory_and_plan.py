"""What a memory model counts, and what a finished plan says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("scipy")

from zorba.hf import find_blocks
from zorba.planning import MemoryModel, draw_plan, model_weights_memory, plan_blocks

from tests.hf.tiny import build, case_of


def test_all_blocks_may_take_less_than_their_sum_but_never_more() -> None:
    model = MemoryModel([10, 20], [1, 2], 30, whole=50)
    assert [model.bytes_of(mask) for mask in ([False, False], [True, False])] == [33, 42]
    assert model.bytes_of([True, True]) == 50
    for whole in (None, 70):
        assert MemoryModel([10, 20], [1, 2], 30, whole=whole).bytes_of([True, True]) == 60


@pytest.mark.parametrize(
    ("active", "idle", "names", "message"),
    [
        ([], [], None, "at least one block"),
        ([1], [1, 1], None, "idle has 2 values for 1 blocks"),
        ([1], [2], None, "2 bytes idle, more than 1 active"),
        ([-1], [0], None, "must not be negative"),
        ([math.nan], [0], None, "whole number"),
        ([1, 1], [0, 0], ["x", "x"], "two blocks are named 'x'"),
        ([1, 1], [0, 0], ["x"], "block_names has 1 values for 2 blocks"),
    ],
)
def test_memory_model_refuses(
    active: list[int], idle: list[int], names: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryModel(active, idle, block_names=names)


def test_render_is_the_map() -> None:
    plan = plan_blocks(MemoryModel([100, 100, 100], [0] * 3, 10), {"a": 310, "bb": 110})
    lines = plan.render().splitlines()
    assert "a         ###          3  310.00 / 310.00  100%" in lines
    assert "bb        #..          1  110.00 / 110.00  100%" in lines
    assert lines[-1] == "coverage  211"
    assert f"{plan.version:016x}" in lines[0]
    # Bytes are in the unit of the smallest budget.
    mib = plan_blocks(MemoryModel([1 << 20] * 2, [0] * 2), {"a": 2 << 30, "b": 3 << 19}).render()
    assert "memory / budget (MiB)" in mib
    assert "1.00 / 1.50   67%" in mib


def test_version_follows_names_and_mask_only() -> None:
    plan = plan_blocks(MemoryModel([100] * 4, [0] * 4), {"a": 400, "b": 300})
    assert replace(plan, clients=("a", "c")).version != plan.version
    assert replace(plan, budgets=(1, 2), seconds=0.0).version == plan.version
    other = replace(plan, chosen=len(plan.front) - 1)
    assert other.version != plan.version
    assert other.point.f2 < plan.point.f2


def test_version_is_frozen() -> None:
    # Logs and messages carry it, so it must not change between releases.
    plan = plan_blocks(MemoryModel([1, 1], [0, 0], block_names=["x", "y"]), {"a": 2, "b": 2})
    assert plan.mask.all()
    assert plan.version == 0xEC29FA2DBE7287E2


def test_active_blocks_by_name_and_a_mask_that_nobody_changes() -> None:
    plan = plan_blocks(MemoryModel([1, 1], [0, 0], block_names=["x", "y"]), {"a": 2})
    assert plan.active_blocks("a") == ("x", "y")
    with pytest.raises(KeyError):
        plan.active_blocks("z")
    with pytest.raises(ValueError, match="read-only"):
        plan.mask[0, 0] = False


@pytest.mark.parametrize(("clients", "wide"), [(2, False), (10, True), (30, True)])
def test_picture(tmp_path: Path, clients: int, wide: bool) -> None:
    pytest.importorskip("matplotlib")
    plan = plan_blocks(MemoryModel([100, 200, 200, 200], [0] * 4), [700] * clients)
    assert (plan.front[-1].f1 > 4 * plan.front[0].f1) == wide
    draw_plan(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "mixtral"])
def test_weights_are_those_of_the_model(kind: str) -> None:
    model = build(case_of(kind)).to(torch.bfloat16)
    blocks = find_blocks(model)
    total = sum(p.nbytes for p in model.parameters())
    resident = model_weights_memory(model)
    assert resident.block_names == tuple(block.name for block in blocks)
    assert resident.bytes_of([True, False, False]) == resident.bytes_of([True] * 3) == total
    # Its other blocks are frozen, and idle everywhere.
    last = model_weights_memory(model, blocks[-1:], idle="offload")
    buffers = 2 * max(block.nbytes for block in blocks)
    outside = total - sum(block.nbytes for block in blocks)
    assert (last.active, last.idle) == ((blocks[-1].nbytes,), (0,))
    assert last.fixed == outside + buffers
    with pytest.raises(ValueError, match="idle must be one of"):
        model_weights_memory(model, idle="disk")  # type: ignore[arg-type]
