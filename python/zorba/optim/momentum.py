"""Momentum without state: the velocity is replayed from the seeds and scalars of recent steps.

``v_t = sum_j momentum^j * mean_p g[t-j, p] z(seed_{t-j}, p)`` is what heavy-ball SGD keeps in a
buffer as large as the model. Here the same sum is made of seeds in the pass that applies it, cut
where a step's weight falls below ``CUT``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from zorba.optim.terms import NoiseTerms

# Weight below which a step is left out of the velocity: 44 steps at momentum 0.9. A pass costs more
# with every term, and 1 % of a scalar is less than its noise.
CUT = 0.01

# Seed of a step, its scalars, and the momentum by which it aged the velocity before it.
Step = tuple[int, tuple[float, ...], float]


def window(momentum: float) -> int:
    """Returns how many steps the velocity is made of."""
    return 1 if momentum == 0.0 else math.floor(math.log(CUT) / math.log(momentum)) + 1


def velocity(steps: Sequence[Step], scale: Sequence[float]) -> NoiseTerms:
    """Returns ``scale * v`` as noise, oldest step first.

    Args:
        steps: recent ones, the newest last.
        scale: of each group, [groups].
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
