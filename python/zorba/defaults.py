"""Defaults of a zeroth-order step, written once: optimizer, trainer, federation and commands agree.

They are MeZO's (arXiv 2305.17333): one gaussian direction a step and a central difference. This
module imports nothing, so that the settings of commands, and ``--help``, load without torch.
"""

from __future__ import annotations

from typing import Literal, get_args

# As in zorba_kernels.noise, which works without this package and loads torch; a test compares them.
Distribution = Literal["gaussian", "rademacher", "rank1"]
Estimator = Literal["central", "forward"]
Directions = Literal["shared", "own"]
DIRECTIONS: tuple[Directions, ...] = get_args(Directions)
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)

DISTRIBUTION: Distribution = "gaussian"
"""Distribution of the noise."""
EPS = 1e-3
"""Distance at which losses are taken, in units of the noise."""
NUM_PERTURBATIONS = 1
"""P, directions a step."""
EXAMPLES_PER_DIRECTION = 8
"""Examples of a batch that share a direction, where directions are their own."""
ESTIMATOR: Estimator = "central"
"""Kind of finite difference: "central" takes 2P losses a step, "forward" P + 1."""
