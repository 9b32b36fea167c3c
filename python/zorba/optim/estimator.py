"""Finite-difference estimates of directional derivatives, as functions of plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from zorba.defaults import ESTIMATORS as ESTIMATORS
from zorba.defaults import Estimator as Estimator
from zorba.optim.terms import NoiseTerms

Evaluate = Callable[[Sequence[NoiseTerms]], Sequence[float]]
"""Returns the loss at the weights plus each of the given noises; leaves the weights as they are.

It gets all evaluations of a step at once, so that it may run them side by side."""


def finite_differences(
    evaluate: Evaluate,
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
        evaluate: called once, with the 2P noises (P + 1 for ``forward``).
        seed: uint64, shared by the perturbations; perturbation p is its sample p.
        eps: distance of the evaluations, positive.
        num_perturbations: P, at least 1.
        estimator: "central" or "forward".
        active: the mask M, one number a group: 1 for a block that is perturbed, else 0.
        pending: noise that the weights are understood to carry already (local steps not written).

    Returns:
        The P scalars and the mean of the losses seen. Scalars are not finite where a loss was not.
    """
    noises = evaluation_noises(seed, eps, num_perturbations, estimator, active, pending)
    losses = list(evaluate(noises))
    return differences(losses, eps, estimator), mean_loss(losses)


def evaluation_noises(
    seed: int,
    eps: float,
    num_perturbations: int,
    estimator: Estimator,
    active: Sequence[float],
    pending: NoiseTerms | None = None,
) -> list[NoiseTerms]:
    """Returns the noises at which ``finite_differences`` evaluates; see there."""
    mask = torch.as_tensor(active, dtype=torch.float32)
    base = NoiseTerms.none(len(mask)) if pending is None else pending
    central = estimator == "central"
    noises = [] if central else [base]
    for sample in range(num_perturbations):
        for distance in (eps, -eps) if central else (eps,):
            noises.append(base.plus(NoiseTerms.single(seed, sample, distance * mask)))
    return noises


def differences(losses: Sequence[Any], eps: float, estimator: Estimator) -> list[Any]:
    """Returns the P finite differences of the losses at ``evaluation_noises``.

    Args:
        losses: of each noise, a number, or an array of one loss an example.
        eps: distance of the evaluations.
        estimator: "central" or "forward".
    """
    # In float64: a float32 difference of two losses near 5 has 5e-7 of rounding, over eps.
    if estimator == "central":
        pairs = zip(losses[::2], losses[1::2], strict=True)
        return [(plus - minus) / (2 * eps) for plus, minus in pairs]
    return [(plus - losses[0]) / eps for plus in losses[1:]]


def mean_loss(losses: Sequence[float]) -> float:
    """Returns the mean of losses; not a number if one of them is not finite."""
    return math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.nan


def one_by_one(loss: Callable[[NoiseTerms], float]) -> Evaluate:
    """Returns what evaluates a function at each noise in turn."""
    return lambda noises: [loss(terms) for terms in noises]
