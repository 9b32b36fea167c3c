"""How much each block matters, estimated from the scalars that a federation exchanges anyway."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# The mean of blocks is trusted as much as a measurement that is off by this part of it.
_PRIOR_SPREAD = 1.0
# Weights depend on the predicted energies; twice is enough for them to settle.
_REWEIGHTINGS = 3


def estimate_importance(
    masks: npt.ArrayLike,
    energies: npt.ArrayLike,
    samples: npt.ArrayLike,
    floor: float = 0.05,
) -> npt.NDArray[np.float64]:
    """Estimates the mean squared gradient norm of each block from squared scalars.

    To first order a client's scalar is ``g = z . M grad f``, so ``E[g^2]`` is the sum of the
    squared gradient norms of its active blocks, and ``g^2`` is that times chi-square of one degree
    of freedom (docs/theory.md, "Importance from the scalars"). A weighted non-negative least
    squares over rows of different masks tells the blocks apart:

    ``min_(w >= 0)  sum_i samples_i (energy_i - a_i . w)^2 / (2 m_i^2) + sum_b (w_b / w0 - 1)^2``

    with ``m_i`` the predicted energy, from the solution before, and ``w0`` the energy of a block if
    all were alike. The second sum decides what the masks do not: without any information, or with
    equal masks, all blocks come out alike.

    Args:
        masks: bool [rows, B], blocks that were active in a measurement; at least one in a row.
        energies: float [rows], mean of the squared scalars of the measurement.
        samples: int [rows], how many scalars it had.
        floor: least importance, as a part of the mean one; positive.

    Returns:
        float64 [B], positive, of mean 1: priorities for ``plan_blocks``.

    Raises:
        ValueError: shapes that do not fit, or values that are no energies.
    """
    from scipy.optimize import nnls

    active = np.asarray(masks, dtype=np.float64)
    energy = np.asarray(energies, dtype=np.float64)
    count = np.asarray(samples, dtype=np.float64)
    if active.ndim != 2 or energy.shape != active.shape[:1] or count.shape != energy.shape:
        raise ValueError(
            f"masks must be [rows, blocks] with an energy and a count of samples a row, got "
            f"{active.shape}, {energy.shape} and {count.shape}"
        )
    if not (np.isfinite(energy).all() and (energy >= 0).all() and (count >= 1).all()):
        raise ValueError("energies must be finite and not negative, samples at least 1")
    if not (active.sum(axis=1) >= 1).all():
        raise ValueError("every row must have an active block")
    if not 0 < floor <= 1:
        raise ValueError(f"floor must be above 0 and at most 1, got {floor}")
    num_blocks = active.shape[1]
    uniform = np.ones(num_blocks)
    if not len(energy) or not energy.any():
        return uniform
    # In units of w0, so that the numbers are near 1 whatever the loss is measured in.
    energy = energy / (np.sum(count * energy) / np.sum(count * active.sum(axis=1)))
    prior = np.eye(num_blocks) / _PRIOR_SPREAD
    weights = uniform
    for _ in range(_REWEIGHTINGS):
        predicted = np.maximum(active @ weights, floor)
        scale = np.sqrt(count / 2) / predicted
        weights, _ = nnls(
            np.concatenate([active * scale[:, None], prior]),
            np.concatenate([energy * scale, prior @ uniform]),
        )
    weights = np.maximum(weights / weights.mean(), floor)
    return np.asarray(weights / weights.mean())
