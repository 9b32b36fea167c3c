"""FederationSettings: what the server decides for a job."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from zorba import defaults
from zorba.defaults import ESTIMATORS, Estimator
from zorba_kernels.noise import DISTRIBUTIONS, ROUNDINGS, Distribution, Rounding
from zorba_kernels.program import check_choice, check_uint64, integer

Weighting = Literal["examples", "uniform"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
Aggregation = Literal["mean", "median", "trimmed"]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)

MAX_STEPS = 4096
"""Most local steps of a round, and most perturbations of a step: bounds what a message may ask."""


@dataclass(frozen=True)
class FederationSettings:
    """Settings of a federated job. They stay on the server; plans carry what clients need.

    ``job``, ``seed``, ``distribution`` and ``rounding`` must stay as they are when a server
    continues a log. The others may change: log entries hold final coefficients.

    Attributes:
        job: name of the job.
        seed: uint64 from which every seed of the job is derived.
        num_perturbations: P, perturbations of a local step.
        local_steps: K, local steps of a round.
        eps: distance of the evaluations.
        lr: learning rate, or a function from the round (from 1) to it.
        estimator: "central" or "forward".
        distribution: of the noise, "gaussian" or "rademacher".
        rounding: of 16-bit weights in an update, "nearest" or "stochastic".
        clip: largest absolute value of a scalar; larger ones are cut to it. None for no limit.
        clients_per_round: how many clients take part in a round; None for all.
        weighting: clients weigh by their "examples", or all alike: "uniform".
        aggregation: of a block's scalars: their "mean", "median", or the mean of what is left when
            they are "trimmed" at both ends. See ``zorba.federated.aggregate``.
        trim: share of a block's weight that "trimmed" leaves out at each end, at least 0 and below
            0.5. Take more than the share of clients that may lie.
    """

    job: str
    seed: int
    lr: float | Callable[[int], float]
    num_perturbations: int = defaults.NUM_PERTURBATIONS
    local_steps: int = 1
    eps: float = defaults.EPS
    estimator: Estimator = defaults.ESTIMATOR
    distribution: Distribution = defaults.DISTRIBUTION
    rounding: Rounding = "stochastic"
    clip: float | None = None
    clients_per_round: int | None = None
    weighting: Weighting = "examples"
    aggregation: Aggregation = "mean"
    trim: float = 0.25

    def __post_init__(self) -> None:
        """Raises ValueError or TypeError where a setting makes no sense."""
        if not isinstance(self.job, str) or not 1 <= len(self.job) <= 200:
            raise ValueError(f"job must be a name of 1 to 200 characters, got {self.job!r}")
        check_uint64(self.seed, "seed")
        _check_count("num_perturbations", self.num_perturbations, MAX_STEPS)
        _check_count("local_steps", self.local_steps, MAX_STEPS)
        if self.clients_per_round is not None:
            _check_count("clients_per_round", self.clients_per_round, 1 << 31)
        # Noise is added in float32: a distance that is 0 or infinite there would divide by zero.
        if _check_number("eps", self.eps) <= 0 or not positive_in_float32(self.eps):
            raise ValueError(f"eps must be positive and finite in float32, got {self.eps!r}")
        if self.clip is not None and _check_number("clip", self.clip) <= 0:
            raise ValueError(f"clip must be positive, got {self.clip!r}")
        check_choice("estimator", self.estimator, ESTIMATORS)
        check_choice("distribution", self.distribution, DISTRIBUTIONS)
        check_choice("rounding", self.rounding, ROUNDINGS)
        check_choice("weighting", self.weighting, WEIGHTINGS)
        check_choice("aggregation", self.aggregation, AGGREGATIONS)
        if _check_number("trim", self.trim) >= 0.5:
            raise ValueError(f"trim must be below 0.5, got {self.trim!r}: 0.5 is the median")
        # A schedule can only be checked where it is called: ``lr_at``.
        if not callable(self.lr):
            _check_number("lr", self.lr)

    @cached_property  # every message is compared with it
    def job_id(self) -> int:
        """uint64 that messages and the log carry: a hash of the job's name and seed."""
        return self._derive("job", self.job.encode())

    def lr_at(self, round_number: int) -> float:
        """Returns the learning rate of a round, or raises ValueError where the schedule fails."""
        if not callable(self.lr):
            return float(self.lr)
        return _check_number(f"lr of round {round_number}", self.lr(round_number))

    def seed_of(self, round_number: int, step: int) -> int:
        """Returns the uint64 seed of a local step."""
        # It follows from job and round, none is drawn: clients that are asked at different times
        # measure the same directions, and a server that was killed asks the same again.
        return self._derive("seed", struct.pack("<II", round_number, step))

    def seeds_of(self, round_number: int) -> tuple[int, ...]:
        """Returns the uint64 seed of each local step of a round, [K]."""
        return tuple(self.seed_of(round_number, step) for step in range(self.local_steps))

    def rounding_seed_of(self, round_number: int) -> int:
        """Returns the uint64 seed of a round's stochastic rounding."""
        return self._derive("rounding", struct.pack("<I", round_number))

    def ranks_of(self, round_number: int, count: int) -> npt.NDArray[np.uint64]:
        """Returns the numbers by which clients are drawn: the lowest take part in the round.

        One for each of ``count`` clients in the order of names.
        """
        # The raw stream of Philox4x64: numpy promises that it stays the same between versions,
        # which it does not promise of Generator's methods.
        key = self._derive("draw", struct.pack("<I", round_number))
        ranks: npt.NDArray[np.uint64] = np.random.Philox(key=key).random_raw(count)
        return ranks

    def _derive(self, purpose: str, data: bytes) -> int:
        """First 8 bytes of SHA-256 of the purpose, the job's seed and data."""
        # A hash rather than a generator's next number: any seed can be had alone, in any order,
        # which is what a server that starts in the middle of a job needs.
        # The purpose is part of it: a seed of noise and one of rounding must never be the same.
        text = b"zorba " + purpose.encode() + b"\0" + struct.pack("<Q", self.seed) + data
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def positive_in_float32(value: float) -> bool:
    """Returns whether a number is positive and finite in float32, in which noise is added."""
    # Not only positive: 1e-300 is 0 in float32, and an evaluation there measures nothing.
    with np.errstate(over="ignore"):
        return 0 < float(np.float32(value)) < math.inf


def _check_count(what: str, value: int, most: int) -> None:
    if isinstance(value, bool) or not 1 <= integer(value, what) <= most:
        raise ValueError(f"{what} must be an integer from 1 to {most}, got {value!r}")


def _check_number(what: str, value: Any) -> float:
    """Returns value as a float, or raises when it is no finite number of at least 0."""
    if isinstance(value, bool | str):
        raise TypeError(f"{what} must be a number, got {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{what} must be a number, got {value!r}") from None
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{what} must be finite and not negative, got {number!r}")
    return number
