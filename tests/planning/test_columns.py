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
