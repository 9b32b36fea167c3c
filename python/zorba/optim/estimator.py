"""Finite-difference estimates of directional derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch

from zorba.optim.terms import NoiseTerms

Estimator = Literal["central", "forward"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)


def finite_differences(
    evaluate: Callable[[NoiseTerms], float],
    seed: int,
    eps: float,
    num_perturbations: int,
    estimator: Estimator,
    active: Sequence[float],
    pending: NoiseTerms | None = None,
) -> tuple[list[float], float]:
    """Measures ``g[p]``, the derivative of the loss along ``M z(seed, p)`` for each perturbation p.

    ``central``: ``(F(w + eps M z) - F(w - eps M z)) / (2 eps)`` (MeZO, arXiv 2305.17333, definition
    1); ``forward``: ``(F(w + eps M z) - F(w)) / eps``, one evaluation of F(w) for all p.

    Args:
        evaluate: returns the loss at the weights plus the given noise; must not change the weights.
        seed: uint64, shared by the perturbations; perturbation p is its sample p.
        eps: distance of the evaluations, positive.
        num_perturbations: P, at least 1.
        estimator: "central" or "forward".
        active: the mask M, one number a group: 1 for a block that is perturbed, else 0.
        pending: noise that the weights are understood to carry already (local steps not written).

    Returns:
        The P scalars and the mean of the losses seen. Scalars are not finite where a loss was not.
    """
    mask = torch.as_tensor(active, dtype=torch.float32)
    base = NoiseTerms.none(len(mask)) if pending is None else pending
    scalars: list[float] = []
    losses: list[float] = []
    if estimator == "forward":
        losses.append(evaluate(base))
    for sample in range(num_perturbations):
        plus = evaluate(base.plus(NoiseTerms.single(seed, sample, eps * mask)))
        losses.append(plus)
        if estimator == "forward":
            scalars.append((plus - losses[0]) / eps)
            continue
        minus = evaluate(base.plus(NoiseTerms.single(seed, sample, -eps * mask)))
        losses.append(minus)
        scalars.append((plus - minus) / (2 * eps))
    return scalars, math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.nan
