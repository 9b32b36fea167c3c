"""Why no mask fits: which client, which block, how many bytes."""

from __future__ import annotations

import numpy as np

from zorba.planning.highs import InfeasibleProgramError, PlanSolverError
from zorba.planning.problem import InfeasiblePlanError, Problem
from zorba.planning.program import Program

# One part in 1e9 of the largest block, given HiGHS's row tolerance of 1e-6.
_BLOCK_UNITS = 1000.0


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
    """Says which coverage is missing, and the least extra memory that would be enough."""
    missing = _missing_coverage(problem, seconds)
    extra = _extra_memory(problem, seconds)
    message = f"the budgets cannot cover every block on {problem.min_coverage} clients"
    if missing:
        parts = [f"{name!r} lacks {count}" for name, count in missing.items()]
        message += f": at best block {', '.join(parts)}"
    if extra:
        parts = [f"client {name!r} {count:,}" for name, count in extra.items()]
        message += (
            f"; {sum(extra.values()):,} bytes short in all ({', '.join(parts)} more is enough)"
        )
    return InfeasiblePlanError(message, extra, missing)


def _missing_coverage(problem: Problem, seconds: float) -> dict[str, int]:
    """Returns the clients that blocks lack in the mask that covers as much as fits."""
    program = Program(problem, min_coverage=0)
    try:
        solution = program.minimize(program.missing_coverage(), gap=0.0, seconds=seconds)
    except (InfeasibleProgramError, PlanSolverError):
        return {}
    if solution is None:
        return {}
    lacks = problem.needed - solution.mask.sum(axis=0)
    return {name: int(n) for name, n in zip(problem.blocks, lacks, strict=True) if n > 0}


def _extra_memory(problem: Problem, seconds: float) -> dict[str, int]:
    """Returns the least bytes, summed over clients, that would make a plan possible.

    Same counts as `Program`, without budgets: one variable a client takes the bytes over.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_array, csr_array, eye_array, kron

    num_clients, num_kinds = len(problem.clients), len(problem.kinds)
    sizes = [len(kind) for kind in problem.kinds]
    bytes_of = [problem.extra[kind[0]] for kind in problem.kinds]
    unit = max(bytes_of) / _BLOCK_UNITS
    identity = eye_array(num_clients)
    used = kron(identity, csr_array(np.array([bytes_of]) / unit))
    active = kron(identity, csr_array(np.ones((1, num_kinds))))
    coverage = kron(csr_array(np.ones((1, num_clients))), eye_array(num_kinds))
    rows: csr_array[np.float64] = block_array(
        [[used, -identity], [active, None], [coverage, None]], format="csr"
    )
    spare = np.array(problem.spare) / unit
    low = [-np.inf] * num_clients + [problem.min_active] * num_clients
    high = [*spare, *([problem.max_active] * num_clients), *([np.inf] * num_kinds)]
    result = milp(
        np.repeat([0.0, 1.0], [num_clients * num_kinds, num_clients]),
        integrality=np.repeat([1, 0], [num_clients * num_kinds, num_clients]),
        bounds=Bounds(0, np.array(sizes * num_clients + [np.inf] * num_clients)),
        constraints=LinearConstraint(rows, low + [problem.needed * size for size in sizes], high),
        options={"mip_rel_gap": 0.0, "time_limit": seconds},
    )
    if result.x is None:
        return {}
    counts = np.rint(result.x[: num_clients * num_kinds]).astype(int)
    extra: dict[str, int] = {}
    for n, row in enumerate(counts.reshape(num_clients, num_kinds).tolist()):
        over = sum(c * size for c, size in zip(row, bytes_of, strict=True)) - problem.spare[n]
        if over > 0:
            extra[problem.clients[n]] = over
    return extra
