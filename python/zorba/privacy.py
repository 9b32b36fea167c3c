"""Privacy: what a client is told to do to its scalars, ``zorba.federated.Privacy``.

It imports no torch: a site's file is read by processes that need none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Unit = Literal["example", "client"]
UNITS: tuple[Unit, ...] = get_args(Unit)


@dataclass(frozen=True)
class Privacy:
    """What a client does to its scalars before anybody sees them.

    A local step measures P scalars. With unit "example" each example has a vector of P finite
    differences, with "client" the whole batch has one. Vectors are cut to the L2 norm ``clip`` and
    averaged over the batch's n (n = 1 for "client"), and a Gaussian of standard deviation
    ``noise_multiplier * 2 * clip / n`` is added to each of the P numbers: 2 clip / n is how far the
    mean can move when one example is replaced by any other, or with "client" all of its data.

    Attributes:
        unit: whom epsilon protects: each "example", or the "client" with all of its examples.
        clip: L2 norm of a vector of P differences, in units of the scalars.
        noise_multiplier: of that sensitivity.
        delta: at which epsilon is told; well below one over the number of units.
        max_epsilon: the client measures nothing that would spend more.
    """

    unit: Unit
    clip: float
    noise_multiplier: float
    delta: float
    max_epsilon: float = math.inf

    def __post_init__(self) -> None:
        """Raises ValueError where a number makes no sense."""
        if self.unit not in UNITS:
            raise ValueError(f"unit is {self.unit!r}; expected one of {', '.join(UNITS)}")
        for what in ("clip", "noise_multiplier"):
            value = getattr(self, what)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{what} must be positive and finite, got {value!r}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must be between 0 and 1, got {self.delta!r}")
        if not self.max_epsilon > 0:
            raise ValueError(f"max_epsilon must be positive, got {self.max_epsilon!r}")
