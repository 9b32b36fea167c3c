"""Plans out of whole rows: which blocks a client could activate together, priced by a relaxation.

Column generation (Dantzig and Wolfe 1960). A *column* is one choice of counts for one client that
fits its budget; clients of equal budgets share theirs. The master program mixes columns. Its dual
prices say what a block on a client is worth, and knapsacks turn prices into better columns; they
also give a bound (Lagrange) that is tighter than that of the relaxed program, which may fill a
budget with parts of blocks. The mixture leaves few clients undecided, so that choosing whole
columns is an easy program.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zorba.planning.highs import (
    InfeasibleProgramError,
    PlanSolverError,
    Relaxed,
    Rows,
    Vector,
    solve_relaxed,
    solve_whole,
)
from zorba.planning.knapsack import Knapsacks
from zorba.planning.problem import Problem
from zorba.planning.rounding import Counts

_MAX_ITERATIONS = 100
# Search for columns ends where the mixture is this near to a bound, in parts of the gap asked for,
# and after this part of the time.
_NEAR = 0.4
_TIME_FOR_COLUMNS = 0.4
# Prices jump from one iteration to the next: new columns are made for a mean of the best ones so
# far and the latest (Wentges 1997).
_SMOOTHING = 0.6


class Found(NamedTuple):
    """The best choice of columns, if one satisfies the rows, and a bound of the objective."""

    counts: Counts | None
    bound: float


class ColumnPool:
    """The columns found so far; later searches start from those that earlier ones used.

    Args:
        problem: what to plan.
        width: variables y of a kind, see `Program`.
    """

    def __init__(self, problem: Problem, width: int) -> None:
        self._width = width
        self._problem = problem
        self._sizes = np.array([len(kind) for kind in problem.kinds])
        self._extra = np.array([problem.extra[kind[0]] for kind in problem.kinds], dtype=np.int64)
        budgets = np.array([problem.spare, problem.budgets], dtype=np.int64)
        _, self._first, self._class = np.unique(
            budgets, axis=1, return_index=True, return_inverse=True
        )
        self._members = np.bincount(self._class)
        self._spare = budgets[0, self._first]
        self._knapsacks = Knapsacks(self._spare, self._extra, self._sizes)
        self._columns: dict[tuple[int, bytes], NDArray[np.int64]] = {}

    def add(self, counts: Counts) -> None:
        """Adds the rows of counts [N, H] that fit."""
        self._add(self._class, counts)

    def search(self, rows: Rows, bound: float, gap: float, seconds: float) -> Found:
        """Looks for the best choice of columns, making new ones.

        Args:
            rows: the program that is to be solved, less what a client's counts must satisfy; each
                row an equation or an upper limit, and the same for clients of a class.
            bound: of its objective, from the relaxation.
            gap: relative gap to the bound that is enough.
            seconds: time limit.
        """
        start = time.monotonic()
        allowed = bound / (1 - gap) - bound
        mixture: Relaxed | None = None
        best_prices: Vector | None = None
        lagrange = -np.inf
        for _ in range(_MAX_ITERATIONS):
            mixture = self._mix(rows)
            if mixture is None or mixture.value - max(bound, lagrange) <= _NEAR * allowed:
                break
            if time.monotonic() - start > _TIME_FOR_COLUMNS * seconds:
                break
            latest = mixture.prices[: len(rows.low)]
            # The solver's tolerance lets an upper limit's price be above 0; no bound follows there.
            latest = prices = np.where(rows.low < rows.high, np.minimum(latest, 0.0), latest)
            if best_prices is not None:
                prices = _SMOOTHING * best_prices + (1 - _SMOOTHING) * prices
            for tried in (prices, latest):
                worth = self._worth(rows, tried)
                counts = self._knapsacks.pack(worth)
                value = self._lagrange(rows, tried, (worth * counts).sum(axis=1))
                if value > lagrange:
                    lagrange, best_prices = value, tried
                self._limit_active(counts, worth)
                if self._add(np.arange(len(counts)), counts):
                    break
            else:
                break
        else:
            mixture = self._mix(rows)  # of the latest columns too
        if best_prices is not None:
            most = self._knapsacks.most(self._worth(rows, best_prices))
            bound = max(bound, self._lagrange(rows, best_prices, most))
        if mixture is None:
            return Found(None, bound)
        wanted = bound / (1 - gap)
        slack = max(0.9 * (wanted - mixture.value) / wanted, 0.1 * gap)
        # No column of a plan that is good enough costs more; some room, to find one that almost is.
        master = self._master(rows).limit(mixture.reduced, 2 * max(wanted - mixture.value, 0.0))
        left = seconds - (time.monotonic() - start)
        chosen = self._choose(master, slack, max(left / 2, 0.1))
        # Others come back if prices ask for them; without them the next master is quick.
        used = [key for key, share in zip(self._columns, mixture.v, strict=False) if share]
        self._columns = {key: self._columns[key] for key in used}
        if chosen is not None:
            self.add(chosen)
        return Found(chosen, bound)

    def _add(self, classes: NDArray[np.int64], counts: Counts) -> int:
        problem, before = self._problem, len(self._columns)
        active = counts.sum(axis=1)
        fits = (counts @ self._extra <= self._spare[classes]) & (active >= problem.min_active)
        fits &= active <= problem.max_active
        for i in np.flatnonzero(fits).tolist():
            self._columns.setdefault((int(classes[i]), counts[i].tobytes()), counts[i].copy())
        return len(self._columns) - before

    def _mix(self, rows: Rows) -> Relaxed | None:
        """Solves the master program in parts of columns; None where that gives nothing."""
        if not self._columns:
            return None
        try:
            return solve_relaxed(self._master(rows))
        except (InfeasibleProgramError, PlanSolverError):
            return None

    def _choose(self, master: Rows, gap: float, seconds: float) -> Counts | None:
        """Solves the master program in whole columns; None where that gives nothing."""
        keys = list(self._columns)
        integer = np.zeros(len(master.cost), dtype=np.int64)
        integer[: len(keys)] = 1
        try:
            chosen = solve_whole(master, integer, gap, seconds).v
        except (InfeasibleProgramError, PlanSolverError):
            return None
        if chosen is None:
            return None
        counts = np.zeros((len(self._class), len(self._sizes)), dtype=np.int64)
        free = [np.flatnonzero(self._class == c).tolist() for c in range(len(self._members))]
        for key, times in zip(keys, np.rint(chosen).astype(int).tolist(), strict=False):
            for _ in range(times):
                counts[free[key[0]].pop()] = self._columns[key]
        return counts

    def _master(self, rows: Rows) -> Rows:
        """The program over how many clients of a class take each column, and y."""
        from scipy.sparse import block_array, csr_array

        kinds, num = len(self._sizes), len(self._columns)
        size = len(self._class) * kinds
        columns = np.array(list(self._columns.values()))
        classes = np.array([c for c, _ in self._columns])
        which, kind = np.nonzero(columns)
        entries = (self._first[classes[which]] * kinds + kind, which)
        mixed = csr_array((columns[which, kind].astype(float), entries), shape=(size, num))
        taken = csr_array(
            (np.ones(num), (classes, np.arange(num))), shape=(len(self._members), num)
        )
        of_x, of_y = rows.matrix[:, :size], rows.matrix[:, size:]
        return Rows(
            np.concatenate([mixed.T @ rows.cost[:size], rows.cost[size:]]),
            block_array([[of_x @ mixed, of_y], [taken, None]], format="csr"),
            np.concatenate([rows.low, self._members]),
            np.concatenate([rows.high, self._members]),
            np.concatenate([np.zeros(num), rows.least[size:]]),
            np.concatenate([self._members[classes], rows.most[size:]]),
        )

    def _spoils(self, rows: Rows, prices: Vector) -> Vector:
        """What a unit of each variable earns at these prices, less its cost."""
        return np.asarray(rows.matrix.T @ prices - rows.cost)

    def _worth(self, rows: Rows, prices: Vector) -> Vector:
        """What a block of each kind earns on a client of each class: [classes, H]."""
        size = len(self._class) * len(self._sizes)
        return self._spoils(rows, prices)[:size].reshape(-1, len(self._sizes))[self._first]

    def _lagrange(self, rows: Rows, prices: Vector, most: Vector) -> float:
        """Returns the Lagrangian at these prices, where clients of a class earn `most` each.

        A bound of every plan's objective if nobody can earn more. The y of a kind sum to its size,
        so the best of them takes it all.
        """
        size, kinds = len(self._class) * len(self._sizes), len(self._sizes)
        of_y = self._spoils(rows, prices)[size : size + kinds * self._width]
        earned = of_y.reshape(kinds, self._width).max(axis=1)
        return float(prices @ rows.high - self._sizes @ earned - self._members @ most)

    def _limit_active(self, counts: Counts, worth: Vector) -> None:
        """Leaves out the least worthy blocks, or adds the smallest, to keep the limits on how many.

        Not the best choice under these limits, but the price of a column is that of any other.
        """
        problem = self._problem
        active = counts.sum(axis=1)
        for n in np.flatnonzero(active > problem.max_active).tolist():
            for h in np.argsort(worth[n]).tolist():
                counts[n, h] -= min(counts[n, h], max(counts[n].sum() - problem.max_active, 0))
        for n in np.flatnonzero(active < problem.min_active).tolist():
            for h in np.argsort(self._extra, kind="stable").tolist():
                lacking = max(problem.min_active - counts[n].sum(), 0)
                counts[n, h] += min(self._sizes[h] - counts[n, h], lacking)
