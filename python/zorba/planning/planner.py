"""The epsilon-constraint lexicographic sweep over convergence (F1) and memory (F2)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from zorba.planning.memory import MemoryModel
from zorba.planning.plan import BlockPlan, ParetoPoint
from zorba.planning.problem import InfeasiblePlanError, Mask, Problem, make_problem
from zorba.planning.program import F1, F2, UNLIMITED, InfeasibleProgramError, Program, Solution

# F1 of equal blocks takes few values, so that one may be just what is tolerated, but for rounding.
_ROUNDING = 1e-12


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
    holds the other points of the Pareto front. Clients with room for the whole model that need less
    for it than the sum (``MemoryModel.whole``) activate every block in all of them, unless
    `max_active` is less.

    Args:
        memory: bytes of each block, active and idle, and fixed bytes.
        budgets: bytes that each client may use; a mapping names the clients.
        priorities: weight of each block in F1; 1 where not given.
        min_coverage: clients that must have each block active, 1 to the number of clients.
        min_active: blocks that each client must have active.
        max_active: blocks that a client may have active; all where not given.
        tolerance: how far F1 may be above its least value to save memory; 0.05 is 5 %.
        num_points: points of the sweep, at least 2; dominated ones are dropped.
        mip_rel_gap: relative gap to a bound at which a solve stops. A point may be that far from
            the true front; equal blocks and small instances are optimal if time allows.
        time_limit: seconds for all searches together. A search that runs out keeps its best plan,
            and the point says so (``ParetoPoint.proven``).

    Raises:
        InfeasiblePlanError: no mask fits; names the clients and the bytes that are missing.
        PlanSolverError: time ran out before any plan was found, or the solver failed.
        ValueError: an argument makes no sense.
    """
    for ok, what in (
        (math.isfinite(tolerance) and tolerance >= 0, f"tolerance must be >= 0, not {tolerance}"),
        (num_points >= 2, f"num_points must be at least 2, not {num_points}"),
        (0 <= mip_rel_gap < 1, f"mip_rel_gap must be in [0, 1), not {mip_rel_gap}"),
        (time_limit > 0, f"time_limit must be positive, not {time_limit}"),
    ):
        if not ok:
            raise ValueError(what)
    start = time.monotonic()
    problem = make_problem(memory, budgets, priorities, min_coverage, min_active, max_active)
    program = Program(problem, mip_rel_gap, start + time_limit)
    try:
        points = [_point(problem, each) for each in _sweep(program, num_points, tolerance)]
    except InfeasibleProgramError:
        raise _too_little(problem) from None
    # In this order a point is dominated just where an earlier one takes no more memory.
    front: list[ParetoPoint] = []
    for point in sorted(points, key=lambda p: (p.f1, p.f2)):
        if not front or point.f2 < front[-1].f2:
            front.append(point)
    # The last point within the bound has the least memory.
    bound = (1 + tolerance) * front[0].f1 * (1 + _ROUNDING)
    chosen = max(i for i, point in enumerate(front) if point.f1 <= bound)
    took = time.monotonic() - start
    return BlockPlan(problem.clients, problem.blocks, problem.budgets, tuple(front), chosen, took)


def _sweep(program: Program, num_points: int, tolerance: float) -> Iterator[Solution]:
    """Yields solutions from one end of the front to the other; some may dominate others."""
    problem = program.problem
    # Best convergence first: where time runs out, that is the plan worth having.
    fastest = _lexicographic(program, F1, UNLIMITED)
    yield fastest
    if not problem.shares.any():  # no mask saves memory: the front is one point
        return
    least_f1, high = problem.values(fastest.mask).tolist()
    if tolerance:
        yield _lexicographic(program, F2, ((1 + tolerance) * least_f1, math.inf), fastest.mask)
    leanest = _lexicographic(program, F2, UNLIMITED, fastest.mask)
    yield leanest
    low = problem.values(leanest.mask)[F2]
    for epsilon in np.linspace(low, high, num_points)[1:-1].tolist():
        # The leanest mask is within every epsilon, so each of these has a plan to start from.
        yield _lexicographic(program, F1, (math.inf, epsilon), leanest.mask)


def _lexicographic(
    program: Program, first: int, limits: tuple[float, float], known: Mask | None = None
) -> Solution:
    """Minimizes an objective within limits, then the other one keeping the first."""
    best = program.minimize(first, limits, known)
    # Without the second stage a point could be dominated by one of the same first objective.
    kept = list(limits)
    kept[first] = float(program.problem.values(best.mask)[first])
    refined = program.minimize(F1 + F2 - first, (kept[F1], kept[F2]), best.mask)
    return Solution(refined.mask, max(best.gap, refined.gap), best.proven and refined.proven)


def _point(problem: Problem, solution: Solution) -> ParetoPoint:
    mask = solution.mask
    mask.flags.writeable = False
    # From the mask in whole bytes, not from the solver's floats: what is told is exact.
    memory = tuple((problem.base + mask @ problem.extra).tolist())
    f2 = math.fsum(v / c for v, c in zip(memory, problem.budgets, strict=True))
    return ParetoPoint(problem.f1(mask), f2, mask, memory, solution.gap, solution.proven)


def _too_little(problem: Problem) -> InfeasiblePlanError:
    """Says how many bytes more are enough to cover every block."""
    message = f"the budgets cannot cover every block on {problem.min_coverage} clients"
    free, order = problem.spare.copy(), np.argsort(problem.extra)
    mask = np.zeros((len(free), len(order)), np.bool_)
    # Large blocks first, each to whoever has most room: small ones fill what is left.
    for b in order[::-1].repeat(problem.min_coverage):
        may = ~mask[:, b] & (mask.sum(axis=1) < problem.max_active)
        if not may.any():  # no room for this block by number: bytes alone do not tell
            return InfeasiblePlanError(message)
        roomiest = np.where(may, free, free.min() - 1).argmax()
        mask[roomiest, b] = True
        free[roomiest] -= problem.extra[b]
    for n, least in enumerate(problem.min_active):
        more = [b for b in order if not mask[n, b]][: max(least - mask[n].sum(), 0)]
        free[n] -= problem.extra[more].sum()
    short = {name: int(-n) for name, n in zip(problem.clients, free, strict=True) if n < 0}
    parts = ", ".join(f"client {name!r} {count:,}" for name, count in short.items())
    total = f"{sum(short.values()):,} bytes short in all"
    return InfeasiblePlanError(f"{message}: {total} ({parts} more is enough)", short)
