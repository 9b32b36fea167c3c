"""Scalars of many clients become one coefficient a block and perturbation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from zorba.federated.settings import Aggregation, Weighting

_Floats = npt.NDArray[np.float64]
_Bools = npt.NDArray[np.bool_]


def clip_scalars(scalars: npt.NDArray[np.float32], clip: float | None) -> _Floats:
    """Returns scalars of any shape cut to [-clip, clip], as float64."""
    # float64 from here on: a sum over 2**24 examples would stand still in float32.
    wide = scalars.astype(np.float64)
    return wide if clip is None else np.clip(wide, -clip, clip)


def update_coefs(scalars: _Floats, lr: float) -> npt.NDArray[np.float32]:
    """Returns ``-lr * g / P`` in float32, for g of shape [K, P] or [K, P, columns]."""
    # Server and clients use this one function, so that a local step that rides along unwritten has
    # the coefficients which the log would give it. In float64 up to here: one rounding, at the end.
    with np.errstate(over="ignore"):  # whoever uses them checks that they are finite
        coefs: npt.NDArray[np.float32] = (-lr * scalars / scalars.shape[1]).astype(np.float32)
    return coefs


def aggregate(
    scalars: npt.NDArray[np.float32],
    masks: _Bools,
    examples: npt.NDArray[np.integer[Any]],
    lr: float,
    weighting: Weighting = "examples",
    clip: float | None = None,
    aggregation: Aggregation = "mean",
    trim: float = 0.25,
) -> npt.NDArray[np.float32]:
    """Makes one scalar of those of all clients that had a block active, for each block.

    Client n counts as p[n] equal copies: its number of examples, or 1 with "uniform". For each
    block, step and perturbation, over the W copies of the clients that had the block active:

    - "mean" of all: ``G[k, b, p] = sum_n p[n] a[n, b] g[n, k, p] / sum_n p[n] a[n, b]``.
    - "trimmed": the ceil(trim * W) lowest and as many of the highest are left out, and the rest
      averaged; as many as leave one or two in the middle where that is fewer.
    - "median": the middle one, or the mean of the middle two.

    The last two are the coordinate-wise rules of Yin et al., arXiv 1803.01498 (definitions 1 and
    2), a block at a time. They withstand less than that share of copies, so with "examples" a
    client that claims many examples is many clients.

    Args:
        scalars: g, finite, float32 [clients, K, P], in the order of the clients' names.
        masks: a, bool [clients, blocks].
        examples: of each client's batches, [clients], at most 2**32 each.
        lr: learning rate.
        weighting: "examples" or "uniform".
        clip: largest absolute scalar; larger ones are cut to it first.
        aggregation: "mean", "median" or "trimmed".
        trim: share of the copies that "trimmed" leaves out at each end, below 0.5.

    Returns:
        Coefficients ``-lr G / P``, float32 [blocks, K, P]; zeros where nobody covered the block.
    """
    count, *shape = scalars.shape
    # Integers: a sum of weights is exact, whatever its order.
    copies = np.ones(count, np.int64) if weighting == "uniform" else examples.astype(np.int64)
    flat = scalars.reshape(count, -1)
    covering = np.ascontiguousarray((masks & (copies > 0)[:, None]).T)  # [blocks, clients]
    # Blocks that the same clients covered get the same coefficients: each such set of clients, a
    # column, is summed once. With transformers there are far fewer columns than blocks.
    columns: dict[bytes, list[int]] = {}
    for block in np.flatnonzero(covering.any(axis=1)).tolist():
        columns.setdefault(covering[block].tobytes(), []).append(block)
    of_columns = covering[[blocks[0] for blocks in columns.values()]]
    if aggregation == "mean":
        combined = _means(clip_scalars(flat, clip), copies, of_columns)
    else:
        share = 0.5 if aggregation == "median" else trim
        combined = _trimmed_means(flat, copies, of_columns, clip, share)
    coefs = update_coefs(combined.reshape(*shape, len(columns)), lr)
    out = np.zeros((len(covering), *shape), np.float32)
    for column, blocks in enumerate(columns.values()):
        out[blocks] = coefs[:, :, column]
    return out


def fold(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Returns the sum over the first axis; overwrites ``values``.

    The second half is added on to the first until one row is left; the first half keeps the odd
    one. The error grows with the logarithm of the number of rows.
    """
    # numpy.sum splits a sum as its SIMD width suggests, so its bits depend on the machine. Here the
    # order of additions follows from the number of rows alone, and adding whole rows is
    # elementwise, where IEEE arithmetic leaves no choice: every server makes the same bits.
    rows = len(values)
    while rows > 1:
        half = (rows + 1) // 2
        values[: rows - half] += values[half:rows]
        rows = half
    total: npt.NDArray[Any] = values[0]
    return total


