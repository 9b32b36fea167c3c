"""NoiseTerms: combinations of seeded noises, at which losses are taken and by which weights move.

A scalar ``g[p]`` is the finite difference of the loss F along ``M z(seed, p)``, M being a mask of
groups: ``central``, ``(F(w + eps M z) - F(w - eps M z)) / (2 eps)`` (MeZO, arXiv 2305.17333,
definition 1), or ``forward``, ``(F(w + eps M z) - F(w)) / eps``, with one F(w) for all p.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zorba.defaults import Estimator

# Weight below which a step is left out of the velocity: 44 steps at momentum 0.9. A pass costs more
# with every term, and 1 % of a scalar is less than its noise.
CUT = 0.01

# Seed of a step, its scalars, and the momentum by which it aged the velocity before it.
Step = tuple[int, tuple[float, ...], float]


@dataclass(frozen=True)
class NoiseTerms:
    """A linear combination of noises, ``sum_k coefs[group, k] * z(seeds[k], samples[k])``."""

    seeds: tuple[int, ...]  # uint64 of each term
    samples: tuple[int, ...]  # which perturbation of its seed each term is
    coefs: Tensor  # float32 [groups, terms] on the CPU; a row of zeros leaves its group alone

    def __post_init__(self) -> None:
        """Raises ValueError unless the parts belong together."""
        terms = len(self.seeds)
        if len(self.samples) != terms or self.coefs.ndim != 2 or self.coefs.shape[1] != terms:
            raise ValueError(
                f"{terms} seeds, {len(self.samples)} samples and coefs of shape "
                f"{tuple(self.coefs.shape)}; expected [groups, {terms}]"
            )

    @staticmethod
    def none(groups: int) -> NoiseTerms:
        """No noise at all."""
        return NoiseTerms((), (), torch.zeros(groups, 0))

    @staticmethod
    def single(seed: int, sample: int, coefs: Sequence[float] | Tensor) -> NoiseTerms:
        """One noise; ``coefs`` has one number a group."""
        column = torch.as_tensor(coefs, dtype=torch.float32).reshape(-1, 1)
        return NoiseTerms((seed,), (sample,), column)

    def plus(self, other: NoiseTerms) -> NoiseTerms:
        """This combination followed by another, in that order."""
        # Equal noises are not merged: kernels add in the order of terms, and bits depend on it.
        return NoiseTerms(
            self.seeds + other.seeds,
            self.samples + other.samples,
            torch.cat([self.coefs, other.coefs], dim=1),
        )

    def active(self, group: int) -> bool:
        """Whether the group's weights change at all."""
        return bool((self.coefs[group] != 0).any())

    def by_row(self, group: int, rows: int, start: int = 0) -> list[tuple[int, Tensor, Tensor]]:
        """Returns seed, samples int64 [rows] and scale float32 [rows] of each term."""
        return [
            (seed, torch.full((rows,), sample), coef.expand(rows))
            for seed, sample, coef in zip(
                self.seeds, self.samples, self.coefs[group].unbind(), strict=True
            )
            if coef != 0
        ]


@dataclass(frozen=True)
class RowTerms:
    """Noise of its own for each example of a batch, whose examples have directions of their own.

    The batch may be there several times, one behind the other, with a sign each: 1 and -1 for both
    sides of a central difference in one forward.
    """

    seed: int  # uint64
    examples: int  # rows, one after the other, that share a direction
    distances: Tensor  # float32 [groups]: what z is multiplied by; 0 leaves a group alone
    sample: int = 0  # of the first direction
    stride: int = 1  # from the sample of one direction to that of the next
    signs: tuple[float, ...] = (1.0,)
    base: NoiseTerms | None = None  # noise that all rows have besides

    def active(self, group: int) -> bool:
        """Whether the group has any noise."""
        own = bool(self.distances[group] != 0) and any(self.signs)
        return own or (self.base is not None and self.base.active(group))

    def by_row(self, group: int, rows: int, start: int = 0) -> list[tuple[int, Tensor, Tensor]]:
        """Returns seed, samples int64 [rows] and scale float32 [rows] of each term.

        ``start`` is the first row's number in the batch, where that runs in parts.
        """
        each = rows // len(self.signs)
        directions = (start + torch.arange(each)) // self.examples
        samples = (directions * self.stride + self.sample).repeat(len(self.signs))
        signs = torch.tensor(self.signs).repeat_interleave(each)
        common = [] if self.base is None else self.base.by_row(group, rows)
        return [*common, (self.seed, samples, signs * self.distances[group])]


