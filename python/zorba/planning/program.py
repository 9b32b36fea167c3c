"""The integer program behind a plan: HiGHS solves it through scipy."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zorba.planning.problem import Mask, Problem
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

    Both objectives are scaled to at most 1: F1 by the sum of priorities, F2 (its part that depends
    on the mask) by its value when every block is active.

    Args:
        problem: what to plan.
        lowest: the least coverage; the problem's by default.
        elastic: adds variables over[n], the bytes that client n is over its budget, in units of
            their own, instead of forbidding it: for a diagnosis.
    """

    def __init__(
        self, problem: Problem, lowest: int | None = None, *, elastic: bool = False
    ) -> None:
        from scipy.sparse import block_array, csr_array, eye_array, kron

        self.problem = problem
        self._shape = clients, kinds = len(problem.clients), len(problem.kinds)
        self.num_counts = clients * kinds
        first = [kind[0] for kind in problem.kinds]
        sizes = np.array([len(kind) for kind in problem.kinds])
        self._extra = np.array(problem.extra, dtype=np.int64)[first]
        self._spare = np.array(problem.spare, dtype=np.int64)
        self.covers = np.arange(problem.needed if lowest is None else lowest, clients + 1)

        def rows(count: int, row: NDArray[Any]) -> Any:
            return kron(eye_array(count), csr_array(row[None, :].astype(np.float64)))

        unit = max(int(self._extra.max()), 1) / _BLOCK_UNITS
        # In order: bytes of a client, its most and its least active blocks; then, for each kind,
        # all blocks have a coverage, and coverages add up to the activations.
        active = rows(clients, np.ones(kinds))
        totals = kron(csr_array(np.ones((1, clients))), eye_array(kinds))
        blocks = [
            [rows(clients, self._extra / unit), None, -eye_array(clients)],
            [active, None, None],
            [-active, None, None],
            [None, rows(kinds, np.ones(len(self.covers))), None],
            [-totals, rows(kinds, self.covers), None],
        ]
        matrix = block_array(blocks if elastic else [row[:2] for row in blocks], format="csr")
        self._less, self._equal = matrix[: 3 * clients], matrix[3 * clients :]
        self._right = np.concatenate([sizes, np.zeros(kinds)])

        # Whole counts that fit alone are bounds that the relaxation does not see in rows of bytes.
        most = np.full(clients, problem.max_active)
        room = np.tile(sizes, (clients, 1))
        if not elastic:
            fitting = np.searchsorted(np.cumsum(sorted(problem.extra)), self._spare, side="right")
            most = np.minimum(most, fitting)
            whole = self._spare[:, None] // np.maximum(self._extra, 1)
            room = np.where(self._extra > 0, np.minimum(room, whole), room)
        least = np.full(clients, problem.min_active)
        self._most = np.concatenate([self._spare / unit, most, -least])
        over = np.full(clients if elastic else 0, np.inf)
        self._upper = np.concatenate([room.ravel(), np.repeat(sizes, len(self.covers)), over])
        # y of a mask is whole without being told. But equal blocks leave many equal choices, and
        # HiGHS decides among them at once only where it may branch on their sum.
        self._integer = np.ones(len(self._upper), dtype=np.int64)
        self._integer[self.num_counts :] = kinds == 1 and not elastic

        self._weights = np.array(problem.priorities) / math.fsum(problem.priorities)
        scale = math.fsum(sum(problem.extra) / budget for budget in problem.budgets)
        # Where idle blocks stay on the device, masks save no memory, and F2 is 0.
        self.saves_memory = scale > 0
        self._per_byte = 1 / np.array(problem.budgets, dtype=np.float64) / (scale or 1.0)
        # 1 / k is convex in k, so a relaxed y never gains by mixing far coverages.
        cost = np.outer(self._weights[first], 1 / np.maximum(self.covers + problem.covered, 1))
        self.costs = np.zeros((2, len(self._upper)))
        self.costs[F1, self.num_counts : self.num_counts + cost.size] = cost.ravel()
        self.costs[F2, : self.num_counts] = np.outer(self._per_byte, self._extra).ravel()

    def values(self, mask: Mask) -> NDArray[np.float64]:
        """Returns F1 and F2 of a mask, scaled."""
        return self._search(mask).values()

    def minimize(
        self,
        objective: int,
        limits: Limits = UNLIMITED,
        *,
        gap: float,
        seconds: float,
        known: Mask | None = None,
    ) -> Solution | None:
        """Minimizes an objective while both stay within limits.

        Few or equal blocks, and least memory, are solved exactly. Others are relaxed, which gives a
        bound, and rounded; HiGHS searches on where that is not within the gap of the bound.

        Args:
            objective: F1 or F2.
            limits: the most that F1 and F2 may be.
            gap: relative gap to the bound that is enough.
            seconds: time limit of HiGHS's search.
            known: a mask within the limits, if one is known, for want of a better one.

        Returns:
            The best solution found, or None where time ran out before there was one.

        Raises:
            InfeasibleProgramError: there is no solution.
            PlanSolverError: HiGHS ended with a status that this program cannot have.
        """
        end = time.monotonic() + seconds
        cost = self.costs[objective]
        masks = [] if known is None else [known]
        bound = 0.0
        exact = self._shape[1] == 1 or self.num_counts <= _SMALL
        # The relaxation of least memory is nearly whole, so that HiGHS is quick; and F1 rises so
        # steeply at this end of the front that a gap here is several times as large there.
        if not (exact or (objective == F2 and limits == UNLIMITED)):
            relaxed = self.solve(cost, limits)
            bound = relaxed.fun
            masks += self._rounded(objective, limits, relaxed)
            best = self._best(objective, masks, bound, gap)
            if best is not None and best.proven:
                return best
        # HiGHS takes a time limit below 0 for none.
        left = max(end - time.monotonic(), 0.01)
        result = self.solve(cost, limits, whole=True, gap=0.0 if exact else gap, seconds=left)
        bound = max(bound, result.get("mip_dual_bound") or 0.0)
        # HiGHS's tolerance may let a client be over its budget by some bytes: then the mask is
        # repaired like a rounded one, never returned as it is.
        if result.x is not None:
            counts = self.counts(result.x)
            search = self._search(self.deal(counts))
            fits = (counts @ self._extra <= self._spare).all()
            masks += [search.mask] if fits else self._repaired(search, objective, limits)
        return self._best(objective, masks, bound, gap)

    def solve(
        self,
        cost: NDArray[np.float64],
        limits: Limits = UNLIMITED,
        *,
        whole: bool = False,
        gap: float = 0.0,
        seconds: float | None = None,
    ) -> Any:
        """Solves the program for a cost of its variables: relaxed, or in whole numbers.

        Returns:
            scipy's result. Where time ran out, `x` is the best solution so far or None, and
            `mip_dual_bound`, where there is one, holds for all solutions.

        Raises:
            InfeasibleProgramError: there is no solution.
            PlanSolverError: HiGHS failed, or a relaxation was cut short: its value is no bound.
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
            options={"mip_rel_gap": gap} | ({} if seconds is None else {"time_limit": seconds}),
        )
        if result.status == 2:
            raise InfeasibleProgramError
        if result.status != 0 and not (whole and result.status == 1):  # 1: time ran out
            raise PlanSolverError(f"HiGHS ended with status {result.status}: {result.message}")
        return result

    def counts(self, variables: NDArray[np.float64]) -> NDArray[np.int64]:
        """Returns x as whole numbers [N, H]."""
        return np.rint(variables[: self.num_counts]).astype(np.int64).reshape(self._shape)

    def deal(self, counts: NDArray[np.int64]) -> Mask:
        """Turns counts into a mask, dealing the blocks of a kind round robin over the clients."""
        # Clients in their order and blocks in theirs: ties always break the same way, and a plan
        # that is made again is the same plan.
        mask = np.zeros((self._shape[0], len(self.problem.blocks)), dtype=np.bool_)
        for kind, given in zip(self.problem.kinds, counts.T.tolist(), strict=True):
            turn = 0
            for n, count in enumerate(given):
                mask[n, [kind[(turn + step) % len(kind)] for step in range(count)]] = True
                turn += count
        return mask

    def _rounded(self, objective: int, limits: Limits, relaxed: Any) -> list[Mask]:
        """Rounds a relaxed solution down and repairs it, at the prices of the relaxation."""
        prices = np.eye(2)[objective]
        # The dual value of a limit: how much the objective falls where it is a unit higher.
        prices[np.isfinite(limits)] -= relaxed.ineqlin.marginals[len(self._most) :]
        # A count that is whole but for HiGHS's tolerance must not lose a block.
        # Down, so that every budget holds; the repair then fills the room that is left.
        search = self._search(self.deal(self.counts(np.floor(relaxed.x + _TOLERANCE))))
        search.improve(prices.tolist(), UNLIMITED)
        return self._repaired(search, objective, limits)

    def _repaired(self, search: Search, objective: int, limits: Limits) -> list[Mask]:
        """Brings a mask within all limits and improves it there; none where that fails."""
        search.meet(limits)
        search.improve(np.eye(2)[objective].tolist(), limits)
        kept = (search.values() <= np.array(limits) + 2 * _KEEP_SLACK).all()
        return [search.mask] if kept and search.complete() else []

    def _best(self, objective: int, masks: list[Mask], bound: float, gap: float) -> Solution | None:
        if not masks:
            return None
        # The first of equal ones: a mask that was known before stays.
        values = [float(self.values(mask)[objective]) for mask in masks]
        value = min(values)
        found = max(0.0, (value - bound) / value) if value else 0.0
        return Solution(masks[values.index(value)], found, proven=found <= gap + _TOLERANCE)

    def _search(self, mask: Mask) -> Search:
        return Search(self.problem, self._weights, self._per_byte, mask)
