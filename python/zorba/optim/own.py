"""Own directions: small groups of a batch's examples each have a direction of their own.

The square of a scalar of b examples is phi + S/b in the mean, phi being that of the slope and S the
variance of an example's scalar. A batch cut into D groups gives D scalars for the forwards of one,
and while phi is not small beside S/b a step makes about D times the progress (docs/theory.md, f).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zorba.defaults import Estimator
from zorba.optim.evaluation import Losses
from zorba.optim.fused import FusedPlacement
from zorba.optim.placement import Placement
from zorba.optim.terms import (
    NoiseTerms,
    RowTerms,
    Terms,
    differences,
    evaluation_noises,
    row_noises,
    step_seed,
)


class OwnDirections:
    """Evaluates a batch whose examples have directions of their own."""

    def __init__(self, placement: Placement, drew: Callable[[], bool]) -> None:
        self._placement = placement
        self._both_signs = BothSigns(placement, drew)

    def __call__(
        self,
        losses_at: Losses,
        options: Mapping[str, Any],
        shares: Sequence[float],
        closure: Callable[..., Any],
        batch: Any,
    ) -> tuple[list[float], list[float]]:
        """Returns the mean loss of each evaluation, and the scalars, see ``own_scalars``.

        Args:
            losses_at: of ``Evaluator.step``.
            options: of the step.
            shares: distance of each group in units of eps.
            closure: of the step; takes ``batch``, unless that is None.
            batch: to be given twice, for both signs in one forward; None: they are two.
        """
        seed, each = step_seed(options["seed"], options["step"]), options["examples_per_direction"]
        eps, count, estimator = (options[n] for n in ("eps", "num_perturbations", "estimator"))
        if isinstance(self._placement, FusedPlacement):
            # All directions in one forward, a row each; both signs too, where the batch can be.
            distances = eps * torch.tensor(shares, dtype=torch.float32)
            rows = [RowTerms(seed, each, distances, p, count) for p in range(count)]
            losses = self._both_signs(losses_at, row_noises(rows, estimator), closure, batch)
        else:
            losses = _one_by_one(losses_at, each, count, (seed, eps, estimator, shares))
        scalars = own_scalars(losses, eps, estimator, each)
        return [float(one.mean()) for one in losses], scalars


def _one_by_one(
    losses_at: Losses, each: int, count: int, how: tuple[int, float, Estimator, Sequence[float]]
) -> list[Any]:
    """A forward for each direction, whose other examples run in vain: any noise can do so."""
    seed, eps, estimator, shares = how

    def noises(number: int) -> list[NoiseTerms]:
        return evaluation_noises(seed, eps, number, estimator, shares)

    # The first tells how many examples there are, and so how many directions.
    found = losses_at(noises(1)[:1])
    examples = len(found[0])
    number = direction_count(examples, each)
    found += losses_at(noises(number * count)[1:])
    base = found[:1] if estimator == "forward" else []
    sides = np.stack(found[len(base) :]).reshape(number, count, -1, examples)
    # Of each example those along its own direction: [examples, P, sides].
    at = np.arange(examples)
    mine = sides[at // each, :, :, at]
    return [*base, *mine.transpose(1, 2, 0).reshape(-1, examples)]


class BothSigns:
    """Evaluates both sides of differences in one batch of twice as many rows, where that can be."""

    def __init__(self, placement: Placement, drew: Callable[[], bool]) -> None:
        self._placement = placement
        self._drew = drew  # whether the last evaluation drew random numbers, see ``Evaluator``
        self._possible = isinstance(placement, FusedPlacement)  # as far as is known

    def __call__(
        self,
        losses_at: Losses,
        noises: Sequence[Terms],
        closure: Callable[..., Any],
        batch: Any,
    ) -> list[Any]:
        """Returns the losses at noises; two ``RowTerms`` after each other are sides of one.

        One after the other, where the batch is None or cannot be repeated, memory runs out, or the
        model draws random numbers. ValueError: the forward's rows are not those of the losses.
        """
        rows = [terms for terms in noises if isinstance(terms, RowTerms)]
        if self._possible and batch is not None and len(rows) == len(noises):
            twice = repeated(batch, 2)
            self._possible = twice is not None
            try:
                if twice is not None:
                    pairs = zip(rows[::2], rows[1::2], strict=True)
                    terms = [replace(plus, signs=plus.signs + minus.signs) for plus, minus in pairs]
                    found = self._checked(losses_at(terms, partial(closure, twice)))
                    # Dropout gives each half masks of its own: not the difference of one network.
                    if not self._drew():
                        return [half for one in found for half in np.split(one, 2)]
            except torch.OutOfMemoryError:
                pass
            self._possible = False  # two calls, from here on
        return self._checked(losses_at(noises))

    def _checked(self, losses: list[Any]) -> list[Any]:
        if isinstance(self._placement, FusedPlacement):
            self._placement.check_rows(np.size(losses[-1]))
        return losses


def example_losses(value: Any) -> Any:
    """Returns what a closure gave as float64 [examples]; ValueError unless it is a vector."""
    losses = torch.as_tensor(value).detach()
    if losses.ndim != 1 or not len(losses):
        raise ValueError(
            "directions='own' needs a closure that returns a loss for each example, a tensor "
            f"[examples]; got shape {tuple(losses.shape)} (cross_entropy: reduction='none')"
        )
    return losses.double().cpu().numpy()


def direction_count(examples: int, each: int) -> int:
    """Returns how many directions a batch has of which ``each`` examples share one."""
    return -(-examples // each)


def examples_each(examples: int, count: int) -> int:
    """Returns how many examples share a direction where a batch is cut for ``count`` directions."""
    return direction_count(examples, count)


def own_scalars(
    losses: Sequence[Any], eps: float, estimator: Estimator, each: int, count: int | None = None
) -> list[float]:
    """Returns the scalars of a batch's directions, in the order of their samples.

    Args:
        losses: float64 [examples] at each noise of a step, as ``evaluation_noises`` orders them:
            perturbation p of direction d is sample ``d * P + p``.
        eps: distance.
        estimator: kind of difference.
        each: examples that share a direction; the last may have fewer.
        count: D; by default as many as the examples fill. Those behind have a scalar of 0.

    Returns:
        D * P numbers. Their mean weighs all examples alike: a direction of fewer counts for less.
    """
    found = differences(losses, eps, estimator)
    sums = np.stack([direction_means(g, each, count) for g in found], axis=1)  # [D, P]
    return [float(g) for g in sums.reshape(-1)]


def direction_means(values: Any, each: int, count: int | None = None) -> Any:
    """Returns ``D / n`` times the sums over each ``each`` of n values, [D]; see ``own_scalars``."""
    starts = np.arange(0, len(values), each)
    sums = np.add.reduceat(values, starts)
    out = np.zeros(len(starts) if count is None else count)
    out[: len(starts)] = sums * (len(out) / len(values))
    return out


def repeated(batch: Any, times: int) -> Any:
    """Returns a batch several times, one behind the other; None where it is of no known kind.

    Tensors, or mappings, lists and tuples of them, are repeated along their first dimension where
    they have as many rows as the first; an object with ``repeat(times)`` does it itself.
    """
    if not isinstance(batch, (Tensor, Mapping, list, tuple)):
        own = getattr(batch, "repeat", None)
        return None if own is None else own(times)
    rows = _rows(batch)
    return None if rows is None else _repeat(batch, rows, times)


def _rows(value: Any) -> int | None:
    if isinstance(value, Tensor):
        return len(value) if value.ndim else None
    if isinstance(value, Mapping):
        value = list(value.values())
    found = map(_rows, value) if isinstance(value, (list, tuple)) else ()
    return next((rows for rows in found if rows is not None), None)


def _repeat(value: Any, rows: int, times: int) -> Any:
    if isinstance(value, Tensor):
        return torch.cat([value] * times) if value.ndim and len(value) == rows else value
    if isinstance(value, Mapping):
        return {name: _repeat(item, rows, times) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_repeat(item, rows, times) for item in value)
    return value
