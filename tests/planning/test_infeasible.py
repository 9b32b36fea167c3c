"""What plan_blocks says when there is no plan, or the question makes no sense."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("scipy")

from zorba.planning import InfeasiblePlanError, MemoryModel, plan_blocks


def test_names_the_client_and_bytes_that_are_enough() -> None:
    memory = MemoryModel([400_000, 500_000], [0, 0], 834_567)
    with pytest.raises(InfeasiblePlanError) as error:
        plan_blocks(memory, {"phone-2": 2_000_000, "phone-3": 1_000_000})
    assert str(error.value) == (
        "client 'phone-3' has 1,000,000 bytes but needs at least 1,234,567 for 1 active block: "
        "234,567 bytes short"
    )
    assert error.value.shortfalls == {"phone-3": 234_567}
    plan = plan_blocks(memory, {"phone-2": 2_000_000, "phone-3": 1_234_567})
    assert plan.active_blocks("phone-3") == ("block-0",)


@pytest.mark.parametrize(
    ("memory", "budgets", "least", "short"),
    [
        (MemoryModel([10, 20, 30], [0] * 3, 5), [34, 35, 30], 2, {"client-0": 1, "client-2": 5}),
        (MemoryModel([10, 10], [10, 10], 5), [24], 1, {"client-0": 1}),
    ],
    ids=["every client that is short", "idle blocks count"],
)
def test_shortfalls(
    memory: MemoryModel, budgets: list[int], least: int, short: dict[str, int]
) -> None:
    with pytest.raises(InfeasiblePlanError, match=f"{least} active block") as error:
        plan_blocks(memory, budgets, min_active=least)
    assert error.value.shortfalls == short


def test_a_client_may_have_room_for_the_whole_model_only() -> None:
    # A single block takes 60 with its buffers; all of them need none of those.
    memory = MemoryModel([10, 10, 10], [0] * 3, 50, whole=40)
    plan = plan_blocks(memory, {"a": 40, "b": 60})
    assert plan.mask.all()
    assert plan.memory == (40, 40)
    with pytest.raises(InfeasiblePlanError, match=r"client 'a' .* needs at least 40") as error:
        plan_blocks(memory, {"a": 39, "b": 60})
    assert error.value.shortfalls == {"a": 1}


def test_the_whole_model_is_no_way_out_where_not_every_block_may_be_active() -> None:
    memory = MemoryModel([10, 10, 10], [0] * 3, 50, whole=40)
    with pytest.raises(InfeasiblePlanError, match=r"client 'a' .* needs at least 60") as error:
        plan_blocks(memory, {"a": 59, "b": 70}, max_active=2)
    assert error.value.shortfalls == {"a": 1}


@pytest.mark.parametrize(
    ("sizes", "budgets", "coverage", "short"),
    [
        # Both blocks of 100 on one client (90 more), 130 on the other (20 more).
        ([100, 100, 130], [110, 110], 1, [20, 90]),
        # In parts everything fits, so the relaxation has a plan; whole, one block has no place.
        ([60, 61, 62, 10], [100, 100], 1, [21]),
        ([70, 90, 110, 130], [150, 160, 140], 2, None),
    ],
    ids=["no room", "room in parts", "covered twice"],
)
def test_coverage_names_bytes_that_are_enough(
    sizes: list[int], budgets: list[int], coverage: int, short: list[int] | None
) -> None:
    memory, names = MemoryModel(sizes, [0] * len(sizes)), [f"client-{n}" for n in range(9)]
    with pytest.raises(InfeasiblePlanError) as error:
        plan_blocks(memory, budgets, min_coverage=coverage)
    told = error.value.shortfalls
    assert f"{sum(told.values()):,} bytes short in all (client '" in str(error.value)
    assert short is None or sorted(told.values()) == short
    raised = [b + told.get(name, 0) for name, b in zip(names, budgets, strict=False)]
    assert min(plan_blocks(memory, raised, min_coverage=coverage).coverage) >= coverage


def test_max_active_alone_can_rule_out_coverage() -> None:
    with pytest.raises(InfeasiblePlanError, match="4 missing, whatever the budgets"):
        plan_blocks(MemoryModel([1] * 4, [0] * 4), [100, 100], min_coverage=2, max_active=2)


MODEL = MemoryModel([10, 20], [0, 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budgets": []}, "at least one client"),
        ({"budgets": {}}, "at least one client"),
        ({"budgets": [-1]}, "must not be negative"),
        ({"budgets": [math.nan]}, "whole number of bytes, not nan"),
        ({"budgets": [math.inf]}, "whole number of bytes, not inf"),
        ({"budgets": [10.5]}, "whole number of bytes, not 10.5"),
        ({"budgets": ["10"]}, "whole number of bytes, not '10'"),
        ({"budgets": [True]}, "whole number of bytes, not True"),
        ({"budgets": [0]}, "must be positive"),
        ({"budgets": {"": 10}}, "non-empty"),
        ({"priorities": [1.0]}, "1 values for 2 blocks"),
        ({"priorities": [1.0, math.nan]}, "'block-1' must be finite"),
        ({"priorities": [1.0, -1.0]}, "'block-1' must be finite"),
        ({"priorities": [0.0, 0.0]}, "one priority must be positive"),
        ({"min_coverage": 3}, r"in 1..2 \(clients\), not 3"),
        ({"min_coverage": 0}, r"in 1..2 \(clients\), not 0"),
        ({"min_active": -1}, "min_active"),
        ({"min_active": 2, "max_active": 1}, "min_active"),
        ({"max_active": 3}, "max_active"),
        ({"min_active": 0, "max_active": 0}, "max_active >= 1"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
        ({"num_points": 1}, "num_points"),
        ({"mip_rel_gap": 1.0}, "mip_rel_gap"),
        ({"time_limit": 0.0}, "time_limit"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)
def test_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_blocks(**({"memory": MODEL, "budgets": [100, 100]} | arguments))
