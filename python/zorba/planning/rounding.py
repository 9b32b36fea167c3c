"""Rounds a relaxed solution to whole blocks: good plans in milliseconds, checked against its bound.

The relaxation of the program is tight (a client has about one fractional block) but HiGHS's own
heuristics fill many unequal knapsacks slowly. Rounding down and swapping often lands within the gap
of the relaxation's bound, which is then the proof; HiGHS searches only where it does not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from zorba.planning.problem import Problem

Counts = NDArray[np.int64]  # [N, H]: how many blocks of kind h client n activates

# Coverage that is still missing is worth more than any priority.
_MISSING = 1e6
# Gains below this are rounding errors of F1 scaled to at most 1; it also makes the search end.
_LEAST_GAIN = 1e-12


def round_counts(problem: Problem, relaxed: NDArray[np.float64], f2_limit: float) -> list[Counts]:
    """Returns whole counts near `relaxed` of small F1, within budgets and the limit on F2.

    Args:
        problem: what to respect.
        relaxed: solution of the relaxation, [N, H].
        f2_limit: the most that sum_n (memory of active blocks)_n / C_n may be.

    Returns:
        Feasible counts, from two orders of the search; none where rounding missed a lower limit
        (coverage or active blocks).
    """
    sizes = np.array([len(kind) for kind in problem.kinds])
    found: list[Counts] = []
    # Adding first is better where only budgets bind. Where F2 does, swapping first fills the
    # clients whose bytes weigh least in F2 before further blocks use up the limit elsewhere.
    for add_first in (True, False):
        search = _Search(problem, np.floor(relaxed + 1e-6).astype(np.int64), f2_limit)
        if not search.within_limits():
            break
        if add_first:
            search.add()
        improved = True
        while improved:
            improved = search.swap() | search.exchange() | search.add()
        counts = search.counts
        covered = (counts.sum(axis=0) >= problem.needed * sizes).all()
        if covered and (counts.sum(axis=1) >= problem.min_active).all():
            found.append(counts)
    return found


class _Search:
    def __init__(self, problem: Problem, counts: Counts, f2_limit: float) -> None:
        self.counts = counts
        self.sizes = np.array([len(kind) for kind in problem.kinds])
        self._extra = np.array([problem.extra[kind[0]] for kind in problem.kinds])
        weights = np.array([problem.priorities[kind[0]] for kind in problem.kinds])
        self._weights = weights / sum(problem.priorities)
        self._budgets = np.array(problem.budgets, dtype=np.float64)
        self._least = problem.needed * self.sizes
        self._covered = problem.covered
        self._free = np.array(problem.spare) - counts @ self._extra
        self._min_active = problem.min_active
        self._slots = problem.max_active - counts.sum(axis=1)
        self._room = f2_limit - float((counts @ self._extra / self._budgets).sum())

    def within_limits(self) -> bool:
        return bool((self._free >= 0).all() and (self._slots >= 0).all() and self._room >= 0)

    def add(self) -> bool:
        """Activates the block of the largest gain that fits somewhere, until none does."""
        improved = False
        while True:
            step = self._extra[None, :] / self._budgets[:, None]
            fits = (self._extra[None, :] <= self._free[:, None]) & (step <= self._room)
            fits &= (self.counts < self.sizes[None, :]) & (self._slots > 0)[:, None]
            # Among clients, the one where these bytes are the smallest share of the budget.
            gain = np.where(fits, self._gain()[None, :] - 1e-9 * step, -np.inf)
            n, h = np.unravel_index(int(gain.argmax()), gain.shape)
            if gain[n, h] < _LEAST_GAIN:
                return improved
            self._change(int(n), int(h), 1)
            improved = True

    def swap(self) -> bool:
        """Swaps one block for another within each client while F1 falls; says if any was."""
        improved = False
        for n in np.argsort(-self._budgets, kind="stable").tolist():
            while True:
                delta = self._gain()[None, :] - self._loss()[:, None]  # [out, in]
                more = self._extra[None, :] - self._extra[:, None]
                row = self.counts[n]
                fits = (more <= self._free[n]) & (more / self._budgets[n] <= self._room)
                fits &= (row > 0)[:, None] & (row < self.sizes)[None, :]
                np.fill_diagonal(fits, False)
                delta = np.where(fits, delta, -np.inf)
                out, into = np.unravel_index(int(delta.argmax()), delta.shape)
                if delta[out, into] < _LEAST_GAIN:
                    break
                self._change(n, int(out), -1)
                self._change(n, int(into), 1)
                improved = True
        return improved

    def exchange(self) -> bool:
        """Swaps blocks between clients while F1 falls; says if any was.

        A block goes where it is the smallest share of the budget and comes from where it is the
        largest, so one pair of clients a pair of blocks is enough to look at.
        """
        improved = False
        kinds = np.arange(len(self.sizes))
        while True:
            takes = (self._extra[None, :] <= self._free[:, None]) & (self._slots > 0)[:, None]
            takes &= self.counts < self.sizes[None, :]
            gives = (self.counts > 0) & (self._active() > self._min_active)[:, None]
            taker = np.where(takes, self._budgets[:, None], -np.inf).argmax(axis=0)
            giver = np.where(gives, self._budgets[:, None], np.inf).argmin(axis=0)
            freed = self._extra / self._budgets[giver]
            step = self._extra / self._budgets[taker]
            delta = self._gain()[None, :] - self._loss()[:, None]  # [out, in]
            fits = step[None, :] - freed[:, None] <= self._room
            fits &= gives[giver, kinds][:, None] & takes[taker, kinds][None, :]
            np.fill_diagonal(fits, False)
            delta = np.where(fits, delta, -np.inf)
            out, into = np.unravel_index(int(delta.argmax()), delta.shape)
            if delta[out, into] < _LEAST_GAIN:
                return improved
            self._change(int(giver[out]), int(out), -1)
            self._change(int(taker[into]), int(into), 1)
            improved = True

    def _active(self) -> Counts:
        return np.asarray(self.counts.sum(axis=1))

    def _gain(self) -> NDArray[np.float64]:
        """Returns how much F1 falls if one more client activates a block of each kind."""
        total = self.counts.sum(axis=0)
        mean = np.maximum(total // self.sizes + self._covered, 1)
        return np.where(total < self._least, _MISSING, self._weights / (mean * (mean + 1.0)))

    def _loss(self) -> NDArray[np.float64]:
        """Returns how much F1 rises if one client fewer does."""
        total = self.counts.sum(axis=0) - 1
        mean = np.maximum(total // self.sizes + self._covered, 1)
        return np.where(total < self._least, _MISSING, self._weights / (mean * (mean + 1.0)))

    def _change(self, n: int, h: int, step: int) -> None:
        self.counts[n, h] += step
        self._free[n] -= step * self._extra[h]
        self._slots[n] -= step
        self._room -= step * self._extra[h] / self._budgets[n]
