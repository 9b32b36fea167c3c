"""Own directions: small groups of a batch's examples each have a direction of their own.

A scalar of b examples has variance F + S/b along its direction, F being that of the direction and S
that of an example. A batch cut into D groups gives D scalars for the forwards of one, and a step
along all D directions makes about D times the progress (docs/theory.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zorba.defaults import Estimator
from zorba.optim.evaluation import Losses
from zorba.optim.fused import FusedPlacement
from zorba.optim.placement import Placement
from zorba.optim.terms import NoiseTerms, RowTerms, differences, step_seed


class OwnDirections:
    """Evaluates a batch whose examples have directions of their own."""

    def __init__(self, placement: Placement, drew: Callable[[], bool]) -> None:
        self._placement = placement
        self._drew = drew  # whether the last evaluation drew random numbers, see ``Evaluator``
        self._both_at_once = True  # whether both signs may be one batch, as far as is known

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
        distances = torch.tensor(shares, dtype=torch.float64) * options["eps"]
        signs = (1.0, -1.0) if options["estimator"] == "central" else (1.0,)
        plan = (seed, each, distances.float(), options["num_perturbations"], signs)
        if isinstance(self._placement, FusedPlacement):
            losses = self._in_rows(self._placement, losses_at, *plan, closure, batch)
        else:
            losses = self._one_by_one(losses_at, *plan)
        scalars = own_scalars(losses, options["eps"], options["estimator"], each)
        return [float(one.mean()) for one in losses], scalars

    def _one_by_one(
        self, losses_at: Losses, seed: int, each: int, distances: Tensor, count: int,
        signs: tuple[float, ...],
    ) -> list[Any]:  # fmt: skip
        """A forward for each direction, whose other examples run in vain: any noise can do so."""
        first = losses_at([NoiseTerms.none(len(distances))])[0]
        numbers = range(direction_count(len(first), each) * count)
        noises = [NoiseTerms.single(seed, n, s * distances) for n in numbers for s in signs]
        found = iter(losses_at(noises))
        kept = [[np.empty_like(first) for _ in signs] for _ in range(count)]
        for number in numbers:
            mine = slice(number // count * each, (number // count + 1) * each)
            for sign in range(len(signs)):
                kept[number % count][sign][mine] = next(found)[mine]
        return [*([first] if len(signs) == 1 else []), *(one for p in kept for one in p)]

    def _in_rows(
        self, placement: FusedPlacement, losses_at: Losses, seed: int, each: int,
        distances: Tensor, count: int, signs: tuple[float, ...], closure: Callable[..., Any],
        batch: Any,
    ) -> list[Any]:  # fmt: skip
        """All directions in one forward, a row each; both signs too, where the batch can be."""
        samples, stride = range(count), count
        twice = None
        if batch is not None and len(signs) == 2 and self._both_at_once:
            twice = repeated(batch, 2)
        if twice is not None:
            terms = [RowTerms(seed, each, distances, p, stride, signs) for p in samples]
            try:
                found = losses_at(terms, partial(closure, twice))
                placement.check_rows(len(found[-1]))
                # Dropout gives each half masks of its own: not the difference of one network.
                if not self._drew():
                    return [half for one in found for half in np.split(one, 2)]
            except torch.OutOfMemoryError:
                pass
            self._both_at_once = False  # two calls, from here on
        base = [NoiseTerms.none(len(distances))] if len(signs) == 1 else []
        sides = [RowTerms(seed, each, distances, p, stride, (s,)) for p in samples for s in signs]
        found = losses_at([*base, *sides])
        placement.check_rows(len(found[-1]))
        return found


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


def own_scalars(losses: Sequence[Any], eps: float, estimator: Estimator, each: int) -> list[float]:
    """Returns the scalars of a batch's directions, in the order of their samples.

    Args:
        losses: float64 [examples] at each noise of a step, as ``evaluation_noises`` orders them:
            perturbation p of direction d is sample ``d * P + p``.
        eps: distance.
        estimator: kind of difference.
        each: examples that share a direction; the last may have fewer.

    Returns:
        D * P numbers. Their mean weighs all examples alike: a direction of fewer counts for less.
    """
    starts = np.arange(0, len(losses[0]), each)
    weight = len(starts) / len(losses[0])
    # [P, D]: sums over the examples of each direction.
    sums = [np.add.reduceat(g, starts) * weight for g in differences(losses, eps, estimator)]
    return [float(g) for g in np.stack(sums, axis=1).reshape(-1)]


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
