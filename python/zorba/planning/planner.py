"""The epsilon-constraint lexicographic sweep over convergence (F1) and memory (F2)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from zorba.planning.diagnosis import check_clients_alone, explain_infeasible
from zorba.planning.memory import MemoryModel
from zorba.planning.plan import BlockPlan, ParetoPoint, pareto_front
from zorba.planning.problem import Mask, Problem, make_problem
from zorba.planning.program import (
    F1,
    F2,
    UNLIMITED,
    InfeasibleProgramError,
    PlanSolverError,
    Program,
    Solution,
)

# F1 of equal blocks takes few values, so that one may be just what is tolerated, but for rounding.
_ROUNDING = 1e-12
_SECONDS_TO_EXPLAIN = 10.0


def plan_blocks(
    memory: MemoryModel,
    budgets: Sequence[int] | Mapping[str, int],
    *,
    priorities: Sequence[float] | None = None,
    min_coverage: int = 1,
    min_active: int = 1,
    max_active: int | None = None,
    tolerance: float = 0.0,
    num_points: int = 8,
    mip_rel_gap: float = 0.03,
    time_limit: float = 60.0,
) -> BlockPlan:
    """Decides which client activates which blocks, within every client's memory budget.

    Trades the convergence surrogate ``F1 = sum_b priorities[b] / coverage[b]`` (derived in
    docs/theory.md) against relative memory ``F2 = sum_n V_n / budgets[n]``. The plan is the
    point of least F2 among those with ``F1 <= (1 + tolerance) * least F1``; ``BlockPlan.front``
    holds the other points of the Pareto front and ``BlockPlan.choose`` switches to one. Clients
    with room for the whole model that need less for it than the sum (``MemoryModel.whole``)
    activate every block in all of them, unless `max_active` is less.

    Args:
        memory: bytes of each block, active and idle, and fixed bytes.
        budgets: bytes that each client may use; a mapping names the clients.
        priorities: weight of each block in F1; 1 where not given.
        min_coverage: clients that must have each block active, 1 to the number of clients.
        min_active: blocks that each client must have active.
        max_active: blocks that a client may have active; all where not given.
        tolerance: how far F1 may be above its least value to save memory; 0.05 is 5 %.
        num_points: points of the sweep, at least 2; dominated ones are dropped.
        mip_rel_gap: relative gap to a bound at which a solve stops; equal blocks and small
            instances are solved to optimality if time allows. A point may be a gap away from the
            true front in either objective.
        time_limit: seconds for all searches together. A search that runs out keeps its best plan,
            and the point says so (``ParetoPoint.proven``).

    Raises:
        InfeasiblePlanError: no mask fits; names clients, blocks and the bytes that are missing.
        PlanSolverError: time ran out before any plan was found, or the solver failed.
        ValueError: an argument makes no sense.
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance must be finite and >= 0, not {tolerance}")
    if num_points < 2:
        raise ValueError(f"num_points must be at least 2, not {num_points}")
    if not 0 <= mip_rel_gap < 1:
        raise ValueError(f"mip_rel_gap must be in [0, 1), not {mip_rel_gap}")
    if not time_limit > 0:
        raise ValueError(f"time_limit must be positive, not {time_limit}")
    start = time.monotonic()
    problem = make_problem(memory, budgets, priorities, min_coverage, min_active, max_active)
    # Clients with room for everything are settled before any program: it then is smaller, and their
    # memory, which is no sum over blocks, need not be part of it.
    full, rest = problem.split()
    solutions = [Solution(np.zeros((0, len(problem.blocks)), dtype=np.bool_), 0.0, proven=True)]
    if rest.clients:
        check_clients_alone(rest)
        sweep = _Sweep(Program(rest), mip_rel_gap, start + time_limit)
        try:
            solutions = list(sweep.run(num_points, tolerance))
        except InfeasibleProgramError:
            seconds = min(time_limit, _SECONDS_TO_EXPLAIN)
            raise explain_infeasible(rest, seconds) from None
    front = pareto_front([_point(problem, full, solution) for solution in solutions])
    # The front is in order of F1, so the last point within the bound has the least memory.
    bound = (1 + tolerance) * front[0].f1 * (1 + _ROUNDING)
    chosen = max(i for i, point in enumerate(front) if point.f1 <= bound)
    return BlockPlan(
        clients=problem.clients,
        blocks=problem.blocks,
        budgets=problem.budgets,
        front=front,
        chosen=chosen,
        seconds=time.monotonic() - start,
    )


