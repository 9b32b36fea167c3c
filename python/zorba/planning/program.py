"""The integer program behind a plan: HiGHS solves it through scipy."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zorba.planning.problem import Mask, Problem
from zorba.planning.rounding import Search

F1, F2 = 0, 1  # of values, costs and limits
UNLIMITED = (math.inf, math.inf)

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
    """A feasible mask and how well it was proven.

    Attributes:
        mask: bool [N, B].
        gap: relative gap between the objective and its bound.
        proven: whether the gap asked for was reached before the time limit.
    """

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
        elastic: adds variables over[n], the bytes (in units of `unit`) that client n is over its
            budget, instead of forbidding it: for a diagnosis.
    """

    def __init__(
        self, problem: Problem, lowest: int | None = None, *, elastic: bool = False
    ) -> None:
        from scipy.sparse import block_array, csr_array, eye_array, kron

        self.problem = problem
        self._lowest = problem.needed if lowest is None else lowest
        self._shape = clients, kinds = len(problem.clients), len(problem.kinds)
        sizes = np.array([len(kind) for kind in problem.kinds])
        self._extra = np.array([problem.extra[kind[0]] for kind in problem.kinds], dtype=np.int64)
        self._spare = np.array(problem.spare, dtype=np.int64)
        self.covers = np.arange(self._lowest, clients + 1)
        self.unit = max(int(self._extra.max()), 1) / _BLOCK_UNITS

        def each(count: int, row: Sequence[float] | NDArray[Any]) -> Any:
            return kron(eye_array(count), csr_array(np.array([row], dtype=np.float64)))

        active = each(clients, np.ones(kinds))
        over = -eye_array(clients) if elastic else None
        totals = kron(csr_array(np.ones((1, clients))), eye_array(kinds))
        blocks = [
            [each(clients, self._extra / self.unit), None, over],
            [active, None, None],
            [-active, None, None],
            [None, each(kinds, np.ones(len(self.covers))), None],
            [-totals, each(kinds, self.covers), None],
        ]
        rows = block_array(blocks if elastic else [row[:2] for row in blocks], format="csr")
        self._less, self._equal = rows[: 3 * clients], rows[3 * clients :]
        # How many fit, the smallest first, is more than the relaxation sees in a row of bytes.
        fit = np.searchsorted(np.cumsum(sorted(problem.extra)), self._spare, side="right")
        most = np.full(clients, problem.max_active) if elastic else fit.clip(0, problem.max_active)
        self._most = np.concatenate(
            [self._spare / self.unit, most, np.full(clients, -problem.min_active)]
        )
        self._right = np.concatenate([sizes, np.zeros(kinds)])
        room = self._spare[:, None] // np.maximum(self._extra, 1)[None, :]
        upper = np.where(self._extra > 0, np.minimum(sizes, room), sizes)
        self._upper = np.concatenate(
            [
                np.tile(sizes, clients) if elastic else upper.ravel(),
                np.repeat(sizes, len(self.covers)),
                np.full(clients if elastic else 0, np.inf),
            ]
        )
        self.num_counts = clients * kinds
        # y of a mask is whole, and need not be told so. But equal blocks are many equal choices,
        # among which HiGHS decides at once only where it may branch on their sum.
        self._integer = np.ones(len(self._upper), dtype=np.int64)
        self._integer[self.num_counts :] = kinds == 1 and not elastic
        self._weights = np.array(problem.priorities) / math.fsum(problem.priorities)
        scale = math.fsum(sum(problem.extra) / budget for budget in problem.budgets)
        self._per_byte = 1 / np.array(problem.budgets, dtype=np.float64) / (scale or 1.0)
        # Whether masks save memory at all: where idle blocks stay on the device they do not.
        self.saves_memory = scale > 0
        self.costs = np.zeros((2, len(self._upper)))
        of_kind = np.array([self._weights[kind[0]] for kind in problem.kinds])
        cost = of_kind[:, None] / np.maximum(self.covers + problem.covered, 1)
        self.costs[F1, self.num_counts : self.num_counts + cost.size] = cost.ravel()
        self.costs[F2, : self.num_counts] = np.outer(self._per_byte, self._extra).ravel()

    def values(self, mask: Mask) -> NDArray[np.float64]:
        """Returns F1 and F2 of a mask, scaled."""
        return self._search(mask).values()

    def minimize(
        self,
        objective: int,
        limits: Sequence[float] = UNLIMITED,
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
            seconds: time limit of the search.
            known: a mask that satisfies the program, if one is known; returned unless a better one
                turns up.

        Returns:
            The best solution found, or None where time ran out before there was one.

        Raises:
            InfeasibleProgramError: there is no solution.
            PlanSolverError: HiGHS ended with a status that this program cannot have.
        """
        end = time.monotonic() + seconds
        masks = [] if known is None else [known]
        bound = 0.0
        exact = self._shape[1] == 1 or self.num_counts <= _SMALL
        # The relaxation of least memory is nearly whole, so that HiGHS is quick; and F1 rises so
        # steeply at this end of the front that a gap here is several times as large there.
        if not (exact or (objective == F2 and limits == UNLIMITED)):
            relaxed = self.solve(self.costs[objective], limits)
            bound = relaxed.fun
            masks += self._rounded(objective, limits, relaxed)
            best = self._best(objective, masks, bound, gap)
            if best is not None and best.proven:
                return best
        result = self.solve(
            self.costs[objective],
            limits,
            whole=True,
            gap=0.0 if exact else gap,
            # HiGHS takes a limit below 0 for none.
            seconds=max(end - time.monotonic(), 0.01),
        )
        bound = max(bound, result.get("mip_dual_bound") or 0.0)
        if result.x is not None:
            masks += self._repaired(self.counts(result.x), objective, limits)
        return self._best(objective, masks, bound, gap)

    def solve(
        self,
        cost: NDArray[np.float64],
        limits: Sequence[float] = UNLIMITED,
        *,
        whole: bool = False,
        gap: float = 0.0,
        seconds: float | None = None,
    ) -> Any:
        """Solves the program for a cost of its variables: relaxed, or in whole numbers.

        Returns:
            scipy's result. Where time ran out, `x` is the best solution so far or None, and
            `mip_dual_bound` holds for all solutions.

        Raises:
            InfeasibleProgramError: there is no solution.
            PlanSolverError: HiGHS failed, or time ran out on a relaxation: its value is no bound.
        """
        from scipy.optimize import linprog
        from scipy.sparse import csr_array, vstack

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
        if result.status != 0 and not (whole and result.status == 1):
            raise PlanSolverError(f"HiGHS ended with status {result.status}: {result.message}")
        return result

    def counts(self, variables: NDArray[np.float64]) -> NDArray[np.int64]:
        """Returns x as whole numbers [N, H]."""
        return np.rint(variables[: self.num_counts]).astype(np.int64).reshape(self._shape)

    def deal(self, counts: NDArray[np.int64]) -> Mask:
        """Turns counts into a mask, dealing the blocks of a kind round robin over the clients."""
        mask = np.zeros((self._shape[0], len(self.problem.blocks)), dtype=np.bool_)
        for kind, given in zip(self.problem.kinds, counts.T.tolist(), strict=True):
            turn = 0
            for n, count in enumerate(given):
                mask[n, [kind[(turn + step) % len(kind)] for step in range(count)]] = True
                turn += count
        return mask

    def _rounded(self, objective: int, limits: Sequence[float], relaxed: Any) -> list[Mask]:
        """Rounds a relaxed solution down and repairs it, at the prices of the relaxation."""
        prices = [0.0, 0.0]
        prices[objective] = 1.0
        kept = np.flatnonzero(np.isfinite(limits))
        for i, price in zip(kept, relaxed.ineqlin.marginals[len(self._most) :], strict=True):
            prices[i] -= price  # of a unit more of the limit
        # What is whole but for the tolerance of HiGHS must not lose a block.
        down = self.counts(np.floor(relaxed.x + _TOLERANCE))
        search = self._search(self.deal(down))
        search.improve(prices, UNLIMITED)
        search.meet(limits)
        return self._finished(search, objective, limits)

    def _repaired(
        self, counts: NDArray[np.int64], objective: int, limits: Sequence[float]
    ) -> list[Mask]:
        """Turns counts of HiGHS, which may be some bytes over a budget, into a mask that is not."""
        search = self._search(self.deal(counts))
        if not (counts @ self._extra > self._spare).any():
            return [search.mask]
        search.make_room()
        return self._finished(search, objective, limits)

    def _finished(self, search: Search, objective: int, limits: Sequence[float]) -> list[Mask]:
        """Improves the objective itself within limits; no mask where one is not kept."""
        search.improve([float(objective == F1), float(objective == F2)], limits)
        kept = (search.values() <= np.array(limits) + 2 * _KEEP_SLACK).all()
        return [search.mask] if kept and search.complete() else []

    def _best(self, objective: int, masks: list[Mask], bound: float, gap: float) -> Solution | None:
        if not masks:
            return None
        values = [float(self.values(mask)[objective]) for mask in masks]
        value = min(values)
        found = max(0.0, (value - bound) / value) if value else 0.0
        return Solution(masks[values.index(value)], found, proven=found <= gap + _TOLERANCE)

    def _search(self, mask: Mask) -> Search:
        return Search(self.problem, self._weights, self._per_byte, mask)
