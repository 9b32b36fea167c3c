"""Every number that a test compares with within a tolerance, and the reason for it.

Weights, noise and fingerprints are equal bit for bit, never within a tolerance. Bounds over all
2**32 words are promises of ``docs/noise.md``; samples have frozen seeds, so that no test flakes:
their bounds say how far a good generator may be off.
"""

from __future__ import annotations

import math

from torch import Tensor

STANDARD_ERRORS = 5.0
"""Sampled statistics may be this many standard errors off: one in 1.7 million for a good one."""

TOLERANCES = {
    "noise mean": (0.0, "bit 31 flips the sign and nothing else: exact"),
    "noise variance": (1e-3, "promised in docs/noise.md; measured 1.8e-5 over all words"),
    "noise kurtosis": (1e-3, "promised in docs/noise.md; measured 1.8e-4 over all words"),
    "noise KS": (1e-4, "docs/noise.md: a sample needs about 2e8 values to tell it from a normal"),
    "noise reach": (4.7, "docs/noise.md: largest |z|; 16 bits of radius end at 4.855"),
    "radius": (5e-4, "of r, against sqrt(-2 ln u); measured 3e-4, where u is near 1"),
    "angle": (2e-4, "of cos and sin; measured 7e-5"),
    "applied over intended": (0.01, "an update of 1e-7 of the weight arrives whole, stochastic"),
    "nearest loses": (0.5, "nearest loses most of that update (all of it, for weights of 1 to 2)"),
    "merged adapter": (1e-5, "float32: x W + (x A) B against x (W + A B), 3 blocks; measured 2e-6"),
    "narrow logits": (1e-4, "float32: other batch shapes change the order of a product's sums"),
    "padded logits": (1e-4, "padding changes the order of a product's float32 sums"),
    "perturbed in place": (2e-6, "float32 near 1, some dozen additions, each rounds by 6e-8"),
    "restored in place": (1e-6, "float32 below 2 rounds by 1.2e-7 in each of a step's few passes"),
    "scalar of a part": (
        2e-2,
        "float32 losses near 4 by two ways, each off by a few 2e-7, over a distance of 1e-3",
    ),
    "steps in place": (
        1e-5,
        "over a few steps; a perturbation is a thousand times as large",
    ),
    "scalar in place": (
        1e-2,
        "relative; one loss is at weights that rounded twice; eps 1e-2",
    ),
    "decay of bfloat16": (3e-3, "4,096 weights, stochastic, over 1,000 steps: a ratio within 1e-3"),
    "other placement": (1e-4, "relative; a float32 loss at w + eps z, in place one rounding more"),
    "autocast": (1e-2, "relative; bfloat16 products, cast inside or around the closure"),
    "two passes in Trainer": (
        1e-3,
        "a few steps with eps 0.1 from other roundings, amplified",
    ),
    "micro-batches": (1e-5, "a sum of float32 losses of parts, and lr / eps on top"),
    "perturbed linear float32": (
        2e-5,
        "of the largest; sums of 1,100 products",
    ),
    "perturbed linear bfloat16": (2e-2, "of the largest; rounded twice to 8 bits, by 4e-3 each"),
    "perturbed linear float16": (2e-3, "of the largest; rounded twice to 11 bits, by 5e-4 each"),
    "fused scalar": (2e-2, "relative to the largest; other orders of sums, over eps of 1e-2"),
    "fused scalar in 16 bits": (
        0.25,
        "of the largest, between bfloat16 and float32 over eps of 0.1; measured 0.12",
    ),
    "fused loss": (1e-5, "relative; float32, other orders of the sums of a layer"),
    "losses of examples": (1e-5, "relative; float32, a sum of a batch's losses in another order"),
    "own steps by hand": (
        1e-5,
        "4 steps; a loss that is summed in another order, over eps of 1e-2",
    ),
    "losses in 16 bits": (
        2e-2,
        "relative; the model's own loss is rounded to 8 bits, by 4e-3 each",
    ),
    "difference of losses": (
        1e-3,
        "relative; losses near 5 round by 5e-7, over 1e-2",
    ),
}
"""Bound, and why it is what it is."""


def bound(name: str) -> float:
    return TOLERANCES[name][0]


def sampling_error(count: int) -> float:
    """Returns what a mean of ``count`` independent values of variance 1 may be off by."""
    return STANDARD_ERRORS / math.sqrt(count)


def assert_normal(z: Tensor) -> None:
    assert abs(float(z.mean())) < sampling_error(z.numel())
    assert abs(float(z.var()) - 1.0) < 2**0.5 * sampling_error(z.numel())