class _Sweep:
    """Solves from one end of the front to the other, and shares the time among the solves."""

    def __init__(self, program: Program, gap: float, end: float) -> None:
        self._program = program
        self._gap = gap
        self._end = end
        self._solves_left = 0

    def run(self, num_points: int, tolerance: float) -> Iterator[Solution]:
        """Yields solutions of the sweep; some may dominate others.

        Raises:
            InfeasibleProgramError: no mask fits.
            PlanSolverError: time ran out before there was a plan.
        """
        program = self._program
        # Two solves a point, and two for the pick where it is no end of the sweep.
        self._solves_left = 2 * num_points + (2 if tolerance else 0)
        # Best convergence first: where time runs out, that is the plan worth having.
        fastest = self._lexicographic(F1, UNLIMITED)
        if fastest is None:
            raise PlanSolverError("time ran out before any plan was found: raise time_limit")
        yield fastest
        if not program.saves_memory:  # the front is one point
            return
        least_f1, high = program.values(fastest.mask).tolist()
        if tolerance:
            picked = self._lexicographic(F2, ((1 + tolerance) * least_f1, math.inf), fastest.mask)
            if picked is not None:
                yield picked
        leanest = self._lexicographic(F2, UNLIMITED)
        if leanest is None:
            return
        yield leanest
        low = program.values(leanest.mask)[F2]
        for i in range(1, num_points - 1):
            # The leanest mask is within every epsilon, so each of these has a plan to start from.
            epsilon = low + (high - low) * i / (num_points - 1)
            between = self._lexicographic(F1, (math.inf, epsilon), leanest.mask)
            if between is not None:
                yield between

    def _lexicographic(
        self, first: int, limits: tuple[float, float], known: Mask | None = None
    ) -> Solution | None:
        """Minimizes an objective within limits, then the other keeping it; None without time."""
        best = self._minimize(first, limits, known)
        if best is None:
            self._solves_left -= 1
            return None
        # Without the second stage a point could be dominated by one of the same first objective.
        kept = list(limits)
        kept[first] = float(self._program.values(best.mask)[first])
        refined = self._minimize(F1 + F2 - first, (kept[F1], kept[F2]), best.mask)
        if refined is None:
            return Solution(best.mask, best.gap, proven=False)
        return Solution(refined.mask, max(best.gap, refined.gap), best.proven and refined.proven)

    def _minimize(
        self, objective: int, limits: tuple[float, float], known: Mask | None
    ) -> Solution | None:
        # Each may take twice an equal share: most need little, so that much comes back.
        seconds = 2 * max(self._end - time.monotonic(), 0.0) / max(self._solves_left, 2)
        self._solves_left -= 1
        try:
            return self._program.minimize(
                objective, limits, gap=self._gap, seconds=seconds, known=known
            )
        except InfeasibleProgramError:
            if known is None:
                raise
            # `known` is a solution of this program, so only HiGHS's tolerance can say otherwise.
            return None


def _point(problem: Problem, full: list[int], solution: Solution) -> ParetoPoint:
    mask = np.ones((len(problem.clients), len(problem.blocks)), dtype=np.bool_)
    # From the mask in whole bytes, not from the solver's floats: what is told is exact.
    mask[[n for n in range(len(mask)) if n not in full]] = solution.mask
    mask.flags.writeable = False
    return ParetoPoint(
        f1=problem.f1(mask),
        f2=problem.f2(mask),
        mask=mask,
        memory=problem.memory(mask),
        gap=solution.gap,
        proven=solution.proven,
    )
