"""Search for plans out of whole rows: it may end early or fail, never spoil a plan or a bound."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

pytest.importorskip("scipy")

from scipy import optimize
from zorba.planning import MemoryModel, PlanSolverError, plan_blocks
from zorba.planning import columns as module
from zorba.planning import program as program_module
from zorba.planning.highs import solve_relaxed
from zorba.planning.problem import make_problem
from zorba.planning.program import Program

from tests.planning.cases import SOLVER_TOLERANCE, all_values

SIZES = np.random.default_rng(0).integers(200, 600, 8).tolist()
MEMORY = MemoryModel(SIZES, [0] * 8)
BUDGETS = [int(share * sum(SIZES)) for share in np.linspace(0.2, 0.5, 6)]


@pytest.fixture(autouse=True)
def no_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves every solve to what comes after rounding."""
    monkeypatch.setattr(program_module, "round_counts", lambda *given: [])


@pytest.mark.parametrize("iterations", [1, 4])
def test_iterations_may_run_out(iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_ITERATIONS", iterations)
    plan = plan_blocks(MEMORY, BUDGETS, num_points=2, mip_rel_gap=0.03)
    assert all(point.proven for point in plan.front)


def fail(*given: object) -> None:
    raise PlanSolverError("HiGHS ended with status 4: numbers")


@pytest.mark.parametrize("solve", ["solve_relaxed", "solve_whole"])
def test_highs_takes_over_where_a_solve_of_columns_fails(
    solve: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, solve, fail)
    plan = plan_blocks(MEMORY, BUDGETS, num_points=2, mip_rel_gap=0.03)
    assert all(point.proven for point in plan.front)


def test_the_value_of_a_relaxation_that_was_cut_short_is_no_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = partial(optimize.linprog, options={"maxiter": 0, "presolve": False})
    monkeypatch.setattr(optimize, "linprog", short)
    with pytest.raises(PlanSolverError, match="status 1"):
        plan_blocks(MEMORY, BUDGETS)


@pytest.mark.parametrize("seed", range(3))
def test_columns_come_where_counts_are_cut_off(seed: int) -> None:
    """For clients of equal budgets too; and no plan is better than the bound."""
    sizes = np.random.default_rng(seed).integers(200, 600, 4).tolist()
    budgets = [max(*sizes, sum(sizes) // 2)] * 2 + [sum(sizes) - min(sizes)] * 2
    problem = make_problem(MemoryModel(sizes, [0] * 4), budgets, None, 1, 1, None)
    program = Program(problem)
    leanest = program.minimize(program.f2, gap=0.0, seconds=10)
    assert leanest is not None
    for client in (0, 2):
        program._forbid(client, [1] * len(problem.kinds))
    relaxed = solve_relaxed(program._arrays(program.f1, [], program._rows))
    found = program._combined(program.f1, [], relaxed, [leanest.mask], 0.01, 10.0)
    least = all_values(problem)[:, 0].min() / sum(problem.priorities)
    assert found.bound <= least + SOLVER_TOLERANCE
    assert found.counts is not None
    assert (found.counts @ problem.extra <= budgets).all()
