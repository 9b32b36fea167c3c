"""The mixed-integer program behind a plan, solved with HiGHS."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from zorba.planning.columns import ColumnPool, Found
from zorba.planning.highs import (
    InfeasibleProgramError,
    Relaxed,
    Rows,
    Vector,
    solve_relaxed,
    solve_whole,
)
from zorba.planning.problem import Mask, Problem
from zorba.planning.rounding import round_counts

Row = dict[int, float]  # column -> coefficient
Limit = tuple[Row, float]

# Bytes of a client's row are divided so that its spare memory reads as this. HiGHS lets a row be
# off by 1e-6, so one in 1e9 of the spare memory; the rest is caught exactly in `Program.minimize`.
_SPARE_UNITS = 1000.0

# How far a later solve may exceed the value of an earlier one, on objectives scaled to at most 1:
# an order under HiGHS's row tolerance of 1e-6, enough to keep the earlier solution feasible.
_KEEP_SLACK = 1e-7

# A search that lets plans lose too little for one to be good enough lets the next lose more.
_MORE = 4.0


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
    kind and sum_k k y[h, k] = sum_n x[n, h]. y need not be integer: for convex cost(k) the cheapest
    y puts its weight on the two integers around the mean coverage, and dealing the kind's
    activations round robin gives exactly those coverages. The same argument makes counts enough.

    Objectives are scaled to at most 1: `f1` by the sum of priorities, `f2` (its part that depends
    on the mask) by its value when every block is active.
    """

    def __init__(self, problem: Problem, min_coverage: int | None = None) -> None:
        """Builds the rows; `min_coverage` overrides the problem's, 0 allows uncovered blocks."""
        self.problem = problem
        self._lowest = problem.needed if min_coverage is None else min_coverage
        self._num_clients, self._num_kinds = len(problem.clients), len(problem.kinds)
        self._kind_extra = [problem.extra[kind[0]] for kind in problem.kinds]
        self._width = self._num_clients + 1 - self._lowest
        self._pool = ColumnPool(problem, self._width)
        self._rows: list[tuple[Row, float, float]] = []
        self._upper: list[float] = []
        self._integer: list[int] = []
        self._add_clients()
        first = len(self._rows)
        self._add_coverage()
        self._coverage_rows = slice(first, len(self._rows))
        self.f1 = self._coverage_objective()
        self._f2_scale = math.fsum(sum(problem.extra) / budget for budget in problem.budgets)
        self.f2 = self._memory_objective()

    def missing_coverage(self) -> Row:
        """Returns the objective that counts how many clients blocks lack to `min_coverage`."""
        wanted = self.problem.needed
        return {
            self._y(h, k): float(wanted - k)
            for h in range(self._num_kinds)
            for k in range(self._lowest, wanted)
        }

    def value(self, objective: Row, mask: Mask) -> float:
        """Returns a scaled objective at a mask."""
        coverage = mask.sum(axis=0) - self._lowest
        y = [
            np.bincount(coverage[list(kind)], minlength=self._width) for kind in self.problem.kinds
        ]
        v = np.concatenate([self._counts_of(mask).ravel(), *y]).tolist()
        return math.fsum(c * v[i] for i, c in objective.items())

    def minimize(
        self,
        objective: Row,
        limits: Sequence[Limit] = (),
        *,
        gap: float,
        seconds: float,
        known: Mask | None = None,
    ) -> Solution | None:
        """Minimizes an objective while others stay within limits.

        The relaxation gives a bound and, rounded, often a plan within the gap of it. Where not,
        whole rows are put together, see `ColumnPool`; HiGHS searches last. Budgets hold exactly: a
        solution that is over one by less than HiGHS can see is cut off, and the program solved
        again.

        Args:
            objective: `f1`, `f2` or `missing_coverage()`.
            limits: objectives and the most they may be.
            gap: relative gap to the bound at which to stop.
            seconds: time limit.
            known: a mask that satisfies the program, if one is known; returned unless a better one
                turns up.

        Returns:
            The best solution found, or None where time ran out before there was one.

        Raises:
            InfeasibleProgramError: there is no solution.
            PlanSolverError: HiGHS ended with a status that this program cannot have.
        """
        end = time.monotonic() + seconds
        relaxed = solve_relaxed(self._arrays(objective, limits, self._rows))
        bound = relaxed.value
        masks = [] if known is None else [known]
        masks += self._rounded(objective, limits, relaxed, gap)
        best = self._best(objective, masks, bound, gap)
        if best and best.proven:
            return best
        if gap and bound:
            half = (end - time.monotonic()) / 2  # the other for HiGHS alone
            pool = self._combined(objective, limits, relaxed, masks, gap, half)
            bound = pool.bound
            if pool.counts is not None:
                masks.append(self._deal(pool.counts.tolist()))
            best = self._best(objective, masks, bound, gap)
            if best and best.proven:
                return best
        return self._searched(objective, limits, relaxed, masks, bound, gap, end)

    def _searched(
        self,
        objective: Row,
        limits: Sequence[Limit],
        relaxed: Relaxed,
        masks: list[Mask],
        bound: float,
        gap: float,
        end: float,
    ) -> Solution | None:
        """Returns what HiGHS finds, or the best of `masks` if that is better.

        A plan that is good enough gives no client a block whose reduced cost is above what such a
        plan may lose. Without these the program is small. Where it has no plan that is good enough,
        neither has the whole one, which is a better bound; then more is let in.
        """
        allowed = bound / (1 - gap) - relaxed.value if gap and bound else math.inf
        most = np.abs(relaxed.reduced).max()
        while (left := end - time.monotonic()) > 0:
            if allowed >= most:  # nothing is left out
                allowed = math.inf
            rows = self._arrays(objective, limits, self._rows)
            reduced = np.zeros(len(rows.cost))
            reduced[: len(relaxed.reduced)] = relaxed.reduced  # others came with `_forbid`
            left_out = relaxed.value + allowed  # the least objective of plans that are left out
            ended = True
            try:
                found = solve_whole(rows.limit(reduced, allowed), self._integers(), gap, left)
            except InfeasibleProgramError:
                if math.isinf(allowed):
                    raise
                bound = max(bound, left_out)
            else:
                bound, ended = max(bound, min(left_out, found.bound)), found.ended
                if found.v is not None:
                    counts = self._counts(found.v).tolist()
                    over = [n for n, row in enumerate(counts) if self._used(row) > self._spare(n)]
                    for n in over:
                        self._forbid(n, counts[n])
                    if over:
                        continue
                    masks.append(self._deal(counts))
            best = self._best(objective, masks, bound, gap)
            if best and (best.proven or math.isinf(allowed)):
                return replace(best, proven=ended or best.proven)
            allowed *= _MORE
        return self._best(objective, masks, bound, gap)

    def _rounded(
        self, objective: Row, limits: Sequence[Limit], relaxed: Relaxed, gap: float
    ) -> list[Mask]:
        """Returns the relaxed solution rounded to a mask within all limits, if that worked."""
        f1_limit = min((bound for row, bound in limits if row is self.f1), default=math.inf)
        f2_limit = min((bound for row, bound in limits if row is self.f2), default=math.inf)
        if objective is self.f2:
            f2_limit = min(f2_limit, relaxed.value * (1 + gap / 2))
        elif objective is not self.f1:
            return []
        found = round_counts(self.problem, self._x(relaxed.v), f2_limit * self._f2_scale)
        masks = [self._deal(counts.tolist()) for counts in found]
        return [mask for mask in masks if self.value(self.f1, mask) <= f1_limit]

    def _combined(
        self,
        objective: Row,
        limits: Sequence[Limit],
        relaxed: Relaxed,
        masks: list[Mask],
        gap: float,
        seconds: float,
    ) -> Found:
        """Looks for the best mask of whole rows, see `ColumnPool`."""
        for mask in masks:
            self._pool.add(self._counts_of(mask))
        self._pool.add(np.floor(self._x(relaxed.v) + 1e-6).astype(np.int64))
        # Columns fit to the byte, so they need no rows of clients, nor those of `_forbid`.
        rows = self._arrays(objective, limits, self._rows[self._coverage_rows])
        return self._pool.search(rows, relaxed.value, gap, seconds)

    def _best(self, objective: Row, masks: list[Mask], bound: float, gap: float) -> Solution | None:
        if not masks:
            return None
        mask = min(masks, key=lambda m: self.value(objective, m))
        value = self.value(objective, mask)
        found_gap = max(0.0, (value - bound) / value) if value else 0.0
        return Solution(mask, found_gap, proven=found_gap <= gap)

    def _counts_of(self, mask: Mask) -> NDArray[np.int64]:
        kinds = self.problem.kinds
        return np.stack([mask[:, list(kind)].sum(axis=1) for kind in kinds], axis=1)

    def _x(self, x: Vector) -> Vector:
        size = self._num_clients * self._num_kinds
        return x[:size].reshape(self._num_clients, self._num_kinds)

    def _counts(self, x: Vector) -> NDArray[np.int64]:
        return np.rint(self._x(x)).astype(np.int64)

    def _integers(self) -> NDArray[np.int64]:
        return np.array(self._integer, dtype=np.int64)

    def _arrays(
        self, objective: Row, limits: Sequence[Limit], rows: Sequence[tuple[Row, float, float]]
    ) -> Rows:
        from scipy.sparse import csr_array

        rows = [*rows, *((row, -np.inf, bound + _KEEP_SLACK) for row, bound in limits)]
        cost = np.zeros(len(self._upper))
        cost[list(objective)] = list(objective.values())
        entries = [(i, j, v) for i, (row, _, _) in enumerate(rows) for j, v in row.items()]
        i, j, v = zip(*entries, strict=True)
        matrix = csr_array((v, (i, j)), shape=(len(rows), len(cost)))
        low, high = (np.array([row[k] for row in rows]) for k in (1, 2))
        upper = np.array(self._upper, dtype=np.float64)
        return Rows(cost, matrix, low, high, np.zeros(len(upper)), upper)

    def _add_clients(self) -> None:
        problem = self.problem
        for n in range(self._num_clients):
            spare = self._spare(n)
            most = [
                min(len(kind), spare // extra) if extra else len(kind)
                for kind, extra in zip(problem.kinds, self._kind_extra, strict=True)
            ]
            self._upper.extend(most)
            self._integer.extend([1] * self._num_kinds)
            columns = range(n * self._num_kinds, (n + 1) * self._num_kinds)
            fit = min(problem.max_active, num_fitting(problem, n))
            self._rows.append((dict.fromkeys(columns, 1.0), problem.min_active, fit))
            # The bounds above often say it all (always, where blocks are equal).
            if self._used(most) > spare:
                units = [_SPARE_UNITS * extra / spare for extra in self._kind_extra]
                row = {j: u for j, u in zip(columns, units, strict=True) if u}
                self._rows.append((row, -np.inf, _SPARE_UNITS))

    def _add_coverage(self) -> None:
        counts = range(self._lowest, self._num_clients + 1)
        self._first_y = len(self._upper)
        for h, kind in enumerate(self.problem.kinds):
            columns = [self._y(h, k) for k in counts]
            self._upper.extend([float(len(kind))] * len(counts))
            self._integer.extend([0] * len(counts))
            self._rows.append((dict.fromkeys(columns, 1.0), len(kind), len(kind)))
            total: Row = {n * self._num_kinds + h: -1.0 for n in range(self._num_clients)}
            total |= {j: float(k) for j, k in zip(columns, counts, strict=True)}
            self._rows.append((total, 0.0, 0.0))

    def _coverage_objective(self) -> Row:
        priorities, covered = self.problem.priorities, self.problem.covered
        scale = math.fsum(priorities)
        return {
            self._y(h, k): priorities[kind[0]] / scale / (k + covered)
            for h, kind in enumerate(self.problem.kinds)
            for k in range(self._lowest, self._num_clients + 1)
            if k + covered
        }

    def _memory_objective(self) -> Row:
        if not self._f2_scale:
            return {}
        return {
            n * self._num_kinds + h: extra / budget / self._f2_scale
            for n, budget in enumerate(self.problem.budgets)
            for h, extra in enumerate(self._kind_extra)
        }

    def _forbid(self, client: int, counts: list[int]) -> None:
        """Cuts off these counts, and larger ones, for each client that they overfill by as little.

        A switch a kind is 1 where the client activates at least that many of it; not all may be.
        """
        used = self._used(counts)
        for n in range(self._num_clients):
            if not self._spare(client) <= self._spare(n) < used:
                continue
            switches: Row = {}
            for h, count in enumerate(counts):
                if not count or not self._kind_extra[h]:
                    continue
                x, switch = n * self._num_kinds + h, len(self._upper)
                self._upper.append(1.0)
                self._integer.append(1)
                room = max(self._upper[x] - count + 1, 1.0)
                self._rows.append(({x: 1.0, switch: -room}, -np.inf, count - 1.0))
                switches[switch] = 1.0
            self._rows.append((switches, -np.inf, len(switches) - 1.0))

    def _deal(self, counts: list[list[int]]) -> Mask:
        """Turns counts into a mask, dealing the blocks of a kind round robin over the clients."""
        mask = np.zeros((self._num_clients, len(self.problem.blocks)), dtype=np.bool_)
        for h, kind in enumerate(self.problem.kinds):
            turn = 0
            for n in range(self._num_clients):
                for step in range(counts[n][h]):
                    mask[n, kind[(turn + step) % len(kind)]] = True
                turn += counts[n][h]
        return mask

    def _y(self, kind: int, count: int) -> int:
        return self._first_y + kind * self._width + count - self._lowest

    def _used(self, counts: list[int]) -> int:
        return sum(c * extra for c, extra in zip(counts, self._kind_extra, strict=True))

    def _spare(self, client: int) -> int:
        return self.problem.spare[client]


def num_fitting(problem: Problem, client: int) -> int:
    """Returns how many blocks fit into a client's spare memory, the smallest first."""
    used = 0
    for count, extra in enumerate(sorted(problem.extra)):
        used += extra
        if used > problem.spare[client]:
            return count
    return len(problem.extra)
