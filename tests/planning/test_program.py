"""What a solve claims: bounds that no plan beats, and plans as near to them as it says."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest

pytest.importorskip("scipy")

from scipy import optimize
from zorba.planning import MemoryModel, PlanSolverError, plan_blocks
from zorba.planning import program as module
from zorba.planning.problem import make_problem
from zorba.planning.program import F1, F2, Program

from tests.planning.cases import SOLVER_TOLERANCE, all_values, random_case


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "rounded first"])
@pytest.mark.parametrize("gap", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("seed", range(4))
def test_gaps_hold(seed: int, gap: float, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALL", module._SMALL if exact else 0)
    case = random_case(seed, 4, 4)
    problem = make_problem(**case)
    scale = np.array(
        [sum(problem.priorities), sum(sum(problem.extra) / b for b in case["budgets"])]
    )
    base = sum(v / c for v, c in zip(problem.base, problem.budgets, strict=True))
    values = (all_values(problem, case["memory"]) - [0.0, base]) / scale  # scaled, [masks, 2]
    program = Program(problem, gap, math.inf)
    for objective, other in ((F1, F2), (F2, F1)):
        least, most = values[:, other].min(), values[:, other].max()
        for share in (0.0, 0.03, 0.3, 1.0):
            limits = [math.inf, math.inf]
            limits[other] = least + share * (most - least)
            kept = (values <= np.array(limits) + SOLVER_TOLERANCE).all(axis=1)
            best = values[kept, objective].min()
            found = program.minimize(objective, tuple(limits), None)
            assert found.proven
            value = problem.values(found.mask)
            assert (value <= np.array(limits) + SOLVER_TOLERANCE).all()
            assert value[objective] * (1 - found.gap) <= best + SOLVER_TOLERANCE, "no bound"
            assert best <= value[objective] + SOLVER_TOLERANCE
            assert found.gap <= gap + SOLVER_TOLERANCE


@pytest.mark.parametrize("seed", range(3))
def test_rounding_is_near_its_bound_and_always_the_same(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    sizes = numbers.integers(200, 600, 16).tolist()
    budgets = [int(share * sum(sizes)) for share in numbers.uniform(0.2, 1.0, 30)]
    problem = make_problem(MemoryModel(sizes, [0] * 16), budgets, None, 2, 2, 12)
    program = Program(problem, 0.03, math.inf)
    relaxed = program.solve(program.costs[F1], module.UNLIMITED)
    first, again = (program.rounded(F1, module.UNLIMITED, relaxed)[0] for _ in range(2))
    assert (first == again).all()
    assert problem.values(first)[F1] * (1 - 0.03) <= relaxed.fun, "docs/planning.md: 3 %"


def test_the_value_of_a_relaxation_that_was_cut_short_is_no_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = partial(optimize.linprog, options={"maxiter": 0, "presolve": False})
    monkeypatch.setattr(optimize, "linprog", lambda *a, options, **k: short(*a, **k))
    monkeypatch.setattr(module, "_SMALL", 0)
    with pytest.raises(PlanSolverError, match="status 1"):
        plan_blocks(MemoryModel([30, 40, 50], [0] * 3), [60, 100])
