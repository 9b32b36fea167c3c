"""Many knapsacks at once: the most worth that fits into each budget."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

# Budgets are split into so many units. For packing, sizes are rounded to the nearest, which is off
# by about one unit in all, and so many units are left free at most until what is packed fits. For
# bounds sizes are rounded down, and the units are as fine as memory allows.
_UNITS = 1 << 10
_TRIES = 4
_FINE_CELLS = 1 << 25  # of the tables, over all budgets and items


class Knapsacks:
    """Budgets, and items of several kinds to fill them with; dynamic programming.

    Args:
        budgets: int [C], bytes; not negative.
        sizes: int [H], bytes of an item of each kind.
        copies: int [H], how many items of the kind there are.
    """

    def __init__(
        self, budgets: NDArray[np.int64], sizes: NDArray[np.int64], copies: NDArray[np.int64]
    ) -> None:
        self._budgets, self._sizes = budgets, sizes
        self._share = sizes / np.maximum(budgets, 1)[:, None]  # [C, H]
        self._share[budgets[:, None] < sizes] = np.inf
        self._share[:, sizes == 0] = 0.0
        self._items = np.repeat(np.arange(len(sizes)), copies)

    def pack(self, worth: Vector) -> NDArray[np.int64]:
        """Returns how many items of each kind to take for the most worth: int [C, H].

        Args:
            worth: of an item, float [C, H]; one that is not positive is left out.
        """
        weights = _whole(np.rint(self._share * _UNITS), _UNITS)
        took = np.stack([taken for taken, _ in self._fill(worth, weights, _UNITS)])
        counts = np.zeros(worth.shape, dtype=np.int64)
        over = np.ones(len(worth), dtype=np.bool_)
        for spared in range(_TRIES):
            counts[over] = self._traced(took, weights, _UNITS - spared)[over]
            over = counts @ self._sizes > self._budgets
        counts[over] = 0
        return counts

    def _traced(
        self, took: NDArray[np.bool_], weights: NDArray[np.int64], units: int
    ) -> NDArray[np.int64]:
        """Returns what is packed into so many units: [C, H]."""
        counts = np.zeros(weights.shape, dtype=np.int64)
        every, left = np.arange(len(weights)), np.full(len(weights), units)
        for h, taken in zip(self._items[::-1].tolist(), took[::-1], strict=True):
            here = taken[every, left]
            counts[:, h] += here
            left -= np.where(here, weights[:, h], 0)
        return counts

    def most(self, worth: Vector) -> Vector:
        """Returns a bound, from above and close, of the worth that fits each budget: [C]."""
        units = max(_FINE_CELLS // worth[:, self._items].size, _UNITS)
        weights = _whole(np.floor(self._share * units), units)
        [(_, best)] = deque(self._fill(worth, weights, units), maxlen=1)
        return best[:, -1]

    def _fill(
        self, worth: Vector, weights: NDArray[np.int64], units: int
    ) -> Iterator[tuple[NDArray[np.bool_], Vector]]:
        """Offers one item after the other: yields who takes it with so many units, and the worth.

        Both are [C, units + 1].
        """
        best = np.zeros((len(worth), units + 1))
        at = np.arange(units + 1)[None, :]
        for h in self._items.tolist():
            before = at - weights[:, h : h + 1]
            value = np.take_along_axis(best, np.maximum(before, 0), axis=1) + worth[:, h : h + 1]
            took = (before >= 0) & (value > best)
            best = np.where(took, value, best)
            yield took, best


def _whole(units: Vector, most: int) -> NDArray[np.int64]:
    return np.minimum(units, most + 1).astype(np.int64)
