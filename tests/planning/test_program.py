"""What a solve claims: bounds that no plan beats, and plans as near to them as it says."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("scipy")

from zorba.planning import program as module
from zorba.planning.problem import make_problem
from zorba.planning.program import Program

from tests.planning.cases import SOLVER_TOLERANCE, all_values, random_case


@pytest.mark.parametrize("gap", [0.0, 0.001, 0.02, 0.1])
@pytest.mark.parametrize("seed", range(6))
def test_gaps_hold(seed: int, gap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without what comes before HiGHS, whose part is small where rounding does well."""
    case = random_case(seed, 4, 4)
    problem = make_problem(case["memory"], case["budgets"], case["priorities"], 1, 1, None)
    scale = np.array(
        [sum(problem.priorities), sum(sum(problem.extra) / b for b in case["budgets"])]
    )
    base = sum(v / c for v, c in zip(problem.base, problem.budgets, strict=True))
    values = (all_values(problem) - [0.0, base]) / scale  # of the program: [masks, 2]
    least = values[:, 1].min()
    for rounding in (True, False):
        if not rounding:
            monkeypatch.setattr(module, "round_counts", lambda *given: [])
        program = Program(problem)
        for share in (0.0, 0.03, 0.3, 1.0):
            limit = least + share * (values[:, 1].max() - least)
            best = values[values[:, 1] <= limit + SOLVER_TOLERANCE, 0].min()
            found = program.minimize(program.f1, [(program.f2, limit)], gap=gap, seconds=60)
            assert found is not None
            assert found.proven
            value = program.value(program.f1, found.mask)
            assert program.value(program.f2, found.mask) <= limit + SOLVER_TOLERANCE
            assert value * (1 - found.gap) <= best + SOLVER_TOLERANCE, "the bound is none"
            assert best <= value + SOLVER_TOLERANCE
            assert found.gap <= gap + SOLVER_TOLERANCE