def _means(values: _Floats, copies: npt.NDArray[np.int64], covering: _Bools) -> _Floats:
    """Of the clients that covered each column, bool [columns, clients]: [K * P, columns]."""
    weighted = values * copies[:, None]
    room = np.empty_like(weighted)  # used again by each column: fresh memory costs more than sums
    means = np.empty((values.shape[1], len(covering)))
    # mode="clip" only because numpy copies once more where it may have to raise.
    for column, clients in enumerate(covering):
        rows = np.flatnonzero(clients)
        taken = np.take(weighted, rows, axis=0, out=room[: len(rows)], mode="clip")
        means[:, column] = fold(taken) / copies[rows].sum()
    return means


def _trimmed_means(
    scalars: npt.NDArray[np.float32],
    copies: npt.NDArray[np.int64],
    covering: _Bools,
    clip: float | None,
    trim: float,
) -> _Floats:
    """Of the clients that covered each column, bool [columns, clients]: [K * P, columns]."""
    # Each row is sorted once for all columns: a column's clients, taken in that order, are sorted.
    rows = np.ascontiguousarray(scalars.T)
    packed = np.packbits(covering, axis=0, bitorder="little")  # [columns / 8, clients]
    means = np.empty((len(rows), len(covering)))
    room = np.empty(len(copies))
    for k, (row, order) in enumerate(zip(rows, _order(rows), strict=True)):
        ranked, weights = clip_scalars(row.take(order), clip), copies.take(order)
        weighted = ranked * weights
        for column in range(len(covering)):
            if column % 8 == 0:  # eight columns are put in order at once
                bits = packed[column // 8].take(order)
            # numpy is many times faster at picking by places than by bools
            places = np.flatnonzero((bits & (1 << column % 8)).astype(np.bool_))
            means[k, column] = _middle(places, ranked, weights, weighted, trim, room)
    return means


def _middle(
    places: npt.NDArray[np.int64],
    ranked: _Floats,
    weights: npt.NDArray[np.int64],
    weighted: _Floats,
    trim: float,
    room: _Floats,
) -> float:
    """Returns the trimmed mean of the clients at these places among all, lowest scalar first."""
    weight = weights.take(places)
    end = np.add.accumulate(weight)  # integers: copies up to and with this client's
    total = int(end[-1])
    cut = min(math.ceil(trim * total), (total - 1) // 2)
    first, last = int(end.searchsorted(cut, "right")), int(end.searchsorted(total - cut))
    terms = room[: len(places)]
    # Who is left out adds 0. Where every term is one, the sum has the sign of the highest scalar.
    terms[:] = 0.0 * ranked[places[-1]]
    terms[first : last + 1] = weighted.take(places[first : last + 1])
    for n in (first, last):  # of whom some copies may be left out
        kept = min(end[n], total - cut) - max(end[n] - weight[n], cut)
        terms[n] = ranked[places[n]] * kept
    return float(fold(terms)) / (total - 2 * cut)


def _order(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Returns the order that sorts each row [rows, clients]; equal numbers stay in order."""
    # A stable sort of floats is slow. The bits of a number, made to sort as an integer does, are
    # put above the client's place in one uint64: these are all different, so numpy's fastest sort,
    # which is not stable, has no choice. -0 sorts below 0.
    bits = rows.view(np.uint32)
    rising = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)
    keys = np.sort(rising << np.uint64(32) | np.arange(rows.shape[1], dtype=np.uint64), axis=1)
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
