"""The integer program behind a plan: HiGHS solves it through scipy."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zorba.planning.problem import Mask, Problem, Vector
from zorba.planning.rounding import Search

F1, F2 = 0, 1  # of values, costs and limits
Limits = tuple[float, float]
UNLIMITED: Limits = (math.inf, math.inf)

# HiGHS lets rows be off by 1e-6: in these units of bytes that is a billionth of the largest block.
# What it still gets wrong is caught in whole bytes.
_BLOCK_UNITS = 1000.0
# How far a later solve may exceed the value of an earlier one, on objectives scaled to at most 1:
# under HiGHS's tolerance of rows, and enough to keep the earlier solution feasible.
_KEEP_SLACK = 1e-7
_TOLERANCE = 1e-6
# Programs of up to this many counts are solved exactly, larger ones are relaxed and rounded first.
_SMALL = 80
# A solve may take this part of the time that is left: most need little, so that much comes back.
_SHARE = 1 / 8


class PlanSolverError(RuntimeError):
    """The solver gave no plan: out of time, or a status that should not occur."""


class InfeasibleProgramError(Exception):
    """HiGHS proved that no mask satisfies the program."""


@dataclass(frozen=True)
class Solution:
    """A feasible mask, its relative gap to a bound, and whether that is the gap asked for."""

    mask: Mask
    gap: float
    proven: bool


class Program:
    """Variables: x[n, h], how many blocks of kind h client n activates, and y[h, k].

    y[h, k] is how many blocks of kind h are covered by k clients: sum_k y[h, k] is the size of the
    kind and sum_k k y[h, k] = sum_n x[n, h]. Counts say enough: dealing a kind's activations round
    robin gives coverages that differ by at most one, the best for a convex cost of coverage.
    """

    def __init__(self, problem: Problem, gap: float, end: float) -> None:
        from scipy.sparse import block_array, csr_array, eye_array, kron

        self.problem, self._gap, self._end = problem, gap, end  # the end in monotonic seconds
        self._shape = clients, kinds = len(problem.clients), len(problem.kinds)
        self._counts = clients * kinds
        self._exact = kinds == 1 or self._counts <= _SMALL
        first = [kind[0] for kind in problem.kinds]
        sizes = np.array([len(kind) for kind in problem.kinds])
        covers = np.arange(problem.min_coverage, clients + 1)
        extra, spare = problem.extra[first], problem.spare

        def rows(count: int, row: NDArray[Any]) -> Any:
            return kron(eye_array(count), csr_array(row[None, :].astype(np.float64)))

        unit = max(int(extra.max()), 1) / _BLOCK_UNITS
        active = rows(clients, np.ones(kinds))
        totals = kron(csr_array(np.ones((1, clients))), eye_array(kinds))
        matrix = block_array(
            [
                [rows(clients, extra / unit), None],  # bytes of a client
                [active, None],  # its most active blocks
                [-active, None],  # its least
                [None, rows(kinds, np.ones(len(covers)))],  # all blocks have a coverage
                [-totals, rows(kinds, covers)],  # coverages add up to the activations
            ],
            format="csr",
        )
        self._less, self._equal = matrix[: 3 * clients], matrix[3 * clients :]
        self._right = np.concatenate([sizes, np.zeros(kinds)])
        # Whole counts that fit alone are bounds that the relaxation does not see in rows of bytes.
        fitting = np.searchsorted(np.cumsum(sorted(problem.extra)), spare, side="right")
        most = np.minimum(problem.max_active, fitting)
        self._most = np.concatenate([spare / unit, most, -problem.min_active])
        room = np.where(extra > 0, spare[:, None] // np.maximum(extra, 1), sizes)
        upper = [np.minimum(room, sizes).ravel(), np.repeat(sizes, len(covers))]
        self._upper = np.concatenate(upper)
        # y of a mask is whole without being told. But equal blocks leave many equal choices, and
        # HiGHS decides among them at once only where it may branch on their sum.
        self._integer = np.ones(len(self._upper), dtype=np.int64)
        self._integer[self._counts :] = kinds == 1
        # 1 / k is convex in k, so a relaxed y never gains by mixing far coverages.
        self.costs = np.zeros((2, len(self._upper)))
        self.costs[F1, self._counts :] = np.outer(problem.weights[first], 1 / covers).ravel()
        self.costs[F2, : self._counts] = problem.shares[:, first].ravel()

    def minimize(self, objective: int, limits: Limits, known: Mask | None) -> Solution:
        """Minimizes F1 or F2 while both stay within limits; ``known`` is a mask that does.

        Few or equal blocks, and least memory, are solved exactly. Others are relaxed, which gives a
        bound, and rounded; HiGHS searches on where that is not within the gap of the bound.
        """
        start = time.monotonic()
        end = start + _SHARE * max(self._end - start, 0.0)
        cost, bound = self.costs[objective], 0.0
        masks = [] if known is None else [known]
        try:
            # The relaxation of least memory is nearly whole, so that HiGHS is quick; and F1 rises
            # so steeply at this end of the front that a gap here is several times as large there.
            if not (self._exact or (objective == F2 and limits == UNLIMITED)):
                relaxed = self.solve(cost, limits)
                bound = relaxed.fun
                masks += self.rounded(objective, limits, relaxed)
                if masks and (best := self._best(objective, masks, bound)).proven:
                    return best
            # HiGHS takes a time limit below 0 for none.
            left = max(end - time.monotonic(), 0.01)
            result = self.solve(cost, limits, whole=True, seconds=left)
        except InfeasibleProgramError:
            if known is None:
                raise
            # `known` is a solution, so only HiGHS's tolerance can say otherwise.
            return self._best(objective, masks, bound)
        bound = max(bound, result.get("mip_dual_bound") or 0.0)
        # HiGHS's tolerance may let a client be over its budget by some bytes: then the mask is
        # repaired like a rounded one, never returned as it is.
        if result.x is not None:
            search = self._search(result.x)
            good = search.complete()
            masks += [search.mask] if good else self._repaired(search, objective, limits)
        if not masks:
            raise PlanSolverError("time ran out before any plan was found: raise time_limit")
        return self._best(objective, masks, bound)

    def solve(
        self, cost: Vector, limits: Limits, *, whole: bool = False, seconds: float = math.inf
    ) -> Any:
        """Returns scipy's result for a cost of the variables: relaxed, or in whole numbers.

        Where time ran out, its ``x`` is the best solution so far or None, and ``mip_dual_bound``,
        where there is one, holds for all. A relaxation cut short has no bound, and is an error.
        """
        from scipy.optimize import linprog
        from scipy.sparse import csr_array, vstack

        # A limit that is infinite is no row: HiGHS would scale by it.
        kept = np.flatnonzero(np.isfinite(limits))
        result: Any = linprog(  # type: ignore[call-overload]  # the stubs know no sparse A_eq
            cost,
            A_ub=vstack([self._less, csr_array(self.costs[kept])], format="csr"),
            b_ub=np.concatenate([self._most, np.array(limits)[kept] + _KEEP_SLACK]),
            A_eq=self._equal,
            b_eq=self._right,
            bounds=np.stack([np.zeros(len(self._upper)), self._upper], axis=1),
            integrality=self._integer if whole else None,
            options={"mip_rel_gap": 0.0 if self._exact else self._gap, "time_limit": seconds},
        )
        if result.status == 2:
            raise InfeasibleProgramError
        if result.status != 0 and not (whole and result.status == 1):  # 1: time ran out
            raise PlanSolverError(f"HiGHS ended with status {result.status}: {result.message}")
        return result

    def rounded(self, objective: int, limits: Limits, relaxed: Any) -> list[Mask]:
        """Rounds a relaxed solution down and improves it, at the prices of the relaxation."""
        prices = np.eye(2)[objective]
        # The dual value of a limit: how much the objective falls where it is a unit higher.
        prices[np.isfinite(limits)] -= relaxed.ineqlin.marginals[len(self._most) :]
        # Down, so that every budget holds; improving then fills the room that is left. A count that
        # is whole but for HiGHS's tolerance must not lose a block.
        search = self._search(np.floor(relaxed.x + _TOLERANCE))
        search.improve(prices, UNLIMITED)
        return self._repaired(search, objective, limits)

    def _repaired(self, search: Search, objective: int, limits: Limits) -> list[Mask]:
        """Brings a mask within all limits and improves it there; none where that fails."""
        search.meet(limits)
        search.improve(np.eye(2)[objective], limits)
        kept = (self.problem.values(search.mask) <= np.array(limits) + 2 * _KEEP_SLACK).all()
        return [search.mask] if kept and search.complete() else []

    def _best(self, objective: int, masks: list[Mask], bound: float) -> Solution:
        # The first of equal ones: a mask that was known before stays.
        values = [float(self.problem.values(mask)[objective]) for mask in masks]
        value = min(values)
        found = max(0.0, (value - bound) / value) if value else 0.0
        return Solution(masks[values.index(value)], found, proven=found <= self._gap + _TOLERANCE)

    def _search(self, variables: Vector) -> Search:
        """Turns counts into a mask, dealing the blocks of a kind round robin over the clients."""
        # Clients in their order and blocks in theirs: ties always break the same way, and a plan
        # that is made again is the same plan.
        counts = np.rint(variables[: self._counts]).astype(np.int64).reshape(self._shape)
        mask = np.zeros((self._shape[0], len(self.problem.blocks)), dtype=np.bool_)
        for kind, given in zip(self.problem.kinds, counts.T.tolist(), strict=True):
            turn = 0
            for n, count in enumerate(given):
                mask[n, [kind[(turn + step) % len(kind)] for step in range(count)]] = True
                turn += count
        return Search(self.problem, mask)
