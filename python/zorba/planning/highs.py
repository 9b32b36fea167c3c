"""Programs as arrays, and HiGHS for them: in fractions, with prices, or in whole numbers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Vector = NDArray[np.float64]


class PlanSolverError(RuntimeError):
    """The solver gave no plan: out of time, or a status that should not occur."""


class InfeasibleProgramError(Exception):
    """HiGHS proved that no mask satisfies the program."""


class Rows(NamedTuple):
    """Minimize ``cost @ v`` where ``low <= matrix @ v <= high`` and ``least <= v <= most``."""

    cost: Vector
    matrix: csr_array[np.float64]
    low: Vector
    high: Vector
    least: Vector
    most: Vector

    def limit(self, reduced: Vector, allowed: float) -> Rows:
        """Returns the program less what no solution within `allowed` of the relaxed one has.

        That is so of solutions whose variables are all whole. Those of `Program` that may be parts
        are whole in every mask, so no mask is lost.

        Args:
            reduced: costs of the relaxed solution.
            allowed: how much the objective may be above that solution's.
        """
        return self._replace(
            most=np.where(reduced > allowed, self.least, self.most),
            least=np.where(reduced < -allowed, self.most, self.least),
        )


@dataclass(frozen=True)
class Relaxed:
    """The best solution in fractions.

    Attributes:
        value: its objective, a bound of every solution's.
        v: the variables.
        prices: what a unit more of each row's limits adds to the objective.
        reduced: what a unit more of each variable adds to it, at least; less than 0 where the
            variable is at its upper limit, and a unit less adds as much.
    """

    value: float
    v: Vector
    prices: Vector
    reduced: Vector


@dataclass(frozen=True)
class Whole:
    """A solution in whole numbers, and a bound of the objective of all others.

    Attributes:
        v: the variables; None where time ran out before there was a solution.
        bound: of the objective.
        ended: whether the gap asked for was reached.
    """

    v: Vector | None
    bound: float
    ended: bool


def solve_relaxed(rows: Rows) -> Relaxed:
    """Solves a program in fractions.

    Raises:
        InfeasibleProgramError: it has no solution.
        PlanSolverError: HiGHS failed.
    """
    from scipy.optimize import linprog
    from scipy.sparse import vstack

    equal = rows.low == rows.high
    above, below = ~equal & np.isfinite(rows.high), ~equal & np.isfinite(rows.low)
    result = linprog(  # type: ignore[call-overload]  # scipy-stubs know no sparse A_eq
        rows.cost,
        A_eq=rows.matrix[equal],
        b_eq=rows.high[equal],
        A_ub=vstack([rows.matrix[above], -rows.matrix[below]], format="csr"),
        b_ub=np.concatenate([rows.high[above], -rows.low[below]]),
        bounds=np.stack([rows.least, rows.most], axis=1),
        method="highs",
    )
    _check(result.status, result.message, [0])  # of a solve that was cut short, no value is a bound
    prices = np.zeros(len(rows.low))
    prices[equal] = result.eqlin.marginals
    split = np.split(result.ineqlin.marginals, [int(above.sum())])
    prices[above] += split[0]
    prices[below] -= split[1]
    reduced = result.lower.marginals + result.upper.marginals
    return Relaxed(float(result.fun), result.x, prices, reduced)


def solve_whole(rows: Rows, integer: NDArray[np.int64], gap: float, seconds: float) -> Whole:
    """Solves a program in whole numbers.

    Args:
        rows: the program.
        integer: 1 for each variable that must be whole, 0 for others.
        gap: relative gap to the bound at which to stop.
        seconds: time limit.

    Raises:
        InfeasibleProgramError: it has no solution.
        PlanSolverError: HiGHS failed.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    result = milp(
        rows.cost,
        integrality=integer,
        bounds=Bounds(rows.least, rows.most),
        constraints=LinearConstraint(rows.matrix, rows.low, rows.high),
        options={"mip_rel_gap": gap, "time_limit": seconds},
    )
    _check(result.status, result.message, [0, 1])  # 1: time ran out
    bound = -np.inf if result.mip_dual_bound is None else float(result.mip_dual_bound)
    return Whole(result.x, bound, result.status == 0)


def _check(status: int, message: str, expected: Collection[int]) -> None:
    if status == 2:
        raise InfeasibleProgramError
    if status not in expected:
        raise PlanSolverError(f"HiGHS ended with status {status}: {message}")
