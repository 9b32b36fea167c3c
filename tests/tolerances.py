"""Every number that a test compares with within a tolerance, and the reason for it.

Weights, noise and fingerprints are never compared within a tolerance: they are equal bit for bit
between backends. What is left are properties of distributions. Where a property is computed over
all 2**32 words the bound is the promise of ``docs/noise.md``; where it is estimated from a sample,
the seed is frozen, so the figure is a constant of the contract and the test cannot flake: the bound
says how far a good generator may be off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """A bound and why it is what it is."""

    bound: float
    reason: str


STANDARD_ERRORS = 5.0
"""Sampled statistics may be this many standard errors off: one in 1.7 million for a good one."""

TOLERANCES = {
    "noise mean": Tolerance(0.0, "bit 31 flips the sign and nothing else: exact"),
    "noise variance": Tolerance(1e-3, "promised in docs/noise.md; measured 1.8e-5 over all words"),
    "noise kurtosis": Tolerance(1e-3, "promised in docs/noise.md; measured 1.8e-4 over all words"),
    "noise KS": Tolerance(
        1e-4,
        "docs/noise.md: a sample needs about 2e8 values to tell the noise from a normal",
    ),
    "noise reach": Tolerance(4.7, "docs/noise.md: largest |z|; 16 bits of radius end at 4.855"),
    "radius": Tolerance(5e-4, "of r, against sqrt(-2 ln u); measured 3e-4, where u is near 1"),
    "angle": Tolerance(2e-4, "of cos and sin; measured 7e-5"),
    "applied over intended": Tolerance(
        0.01, "an update of 1e-7 of the weight arrives whole under stochastic rounding"
    ),
    "merged adapter": Tolerance(
        1e-5, "float32: x W + (x A) B against x (W + A B), through three blocks; measured 2e-6"
    ),
    "narrow logits": Tolerance(
        1e-4, "float32: fewer rows and other batch shapes change the order of a product's sums"
    ),
    "perturbed in place": Tolerance(
        2e-6, "float32 weights near 1, some dozen additions, each rounding by 6e-8 at most"
    ),
    "restored in place": Tolerance(
        1e-6, "float32 weights below 2 round by 1.2e-7 at most in each of a step's few passes"
    ),
    "steps in place": Tolerance(
        1e-5, "the same over the passes of a few steps; a perturbation is a thousand times as large"
    ),
    "scalar in place": Tolerance(
        1e-2,
        "relative; the other loss is taken at weights that rounded twice, and eps divides by 1e-2",
    ),
    "decay of bfloat16": Tolerance(
        3e-3, "4,096 stochastically rounded weights over 1,000 steps leave a ratio below 1e-3 off"
    ),
    "other placement": Tolerance(
        1e-4, "relative; a float32 loss at w + eps z, in place from one rounding more"
    ),
    "autocast": Tolerance(1e-2, "relative; bfloat16 products, cast inside or around the closure"),
    "padded logits": Tolerance(1e-4, "padding changes the order of a product's float32 sums"),
    "two passes in Trainer": Tolerance(
        1e-3, "a few steps with eps 0.1 that start from other roundings, which scalars amplify"
    ),
    "micro-batches": Tolerance(1e-5, "a sum of float32 losses of parts, and lr / eps on top"),
    "difference of losses": Tolerance(
        1e-3, "relative; float32 losses near 5 round by 5e-7, divided by a distance of 1e-2"
    ),
    "nearest loses": Tolerance(
        0.5, "nearest loses most of that update (all of it, for weights of 1 to 2)"
    ),
}


def bound(name: str) -> float:
    """Returns the bound of a row of the table."""
    return TOLERANCES[name].bound


def sampling_error(count: int) -> float:
    """Returns what a mean of ``count`` independent values of variance 1 may be off by."""
    return STANDARD_ERRORS / math.sqrt(count)
