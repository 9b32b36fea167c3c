"""Scalars of many clients become one coefficient a block and perturbation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from zorba.federated.entry import UNCOVERED
from zorba.federated.settings import Weighting


@dataclass(frozen=True, eq=False)
class Measurement:
    """What one client measured, and for what.

    Attributes:
        scalars: g, float32 [K, P], finite.
        mask: blocks that were perturbed, bool [blocks].
        num_examples: of its batches.
    """

    scalars: npt.NDArray[np.float32]
    mask: npt.NDArray[np.bool_]
    num_examples: int


def clip_scalars(scalars: npt.NDArray[np.float32], clip: float | None) -> npt.NDArray[np.float64]:
    """Returns scalars of any shape cut to [-clip, clip], as float64."""
    wide = scalars.astype(np.float64)
    return wide if clip is None else np.clip(wide, -clip, clip)


def update_coefs(scalars: npt.NDArray[np.float64], lr: float) -> npt.NDArray[np.float32]:
    """Returns ``-lr * g / P`` in float32, for g of shape [K, P] or [K, P, columns].

    Server and clients use this one function, so that a local step that rides along unwritten has
    the coefficients which the log would give it.
    """
    with np.errstate(over="ignore"):  # whoever uses them checks that they are finite
        coefs: npt.NDArray[np.float32] = (-lr * scalars / scalars.shape[1]).astype(np.float32)
    return coefs


def aggregate(
    measurements: Mapping[str, Measurement],
    lr: float,
    weighting: Weighting = "examples",
    clip: float | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Averages scalars over the clients that had a block active.

    ``w[n, b] = p[n] a[n, b] / sum_m p[m] a[m, b]``, ``G[k, b, p] = sum_n w[n, b] g[n, k, p]`` and
    ``coefs = -lr G / P``. Blocks that the same clients covered have the same G, and share a column.

    Args:
        measurements: by client; at least one, all of the same shapes.
        lr: learning rate.
        weighting: p[n] is the client's number of examples, or 1 with "uniform".
        clip: largest absolute scalar.

    Returns:
        Coefficients, float32 [K, P, columns], and the column of each block, int32 [blocks],
        ``UNCOVERED`` where nobody had it active. Sums are float64 in the order of client names, so
        that every server makes the same bits.
    """
    names = sorted(measurements)
    masks = np.stack([measurements[name].mask for name in names])  # [N, blocks]
    examples = [measurements[name].num_examples for name in names]
    weight = np.array(examples if weighting == "examples" else [1] * len(names), dtype=np.float64)
    masks = masks & (weight > 0)[:, None]
    scalars = clip_scalars(np.stack([measurements[name].scalars for name in names]), clip)

    columns = np.full(masks.shape[1], UNCOVERED, dtype=np.int32)
    known: dict[bytes, int] = {}
    parts: list[npt.NDArray[np.float32]] = []
    for block in range(masks.shape[1]):
        covering = masks[:, block]
        if not covering.any():
            continue
        key = covering.tobytes()
        if key not in known:
            known[key] = len(parts)
            shares = weight[covering] / np.add.accumulate(weight[covering])[-1]
            # accumulate, unlike sum, is one addition after the other on every machine
            mean = np.add.accumulate(scalars[covering] * shares[:, None, None], axis=0)[-1]
            parts.append(update_coefs(mean, lr))
        columns[block] = known[key]
    coefs = np.stack(parts, axis=2) if parts else np.zeros((*scalars.shape[1:], 0), np.float32)
    return coefs, columns
