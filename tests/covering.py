"""Covering arrays: few combinations that still hold every pair of values of two axes.

Most faults need one value, or two together (Kuhn, Wallace and Gallo, 2004). The full product of the
axes runs with ``--full`` (``make test-full``).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pytest


def combinations(axes: Mapping[str, Collection[Any]], full: bool) -> list[tuple[Any, ...]]:
    """Returns rows with a value of each axis: all if ``full``, else enough for every pair."""
    values = [list(column) for column in axes.values()]
    if full or len(values) < 3 or not all(values):
        return list(itertools.product(*values))
    return [
        tuple(column[at] for column, at in zip(values, row, strict=True))
        for row in _pairwise([len(column) for column in values])
    ]


def parametrize(
    metafunc: pytest.Metafunc, axes: Mapping[str, Collection[Any]], indirect: Sequence[str] = ()
) -> None:
    """Gives a test the rows of ``combinations``, by ``pytest_generate_tests``."""
    rows = [
        pytest.param(*row, id="-".join(str(v).removeprefix("torch.") for v in row))
        for row in combinations(axes, metafunc.config.getoption("--full"))
    ]
    metafunc.parametrize(list(axes), rows, indirect=indirect)


def _pairwise(sizes: list[int]) -> list[list[int]]:
    """Indices of a covering array, the same at every call: greedy, a row for the first pair left.

    A pair is (axis, index, axis, index); the dict keeps the order of those that are not covered.
    """
    left = dict.fromkeys(
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(sizes)), 2)
        for a in range(sizes[i])
        for b in range(sizes[j])
    )
    rows: list[list[int]] = []
    while left:
        i, a, j, b = next(iter(left))
        row = {i: a, j: b}
        for axis in range(len(sizes)):
            if axis in row:
                continue
            # Ties go to another value in each row, so that the values occur about equally often.
            order = [(len(rows) + k) % sizes[axis] for k in range(sizes[axis])]
            row[axis] = max(order, key=lambda at: sum(p in left for p in _pairs(row, axis, at)))
        rows.append([row[axis] for axis in range(len(sizes))])
        for axis in row:
            for pair in _pairs(row, axis, row[axis]):
                left.pop(pair, None)
    return rows


def _pairs(row: Mapping[int, int], axis: int, at: int) -> list[tuple[int, int, int, int]]:
    return [
        (other, row[other], axis, at) if other < axis else (axis, at, other, row[other])
        for other in row
        if other != axis
    ]