Terms = NoiseTerms | RowTerms
Evaluate = Callable[[Sequence[Any]], Sequence[Any]]
"""Returns the loss at the weights plus each of the noises, and leaves the weights as they are.
It gets all evaluations of a step at once, so that it may run them side by side. Noises are
``NoiseTerms``, and ``RowTerms`` where it is known to take them: then the loss of each row."""


def step_seed(seed: int, step: int) -> int:
    """Returns the uint64 seed of a step: SHA-256 of (seed, step), first 8 bytes."""
    # Hashed, not seed + step: runs of neighbouring seeds would share all directions but one.
    digest = hashlib.sha256(f"zorba step {seed} {step}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def evaluation_noises(
    seed: int,
    eps: float,
    num_perturbations: int,
    estimator: Estimator,
    active: Sequence[float],
    pending: NoiseTerms | None = None,
    first_sample: int = 0,
) -> list[NoiseTerms]:
    """Returns the noises at which to evaluate: 2P, or P + 1 for ``forward``.

    Perturbation p is sample ``first_sample + p`` of the uint64 ``seed``, ``eps`` away. ``active``
    is the mask M: 1 for a group that is perturbed, else 0. ``pending`` is noise that the weights
    are understood to carry already (local steps not written).
    """
    mask = torch.as_tensor(active, dtype=torch.float32)
    base = NoiseTerms.none(len(mask)) if pending is None else pending
    central = estimator == "central"
    noises = [] if central else [base]
    for sample in range(first_sample, first_sample + num_perturbations):
        for distance in (eps, -eps) if central else (eps,):
            noises.append(base.plus(NoiseTerms.single(seed, sample, distance * mask)))
    return noises


def row_noises(directions: Sequence[RowTerms], estimator: Estimator) -> list[Terms]:
    """Returns the noises at which to evaluate a batch whose rows have directions of their own.

    In the order of ``evaluation_noises``; each of ``directions`` is one perturbation of all rows.
    """
    if estimator == "forward":
        one = directions[0]
        base = NoiseTerms.none(len(one.distances)) if one.base is None else one.base
        return [base, *directions]
    return [replace(one, signs=(sign,)) for one in directions for sign in (1.0, -1.0)]


def differences(losses: Sequence[Any], eps: float, estimator: Estimator) -> list[Any]:
    """Returns the P scalars g of the losses at ``evaluation_noises``; not finite where a loss is.

    Each loss is a number, or an array of one loss an example.
    """
    # In float64: a float32 difference of two losses near 5 has 5e-7 of rounding, over eps.
    if estimator == "central":
        pairs = zip(losses[::2], losses[1::2], strict=True)
        return [(plus - minus) / (2 * eps) for plus, minus in pairs]
    return [(plus - losses[0]) / eps for plus in losses[1:]]


def mean_loss(losses: Sequence[float]) -> float:
    """Returns the mean of losses; not a number if one of them is not finite."""
    # With fsum: exact, so that the order of losses does not show.
    return math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.nan


def one_by_one(loss: Callable[[NoiseTerms], float]) -> Evaluate:
    """Returns what evaluates a function at each noise in turn."""
    return lambda noises: [loss(terms) for terms in noises]


def window(momentum: float) -> int:
    """Returns how many steps the velocity is made of."""
    return 1 if momentum == 0.0 else math.floor(math.log(CUT) / math.log(momentum)) + 1


def velocity(steps: Sequence[Step], scale: Sequence[float]) -> NoiseTerms:
    """Returns ``scale * v`` as noise: v after these steps, the newest last; scale [groups].

    ``v_t = sum_j momentum^j * mean_p g[t-j, p] z(seed_{t-j}, p)`` is what heavy-ball SGD keeps in a
    buffer as large as the model. Here it is made of seeds and scalars in the pass that applies it.
    """
    # Each step aged those before it by its own momentum, which a schedule may have changed.
    ages = [1.0]
    for _, _, momentum in reversed(steps[1:]):
        ages.append(ages[-1] * momentum)
    terms = [
        (seed, sample, age * g, len(scalars))
        for age, (seed, scalars, _) in zip(reversed(ages), steps, strict=True)
        for sample, g in enumerate(scalars)
    ]
    seeds, samples, weights, counts = zip(*terms, strict=True)
    # In float64, rounded once: logs record these coefficients, and replicas must agree on them.
    rows = torch.tensor(scale, dtype=torch.float64)[:, None]
    coefs = rows * torch.tensor(weights, dtype=torch.float64) / torch.tensor(counts)
    return NoiseTerms(seeds, samples, coefs.to(torch.float32))
