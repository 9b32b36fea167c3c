"""What a memory model counts, and what a finished plan says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("scipy")

from zorba.hf import find_blocks
from zorba.planning import (
    MemoryModel,
    draw_plan,
    mask_version,
    model_weights_memory,
    plan_blocks,
    weights_memory,
)

from tests.hf.tiny import build, case_of


def test_resident_counts_idle_blocks_as_active_ones() -> None:
    model = weights_memory([10, 20, 30], fixed_parameters=5, dtype=torch.float32, overhead=7)
    assert model.active == model.idle == (40, 80, 120)
    assert model.fixed_bytes(["a", "b"]) == (27, 27)


def test_offload_adds_a_double_buffer_of_the_two_largest() -> None:
    model = weights_memory({"x": 10, "y": 30, "z": 20}, idle="offload", overhead={"a": 1, "b": 2})
    assert model.block_names == ("x", "y", "z")
    assert model.active == (20, 60, 40)
    assert model.idle == (0, 0, 0)
    assert model.fixed_bytes(["a", "b"]) == (101, 102)


@pytest.mark.parametrize("whole", [50, [50, 50], {"a": 50, "b": 50}], ids=["one", "each", "named"])
def test_all_blocks_may_take_less_than_their_sum_but_never_more(whole: object) -> None:
    model = MemoryModel([10, 20], [0, 0], {"a": 30, "b": 10}, whole=whole)  # type: ignore[arg-type]
    assert model.all_active_bytes(["a", "b"]) == (50, 40)
    assert MemoryModel([10, 20], [0, 0], 5).all_active_bytes(["a", "b"]) == (35, 35)


@pytest.mark.parametrize(
    ("active", "idle", "names", "message"),
    [
        ([], [], None, "at least one block"),
        ([1], [1, 1], None, "idle has 2 blocks"),
        ([1], [2], None, "2 bytes idle, more than 1 active"),
        ([-1], [0], None, "must not be negative"),
        ([math.nan], [0], None, "whole number"),
        ([1, 1], [0, 0], ["x", "x"], "two blocks are named 'x'"),
        ([1, 1], [0, 0], ["x"], "1 names for 2 blocks"),
    ],
)
def test_memory_model_refuses(
    active: list[int], idle: list[int], names: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryModel(active, idle, block_names=names)


def test_weights_memory_refuses_an_unknown_policy() -> None:
    with pytest.raises(ValueError, match="resident"):
        weights_memory([1], idle="disk")  # type: ignore[arg-type]


def test_render_is_the_map() -> None:
    plan = plan_blocks(MemoryModel([100, 100, 100], [0] * 3, 10), {"a": 310, "bb": 110})
    lines = plan.render().splitlines()
    assert "a         ###          3  310.00 / 310.00  100%" in lines
    assert "bb        #..          1  110.00 / 110.00  100%" in lines
    assert lines[-1] == "coverage  211"
    assert f"{plan.version:016x}" in lines[0]


def test_version_follows_names_and_mask_only() -> None:
    plan = plan_blocks(MemoryModel([100] * 4, [0] * 4), {"a": 400, "b": 300})
    assert plan.version == mask_version(plan.clients, plan.blocks, plan.mask.copy())
    assert plan.version != mask_version(("a", "c"), plan.blocks, plan.mask)
    other = plan.choose(len(plan.front) - 1)
    assert other.version != plan.version
    assert other.point.f2 < plan.point.f2
    with pytest.raises(IndexError):
        plan.choose(len(plan.front))


def test_version_is_frozen() -> None:
    # Logs and messages carry it, so it must not change between releases.
    plan = plan_blocks(MemoryModel([1, 1], [0, 0], block_names=["x", "y"]), {"a": 2, "b": 2})
    assert plan.mask.all()
    assert plan.version == 0xEC29FA2DBE7287E2


def test_mask_is_read_only() -> None:
    plan = plan_blocks(MemoryModel([1, 1], [0, 0]), [2, 2])
    with pytest.raises(ValueError, match="read-only"):
        plan.mask[0, 0] = False


def test_active_blocks_by_name() -> None:
    plan = plan_blocks(MemoryModel([1, 1], [0, 0], block_names=["x", "y"]), {"a": 2})
    assert plan.active_blocks("a") == ("x", "y")
    with pytest.raises(KeyError):
        plan.active_blocks("z")


@pytest.mark.parametrize(("clients", "wide"), [(2, False), (10, True), (30, True)])
def test_picture(tmp_path: Path, clients: int, wide: bool) -> None:
    pytest.importorskip("matplotlib")
    plan = plan_blocks(MemoryModel([100, 200, 200, 200], [0] * 4), [700] * clients)
    assert (plan.front[-1].f1 > 4 * plan.front[0].f1) == wide
    draw_plan(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_bytes_are_read_in_the_unit_of_the_smallest_budget() -> None:
    plan = plan_blocks(MemoryModel([1 << 20] * 2, [0] * 2), {"a": 2 << 30, "b": 3 << 19})
    assert "memory / budget (MiB)" in plan.render()
    assert "1.00 / 1.50   67%" in plan.render()


def test_a_model_counts_its_blocks_and_the_rest() -> None:
    model = build(case_of("llama")).to(torch.bfloat16)
    blocks = find_blocks(model)
    outside = sum(p.numel() for p in model.parameters()) - sum(b.numel for b in blocks)
    sizes = {block.name: block.numel for block in blocks}
    for chosen in (blocks, blocks[-1:]):
        expected = weights_memory(
            {block.name: sizes[block.name] for block in chosen},
            fixed_parameters=outside,
            dtype=torch.bfloat16,
            idle="offload",
            overhead=7,
        )
        assert model_weights_memory(model, chosen, idle="offload", overhead=7) == expected
    assert model_weights_memory(model) == weights_memory(sizes, fixed_parameters=outside)
