"""Rounds a relaxed solution to whole blocks, and repairs what rounding breaks.

The relaxation fills budgets to the last byte with parts of blocks; rounded down it leaves room.
Each client in turn makes the change of up to three blocks that is worth most at the prices of the
relaxation, until none is worth anything. Nothing is random: equal problems get equal masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zorba.planning.problem import Mask, Problem

Vector = NDArray[np.float64]

# Coverage that is still missing is worth more than any priority or memory.
_MISSING = 1e6
# Smaller gains are rounding errors of objectives scaled to at most 1; this also ends the search.
_LEAST_GAIN = 1e-12
_MAX_PASSES = 50
# Sets of three of more blocks than this are too many to look at.
_MANY_BLOCKS = 48


class Search:
    """A mask that changes step by step, where each step fits the budget of its client.

    Args:
        problem: what to respect.
        weights: of each block in F1, float64 [B].
        per_byte: what a byte of each client adds to F2, float64 [N].
        mask: where to start, bool [N, B]; it is copied.
    """

    def __init__(self, problem: Problem, weights: Vector, per_byte: Vector, mask: Mask) -> None:
        self.mask = mask.copy()
        self._problem = problem
        self._weights, self._per_byte = weights, per_byte
        self._extra = np.array(problem.extra, dtype=np.int64)
        self._free = np.array(problem.spare, dtype=np.int64) - mask @ self._extra
        self._active = mask.sum(axis=1)
        self._coverage = mask.sum(axis=0) + problem.covered
        self._needed = problem.needed + problem.covered
        # Large budgets first: a byte weighs least in F2 there.
        self._order = np.argsort([-float(b) for b in problem.budgets], kind="stable").tolist()

    def values(self) -> Vector:
        """Returns F1 and F2, with a penalty on F1 for each block that nobody covers."""
        each = np.where(self._coverage, self._weights / np.maximum(self._coverage, 1), _MISSING)
        return np.array([each.sum(), self.mask @ self._extra @ self._per_byte])

    def complete(self) -> bool:
        """Says whether coverage, numbers of blocks and budgets are as they must be."""
        active = (self._active >= self._problem.min_active).all()
        return bool(active and (self._coverage >= self._needed).all() and (self._free >= 0).all())

    def improve(self, prices: Sequence[float], limits: Sequence[float]) -> None:
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
        # Budgets first: memory that is not there cannot be traded for anything.
        for n in np.flatnonzero(self._free < 0).tolist():
            while self._free[n] < 0:
                self._flip(n, int(np.where(self.mask[n], self._losses(), np.inf).argmin()))
        # A block that saves no memory comes last.
        shares = np.maximum(np.outer(self._per_byte, self._extra), _LEAST_GAIN)
        while self.values()[1] > limits[1]:
            may = self.mask & (self._active > self._problem.min_active)[:, None]
            may &= self._coverage > self._needed
            if not may.any():
                return
            self._flip(*_least(np.where(may, self._losses() / shares, np.inf)))
        while self.values()[0] > limits[0]:
            may = ~self.mask & (self._extra <= self._free[:, None])
            may &= (self._active < self._problem.max_active)[:, None]
            if not may.any():
                return
            self._flip(*_least(np.where(may, -self._gains() / shares, np.inf)))

    def _change(self, n: int, prices: Sequence[float], limits: Sequence[float]) -> bool:
        """Flips the best set of up to three blocks of a client; says whether there was one."""
        problem, on = self._problem, self.mask[n]
        sets = _sets(len(on))
        # F1 is a sum over blocks, so the worth of a set is the sum of its blocks', exactly.
        f1 = _sum(np.where(on, self._losses(), -self._gains()), sets)
        more = _sum(np.where(on, -self._extra, self._extra), sets)
        f2 = more * self._per_byte[n]
        active = self._active[n] + _sum(np.where(on, -1, 1), sets)
        room = np.array(limits) - self.values() + _LEAST_GAIN
        fits = (more <= self._free[n]) & (active <= problem.max_active)
        fits &= (f1 <= room[0]) & (f2 <= room[1])
        # A client below its least number takes any blocks that fit.
        lacks = self._active[n] < problem.min_active
        fits &= active > self._active[n] if lacks else active >= problem.min_active
        delta = np.where(fits, prices[0] * f1 + prices[1] * f2, np.inf)
        best = int(delta.argmin())
        if not delta[best] < (np.inf if lacks else -_LEAST_GAIN):
            return False
        for b in sets[best][sets[best] < len(on)].tolist():
            self._flip(n, b)
        return True

    def _gains(self) -> Vector:
        """Returns how much F1 falls if one more client activates each block."""
        # w / c - w / (c + 1), without the cancellation of two nearly equal numbers.
        c = np.maximum(self._coverage, 1)
        return np.where(self._coverage < self._needed, _MISSING, self._weights / (c * (c + 1)))

    def _losses(self) -> Vector:
        """Returns how much F1 rises if one client fewer does."""
        c = np.maximum(self._coverage, 2)
        return np.where(self._coverage <= self._needed, _MISSING, self._weights / (c * (c - 1)))

    def _flip(self, n: int, b: int) -> None:
        step = -1 if self.mask[n, b] else 1
        self.mask[n, b] = step > 0
        self._free[n] -= step * self._extra[b]
        self._active[n] += step
        self._coverage[b] += step


@lru_cache(maxsize=4)
def _sets(blocks: int) -> NDArray[np.int64]:
    """Returns all sets of one to three blocks, [K, 3]; a place without a block has the number B."""
    # Swaps need two, and two for one three; four would find little more and cost a hundred times.
    most = 3 if blocks <= _MANY_BLOCKS else 2
    rows = [
        (*blocks_, *(blocks,) * (3 - size))
        for size in range(1, most + 1)
        for blocks_ in combinations(range(blocks), size)
    ]
    return np.array(rows, dtype=np.int64)


def _sum(of_block: NDArray[Any], sets: NDArray[np.int64]) -> NDArray[Any]:
    total: NDArray[Any] = np.append(of_block, 0)[sets].sum(axis=1)
    return total


def _least(values: Vector) -> tuple[int, int]:
    i, j = np.unravel_index(int(values.argmin()), values.shape)
    return int(i), int(j)
