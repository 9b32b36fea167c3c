"""Rounds a relaxed solution to whole blocks, and repairs what rounding breaks.

The relaxation fills budgets to the last byte with parts of blocks; rounded down it leaves room.
Each client in turn makes the change of up to three blocks that is worth most at the prices of the
relaxation, until none is worth anything. Nothing is random: equal problems get equal masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from zorba.planning.problem import Mask, Problem, Vector

# Coverage that is still missing is worth more than any priority or memory.
_MISSING = 1e6
# Smaller gains are rounding errors of objectives scaled to at most 1; this also ends the search.
_LEAST_GAIN = 1e-12
_MAX_PASSES = 50
# Sets of three of more blocks than this are too many to look at.
_MANY_BLOCKS = 48


class Search:
    """A mask, bool [N, B], that changes step by step; each step fits the budget of its client."""

    def __init__(self, problem: Problem, mask: Mask) -> None:
        self.problem, self.mask = problem, mask.copy()
        self._free = problem.spare - mask @ problem.extra
        self._active, self._coverage = mask.sum(axis=1), mask.sum(axis=0)
        # Large budgets first: a byte weighs least in F2 there.
        self._order = sorted(range(len(mask)), key=lambda n: -problem.budgets[n])

    def complete(self) -> bool:
        """Says whether coverage, numbers of blocks and budgets are as they must be."""
        enough = (self._active >= self.problem.min_active).all() and (self._free >= 0).all()
        return bool(enough and (self._coverage >= self.problem.min_coverage).all())

    def improve(self, prices: Vector, limits: Sequence[float]) -> None:
        """Changes clients one by one while ``prices @ values`` falls, and values keep to limits."""
        # A change of one client makes others worth while, so clients are gone through again.
        for _ in range(_MAX_PASSES):
            before = self.mask.copy()
            for n in self._order:
                while self._change(n, prices, limits):
                    pass
            if (self.mask == before).all():
                return

    def meet(self, limits: Sequence[float]) -> None:
        """Drops blocks until budgets and F2 keep to their limits, then adds some until F1 does."""
        problem, found = self.problem, True
        # Budgets first: memory that is not there cannot be traded for anything.
        while (self._free < 0).any():
            self._flip_best(self.mask & (self._free < 0)[:, None])
        while found and self.problem.values(self.mask)[1] > limits[1]:
            may = self.mask & (self._active > problem.min_active)[:, None]
            found = self._flip_best(may & (self._coverage > problem.min_coverage))
        while found and self.problem.values(self.mask)[0] > limits[0]:
            may = ~self.mask & (self._active < problem.max_active)[:, None]
            found = self._flip_best(may & (problem.extra <= self._free[:, None]))

    def _flip_best(self, may: Mask) -> bool:
        """Flips a block with the best trade of F1 for F2; says whether there was one."""
        # A block that saves no memory comes last.
        worth = self._flips(self.mask) / np.maximum(self.problem.shares, _LEAST_GAIN)
        n, b = divmod(int(np.where(may, worth, np.inf).argmin()), may.shape[1])
        if may[n, b]:
            self._flip(n, b)
        return bool(may.any())

    def _change(self, n: int, prices: Vector, limits: Sequence[float]) -> bool:
        """Flips the best set of up to three blocks of a client; says whether there was one."""
        problem, sets = self.problem, _sets(self.mask.shape[1])
        sign = np.where(self.mask[n], -1, 1)
        # F1 is a sum over blocks, so the worth of a set is the sum of its blocks', exactly. The
        # last place is that of no block.
        each = np.zeros((4, len(sign) + 1))
        each[:2, :-1] = sign, sign * problem.extra
        each[2:, :-1] = self._flips(self.mask[n]), sign * problem.shares[n]
        count, more, f1, f2 = each[:, sets].sum(axis=1)
        room = np.array(limits) - self.problem.values(self.mask) + _LEAST_GAIN
        active = self._active[n] + count
        fits = (more <= self._free[n]) & (active <= problem.max_active)
        fits &= (f1 <= room[0]) & (f2 <= room[1])
        # A client below its least number takes any blocks that fit.
        lacks = self._active[n] < problem.min_active[n]
        fits &= count > 0 if lacks else active >= problem.min_active[n]
        delta = np.where(fits, prices[0] * f1 + prices[1] * f2, np.inf)
        best = int(delta.argmin())
        if not delta[best] < (np.inf if lacks else -_LEAST_GAIN):
            return False
        for b in sets[:, best][sets[:, best] < len(sign)].tolist():
            self._flip(n, b)
        return True

    def _flips(self, mask: Mask) -> Vector:
        """Returns how much F1 rises where a client flips a block: [B] of a row, [N, B] of all."""
        # w / (c - 1) - w / c, without the cancellation of two nearly equal numbers.
        c, weights = self._coverage, self.problem.weights
        lost = weights / np.maximum(c * (c - 1), 1)
        won = weights / np.maximum(c * (c + 1), 1)
        lost[c <= self.problem.min_coverage] = won[c < self.problem.min_coverage] = _MISSING
        rise: Vector = np.where(mask, lost, -won)
        return rise

    def _flip(self, n: int, b: int) -> None:
        step = -1 if self.mask[n, b] else 1
        self.mask[n, b] = step > 0
        self._free[n] -= step * self.problem.extra[b]
        self._active[n] += step
        self._coverage[b] += step


@lru_cache(maxsize=4)
def _sets(blocks: int) -> NDArray[np.int64]:
    """Returns all sets of one to three blocks, [3, K]; a place without a block has the number B."""
    # Swaps need two, and two for one three; four would find little more and cost a hundred times.
    most = 3 if blocks <= _MANY_BLOCKS else 2
    sets = [each for k in range(1, most + 1) for each in combinations(range(blocks), k)]
    return np.array([each + (blocks,) * (3 - len(each)) for each in sets], dtype=np.int64).T.copy()
