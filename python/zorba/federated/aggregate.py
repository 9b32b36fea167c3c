"""Scalars of many clients become coefficients of blocks and directions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from zorba.federated.settings import Aggregation, Weighting

_Floats = npt.NDArray[np.float64]


def clip_scalars(scalars: npt.NDArray[np.float32], clip: float | None) -> _Floats:
    """Returns scalars of any shape cut to [-clip, clip], as float64."""
    # float64 from here on: a sum over 2**24 examples would stand still in float32.
    return np.clip(scalars.astype(np.float64), -(clip or math.inf), clip or math.inf)


def update_coefs(scalars: _Floats, lr: float) -> npt.NDArray[np.float32]:
    """Returns ``-lr * g / P`` in float32, for g of shape [..., P]."""
    # Server and clients use this one function, so that a local step that rides along unwritten has
    # the coefficients which the log would give it. In float64 up to here: one rounding, at the end.
    with np.errstate(over="ignore"):  # whoever uses them checks that they are finite
        coefs: npt.NDArray[np.float32] = (-lr * scalars / scalars.shape[-1]).astype(np.float32)
    return coefs


def aggregate(
    scalars: npt.NDArray[np.float32],  # g, finite, [clients, K, P], in the order of the names
    masks: npt.NDArray[np.bool_],  # a, [clients, blocks]
    examples: npt.NDArray[np.integer[Any]],  # of each client's batches, at most 2**32 each
    lr: float,
    weighting: Weighting = "examples",
    clip: float | None = None,  # largest absolute scalar; larger ones are cut to it first
    aggregation: Aggregation = "mean",
    trim: float = 0.25,  # share of the copies that "trimmed" leaves out at each end, below 0.5
) -> npt.NDArray[np.float32]:
    """Returns coefficients ``-lr G / P``, float32 [blocks, K, P]; 0 for blocks nobody covered.

    Client n counts as p[n] equal copies: its number of examples, or 1 with "uniform". For each
    block, step and perturbation, over the W copies of the clients that had the block active:

    - "mean" of all: ``G[k, b, p] = sum_n p[n] a[n, b] g[n, k, p] / sum_n p[n] a[n, b]``.
    - "trimmed": the ceil(trim * W) lowest and as many of the highest are left out, and the rest
      averaged; as many as leave one or two in the middle where that is fewer.
    - "median": the middle one, or the mean of the middle two.

    The last two are the coordinate-wise rules of Yin et al., arXiv 1803.01498 (definitions 1 and
    2), a block at a time. They withstand less than that share of copies, so with "examples" a
    client that claims many examples is many clients.
    """
    count, *shape = scalars.shape
    copies = _copies(examples, weighting)
    flat = scalars.reshape(count, -1)
    values = clip_scalars(flat, clip)
    weighted = values * copies[:, None]
    room = np.empty_like(weighted)  # used again by each sum: fresh memory costs more than sums
    share = 0.5 if aggregation == "median" else trim
    # Sorted once for all blocks, before the clip makes some equal: a block's clients, taken in that
    # order, are sorted. -0 is below 0, and equal scalars stay in the order of the clients.
    by_rank = aggregation != "mean"
    orders = [np.lexsort((~np.signbit(row), row)) for row in flat.T] if by_rank else []
    covering = (masks & (copies > 0)[:, None]).T  # [blocks, clients]
    # Blocks that the same clients covered get the same coefficients: each such set of clients is
    # summed once. With transformers there are far fewer of them than blocks.
    columns: dict[bytes, list[int]] = {}
    for block in np.flatnonzero(covering.any(axis=1)).tolist():
        columns.setdefault(covering[block].tobytes(), []).append(block)
    out = np.zeros((len(covering), *shape), np.float32)
    for blocks in columns.values():
        clients = covering[blocks[0]]
        if by_rank:
            ranks = zip(values.T, (order[clients[order]] for order in orders), strict=True)
            combined = np.array([_trimmed_mean(row[n], copies[n], share) for row, n in ranks])
        else:
            rows = np.flatnonzero(clients)
            taken = np.take(weighted, rows, axis=0, out=room[: len(rows)], mode="clip")
            combined = fold(taken) / copies[rows].sum()
        out[blocks] = update_coefs(combined.reshape(shape), lr)
    return out


def aggregate_own(
    scalars: npt.NDArray[np.float32],  # g, finite, [clients, K, P], in the order of the names
    masks: npt.NDArray[np.bool_],  # a, [clients, blocks]
    examples: npt.NDArray[np.integer[Any]],  # as in ``aggregate``
    lr: float,
    weighting: Weighting = "examples",
    clip: float | None = None,  # as in ``aggregate``
    part_bound: float | None = None,  # times the median client's part, see below; None: no limit
) -> npt.NDArray[np.float32]:
    """Returns coefficients ``-lr w g / P`` of own directions, float32 [blocks, K, clients, P].

    The weights of clients are those of ``aggregate``, w[n, b] = p[n] a[n, b] / sum_m p[m] a[m, b];
    a block that client n did not have active has 0. The part of client n in the round is
    ``p[n] sqrt(sum g[n]^2)``: the length of what it adds, but for a common factor. Where it is more
    than ``part_bound`` times the median of the parts that are not 0, its scalars are scaled down to
    that.
    """
    copies = _copies(examples, weighting)
    values = clip_scalars(scalars, clip)
    # Exact sums, so that every server makes the same bits.
    parts = [
        float(n) * math.sqrt(math.fsum((g * g).ravel().tolist()))
        for n, g in zip(copies, values, strict=True)
    ]
    some = sorted(part for part in parts if part > 0)
    if part_bound is not None and some:
        # The lower one of two in the middle: of two clients, one alone cannot move the limit.
        limit = part_bound * some[(len(some) - 1) // 2]
        scale = [min(1.0, limit / part) if part > 0 else 1.0 for part in parts]
        values *= np.array(scale)[:, None, None]
    shares = masks * copies[:, None].astype(np.float64)  # [clients, blocks]
    total = fold(shares.copy())
    shares = np.divide(shares, total, out=np.zeros_like(shares), where=total > 0)
    # [blocks, K, clients, P]
    spread = shares.T[:, None, :, None] * values.transpose(1, 0, 2)[None]
    return update_coefs(spread, lr)


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


def _copies(examples: npt.NDArray[np.integer[Any]], weighting: Weighting) -> npt.NDArray[np.int64]:
    # Integers: a sum of weights is exact, whatever its order.
    return np.ones(len(examples), np.int64) if weighting == "uniform" else examples.astype(np.int64)


def _trimmed_mean(ranked: _Floats, copies: npt.NDArray[np.int64], share: float) -> float:
    """Mean of scalars [clients], lowest first, without a share of the copies at each end."""
    end = np.cumsum(copies)  # copies up to and with this client's
    total = int(end[-1])
    cut = min(math.ceil(share * total), (total - 1) // 2)
    # Who is left out has 0 copies and stays a term, so that the order of the additions depends on
    # the number of clients alone; of the client at an edge some copies may be left.
    kept = np.clip(end, cut, total - cut) - np.clip(end - copies, cut, total - cut)
    return float(fold(ranked * kept)) / (total - 2 * cut)
