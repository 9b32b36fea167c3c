"""Why no mask fits: which client, which block, how many bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from zorba.planning.problem import InfeasiblePlanError, Problem
from zorba.planning.program import InfeasibleProgramError, PlanSolverError, Program


def check_clients_alone(problem: Problem) -> None:
    """Raises if a client cannot hold `min_active` blocks, or if `max_active` rules out coverage."""
    least = sum(sorted(problem.extra)[: problem.min_active])
    shortfalls: dict[str, int] = {}
    lines: list[str] = []
    plural = "" if problem.min_active == 1 else "s"
    pairs = zip(problem.base, problem.whole, strict=True)
    needs = [min(base + least, whole) for base, whole in pairs]
    for name, budget, need in zip(problem.clients, problem.budgets, needs, strict=True):
        short = need - budget
        if short > 0:
            shortfalls[name] = short
            lines.append(
                f"client {name!r} has {budget:,} bytes but needs at least {need:,} for "
                f"{problem.min_active} active block{plural}: {short:,} bytes short"
            )
    if lines:
        raise InfeasiblePlanError("; ".join(lines), shortfalls)
    wanted = len(problem.blocks) * problem.needed
    most = len(problem.clients) * problem.max_active
    if wanted > most:
        raise InfeasiblePlanError(
            f"{len(problem.blocks)} blocks on {problem.needed} clients each are {wanted} "
            f"activations, but {len(problem.clients)} clients with max_active "
            f"{problem.max_active} give {most}: {wanted - most} missing, whatever the budgets"
        )


def explain_infeasible(problem: Problem, seconds: float) -> InfeasiblePlanError:
    """Says which coverage is missing, and the least extra memory that would be enough.

    Args:
        problem: without a solution.
        seconds: for each of the two searches; what is not found in time is not said.
    """
    message = f"the budgets cannot cover every block on {problem.min_coverage} clients"

    # The mask that covers as much as fits: each block may have fewer clients, at a cost.
    program = Program(problem, lowest=0)
    cost = np.zeros(program.costs.shape[1])
    lacking = np.maximum(problem.needed - program.covers, 0)
    cost[program.num_counts :] = np.tile(lacking, len(problem.kinds))
    missing: dict[str, int] = {}
    if (counts := _least(program, cost, seconds)) is not None:
        lacks = problem.needed - program.deal(counts).sum(axis=0)
        missing = {b: int(n) for b, n in zip(problem.blocks, lacks, strict=True) if n > 0}
    if missing:
        parts = [f"{name!r} lacks {count}" for name, count in missing.items()]
        message += f": at best block {', '.join(parts)}"

    # The least bytes, summed over clients, that would make a plan possible.
    program = Program(problem, elastic=True)
    cost = np.zeros(program.costs.shape[1])
    cost[-len(problem.clients) :] = 1
    extra: dict[str, int] = {}
    if (counts := _least(program, cost, seconds)) is not None:
        sizes = np.array([problem.extra[kind[0]] for kind in problem.kinds], dtype=np.int64)
        over = counts @ sizes - np.array(problem.spare)  # in whole bytes, not as HiGHS rounds
        extra = {c: int(n) for c, n in zip(problem.clients, over, strict=True) if n > 0}
    if extra:
        parts = [f"client {name!r} {count:,}" for name, count in extra.items()]
        message += (
            f"; {sum(extra.values()):,} bytes short in all ({', '.join(parts)} more is enough)"
        )
    return InfeasiblePlanError(message, extra, missing)


def _least(program: Program, cost: NDArray[np.float64], seconds: float) -> NDArray[np.int64] | None:
    try:
        found = program.solve(cost, whole=True, seconds=seconds).x
    except (InfeasibleProgramError, PlanSolverError):
        return None
    return None if found is None else program.counts(found)
