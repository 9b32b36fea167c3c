"""plan_blocks against brute force, its limits, and the sizes people will use."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy")

from zorba.planning import BlockPlan, InfeasiblePlanError, MemoryModel, plan_blocks
from zorba.planning.problem import Problem, make_problem

from tests.covering import parametrize
from tests.planning.cases import SOLVER_TOLERANCE, all_values, random_case


def check(plan: BlockPlan, problem: Problem, memory: MemoryModel) -> None:
    for point in plan.front:
        assert point.memory == tuple(memory.bytes_of(row) for row in point.mask.tolist())
        assert all(v <= c for v, c in zip(point.memory, problem.budgets, strict=True))
        assert (point.mask.sum(axis=0) >= problem.min_coverage).all()
        assert (point.mask.sum(axis=1) >= problem.min_active).all()
        assert (point.mask.sum(axis=1) <= problem.max_active).all()
        assert point.f1 == problem.f1(point.mask)
        shares = (v / c for v, c in zip(point.memory, problem.budgets, strict=True))
        assert point.f2 == math.fsum(shares)
    for left, right in itertools.pairwise(plan.front):
        assert left.f1 < right.f1
        assert left.f2 > right.f2


SHAPES = [(3, 3), (4, 4), (5, 3), (3, 4)]
LIMITS = [{}, {"min_coverage": 2}, {"min_active": 2, "max_active": 3}, {"tolerance": 0.2}]


AXES: dict[str, Any] = {
    "limits": LIMITS,
    "shape": SHAPES,
    "variant": [{}, {"whole": True}, {"alike": True}],
    "seed": range(3),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is test_matches_brute_force:
        parametrize(metafunc, AXES)


def test_matches_brute_force(
    seed: int, variant: dict[str, bool], shape: tuple[int, int], limits: dict[str, float]
) -> None:
    case = random_case(seed, *shape, **variant)
    bounds = {k: v for k, v in limits.items() if k != "tolerance"}
    try:
        problem = make_problem(**case, **bounds)
        values = all_values(problem, case["memory"])
    except InfeasiblePlanError:
        values = np.empty((0, 2))
    if not len(values):
        with pytest.raises(InfeasiblePlanError):
            plan_blocks(**case, **limits)
        return
    plan = plan_blocks(**case, **limits, mip_rel_gap=0.0, num_points=5)
    check(plan, problem, case["memory"])
    slack = SOLVER_TOLERANCE * np.array([sum(problem.priorities), len(problem.clients)])
    # Clients that are set apart because they have room for the whole model cost F1 nothing.
    free = all_values(problem, case["memory"], free=True)
    assert free[:, 0].min() == pytest.approx(values[:, 0].min())
    for point in plan.front:
        dominated = (values < np.array([point.f1, point.f2]) - slack).all(axis=1)
        assert not dominated.any()
    least_f1, least_f2 = values.min(axis=0)
    first, last = plan.front[0], plan.front[-1]
    assert first.f1 == pytest.approx(least_f1, abs=slack[0])
    assert first.f2 == pytest.approx(
        values[values[:, 0] <= least_f1 + slack[0], 1].min(), abs=slack[1]
    )
    assert last.f2 == pytest.approx(least_f2, abs=slack[1])
    near = values[:, 0] <= (1 + limits.get("tolerance", 0.0)) * least_f1 + slack[0]
    assert plan.point.f2 == pytest.approx(values[near, 1].min(), abs=slack[1])


def test_permuting_blocks_and_clients_changes_nothing() -> None:
    case = random_case(7, 4, 4)
    memory, budgets = case["memory"], case["budgets"]
    names = ["a", "b", "c", "d"]
    order = [2, 0, 3, 1]
    plan = plan_blocks(memory, budgets, priorities=case["priorities"], mip_rel_gap=0.0)
    turned = plan_blocks(
        MemoryModel(
            [memory.active[b] for b in order], [memory.idle[b] for b in order], memory.fixed
        ),
        {names[n]: budgets[n] for n in order},
        priorities=[case["priorities"][b] for b in order],
        mip_rel_gap=0.0,
    )
    assert turned.point.f1 == pytest.approx(plan.point.f1, abs=SOLVER_TOLERANCE)
    assert turned.point.f2 == pytest.approx(plan.point.f2, abs=4 * SOLVER_TOLERANCE)
    assert turned.clients == tuple(names[n] for n in order)


EQUAL = json.loads((Path(__file__).parent / "equal_blocks.json").read_text())


@pytest.mark.parametrize("case", EQUAL, ids=lambda case: case["name"])
def test_equal_blocks_are_planned_as_in_0_1_0(case: dict[str, Any]) -> None:
    """The demo's fingerprint depends on its mask. The values are those of the proven optima."""
    memory = MemoryModel(**case["memory"])
    plan = plan_blocks(memory, case["budgets"], **case["options"])
    assert all(point.proven for point in plan.front)
    np.testing.assert_allclose([(p.f1, p.f2) for p in plan.front], case["front"], rtol=1e-12)
    assert plan.chosen == case["chosen"]
    assert ["".join("01"[on] for on in row) for row in plan.mask.tolist()] == case["mask"]


def test_budget_is_exact_where_the_solver_cannot_see_a_byte() -> None:
    sizes = [10**12, 10**12 + 1, 10**12 + 2]
    total = sum(sizes)
    memory = MemoryModel(sizes, [0] * 3)
    exact = plan_blocks(memory, [total, total], mip_rel_gap=0.0)
    assert exact.mask.all()
    # One byte less: three blocks no longer fit, nor do the two largest on the second client.
    plan = plan_blocks(memory, [total - 1, sum(sizes[1:]) - 1], mip_rel_gap=0.0)
    assert plan.mask.sum(axis=1).tolist() == [2, 2]
    for used, limit in zip(plan.memory, plan.budgets, strict=True):
        assert used <= limit


def test_twenty_clients_24_unequal_blocks() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(2 * 10**8, 6 * 10**8, 24).tolist()
    memory = MemoryModel(sizes, [0] * 24, 10**9)
    budgets = [10**9 + int(s * sum(sizes)) for s in rng.uniform(0.15, 0.8, 20)]
    plan = plan_blocks(memory, budgets, num_points=3)
    check(plan, make_problem(memory, budgets), memory)
    assert plan.point.proven, "docs/planning.md: a gap of 3 %"


def test_a_short_time_limit_still_gives_a_plan_and_says_so() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(2 * 10**8, 6 * 10**8, 24).tolist()
    memory = MemoryModel(sizes, [0] * 24)
    plan = plan_blocks(memory, [int(0.3 * sum(sizes))] * 20, mip_rel_gap=0.0, time_limit=1.0)
    check(plan, make_problem(memory, plan.budgets), memory)
    assert not plan.point.proven
    assert plan.point.gap > 0
    assert "time limit" in plan.render()
