"""Rounds a relaxed solution to whole blocks, and repairs what rounding breaks.

The relaxation fills budgets to the last byte with parts of blocks; rounded down it leaves room.
Each client in turn makes the change of up to three blocks that is worth most at the prices of the
relaxation, until none is worth anything. Nothing is random: equal problems get equal masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zorba.planning.problem import Mask, Problem

Vector = NDArray[np.float64]

# Coverage that is still missing is worth more than any priority or memory.
_MISSING = 1e6
# Smaller gains are rounding errors of objectives scaled to at most 1; this also ends the search.
_LEAST_GAIN = 1e-12
_MAX_PASSES = 50


class _Choices(NamedTuple):
    """Sets of up to two blocks of a client.

    Attributes:
        blocks: their indices [K, 2], -1 for none.
        worth: change of F1 [K].
        extra: bytes [K].
        number: how many blocks [K].
    """

    blocks: NDArray[np.int64]
    worth: Vector
    extra: NDArray[np.int64]
    number: NDArray[np.int64]


class Search:
    """A mask that is changed in small steps, each within the budget of its client.

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
        self._shares = per_byte[:, None] * self._extra[None, :]
        self._free = np.array(problem.spare, dtype=np.int64) - mask @ self._extra
        self._active = mask.sum(axis=1)
        self._coverage = mask.sum(axis=0) + problem.covered
        self._needed = problem.needed + problem.covered
        # Large budgets first: a byte weighs least in F2 there.
        self._order = np.argsort([-float(b) for b in problem.budgets], kind="stable").tolist()

    def values(self) -> Vector:
        """Returns F1 and F2, with a penalty on F1 for each block that nobody covers."""
        each = np.where(self._coverage, self._weights / np.maximum(self._coverage, 1), _MISSING)
        return np.array([each.sum(), self._shares[self.mask].sum()])

    def complete(self) -> bool:
        """Says whether coverage, numbers of blocks and budgets are as they must be."""
        active = (self._active >= self._problem.min_active).all()
        return bool(active and (self._coverage >= self._needed).all() and (self._free >= 0).all())

    def make_room(self) -> None:
        """Drops the blocks of least loss where a client is over its budget."""
        for n in np.flatnonzero(self._free < 0).tolist():
            while self._free[n] < 0:
                self._flip(n, int(np.where(self.mask[n], self._loss(), np.inf).argmin()))

    def improve(self, prices: Sequence[float], limits: Sequence[float]) -> None:
        """Changes clients one by one while ``prices @ values`` falls, and values keep to limits."""
        for _ in range(_MAX_PASSES):
            before = self.mask.copy()
            for n in self._order:
                while self._change(n, prices, limits):
                    pass
            if (self.mask == before).all():
                return

    def meet(self, limits: Sequence[float]) -> None:
        """Drops blocks until F2 keeps to its limit, then adds some until F1 does, while any may."""
        shares = np.maximum(self._shares, _LEAST_GAIN)
        while self.values()[1] > limits[1]:
            may = self.mask & (self._active > self._problem.min_active)[:, None]
            may &= (self._coverage > self._needed) & (self._shares > 0)
            if not may.any():
                return
            self._flip(*_least(np.where(may, self._loss() / shares, np.inf)))
        while self.values()[0] > limits[0]:
            may = ~self.mask & (self._extra <= self._free[:, None])
            may &= (self._active < self._problem.max_active)[:, None]
            if not may.any():
                return
            self._flip(*_least(np.where(may, -self._gain() / shares, np.inf)))

    def _change(self, n: int, prices: Sequence[float], limits: Sequence[float]) -> bool:
        """Makes the best change of up to three blocks on a client; says if there was one."""
        problem, active = self._problem, self._active[n]
        room = np.array(limits) - self.values() + _LEAST_GAIN
        out = self._choices(np.flatnonzero(self.mask[n]), self._loss())
        into = self._choices(np.flatnonzero(~self.mask[n]), -self._gain())
        # A client below its least number takes any block that fits.
        lacks = active < problem.min_active
        best, blocks = (np.inf if lacks else -_LEAST_GAIN), None
        for outs, intos in ((_singles(out), into), (out, _singles(into))):
            count = active + intos.number[None, :] - outs.number[:, None]
            more = intos.extra[None, :] - outs.extra[:, None]
            f1 = outs.worth[:, None] + intos.worth[None, :]
            f2 = more * self._per_byte[n]
            fits = (more <= self._free[n]) & (count <= problem.max_active)
            fits &= (count > active) if lacks else (count >= problem.min_active)
            fits &= (f1 <= room[0]) & (f2 <= room[1])
            i, j = _least(delta := np.where(fits, prices[0] * f1 + prices[1] * f2, np.inf))
            if delta[i, j] < best:
                best, blocks = delta[i, j], [*outs.blocks[i], *intos.blocks[j]]
        for b in blocks or ():
            if b >= 0:
                self._flip(n, int(b))
        return blocks is not None

    def _choices(self, blocks: NDArray[np.int64], worth: Vector) -> _Choices:
        """Returns the sets of none, one or two of the blocks, in this order."""
        i, j = np.triu_indices(len(blocks), 1)
        none = np.full(1 + len(blocks), -1)
        first = np.concatenate([[-1], blocks, blocks[i]])
        second = np.concatenate([none, blocks[j]])
        worth, extra = np.append(worth, 0.0), np.append(self._extra, 0)  # index -1: no block
        count = (first >= 0).astype(np.int64) + (second >= 0)
        pairs = np.stack([first, second], axis=1)
        return _Choices(pairs, worth[first] + worth[second], extra[first] + extra[second], count)

    def _gain(self) -> Vector:
        """Returns how much F1 falls if one more client activates each block."""
        c = np.maximum(self._coverage, 1)
        return np.where(self._coverage < self._needed, _MISSING, self._weights / (c * (c + 1)))

    def _loss(self) -> Vector:
        """Returns how much F1 rises if one client fewer does."""
        c = np.maximum(self._coverage, 2)
        return np.where(self._coverage <= self._needed, _MISSING, self._weights / (c * (c - 1)))

    def _flip(self, n: int, b: int) -> None:
        step = -1 if self.mask[n, b] else 1
        self.mask[n, b] = step > 0
        self._free[n] -= step * self._extra[b]
        self._active[n] += step
        self._coverage[b] += step


def _singles(choices: _Choices) -> _Choices:
    few = choices.number < 2
    blocks, worth, extra, number = choices
    return _Choices(blocks[few], worth[few], extra[few], number[few])


def _least(values: Vector) -> tuple[int, int]:
    i, j = np.unravel_index(int(values.argmin()), values.shape)
    return int(i), int(j)
