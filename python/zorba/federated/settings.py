"""What the server decides for a job: its settings, and the masks of its clients."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from zorba import defaults
from zorba.defaults import DIRECTIONS, ESTIMATORS, Directions, Estimator
from zorba.federated.codec import check_name
from zorba_kernels.noise import DISTRIBUTIONS, ROUNDINGS, Distribution, Rounding
from zorba_kernels.program import check_choice, check_uint64, integer

Weighting = Literal["examples", "uniform"]
Aggregation = Literal["mean", "median", "trimmed"]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)

MAX_STEPS = 4096  # of a round, and perturbations of a step: bounds what a message may ask


@dataclass(frozen=True)
class FederationSettings:
    """Settings of a federated job. They stay on the server; plans carry what clients need.

    ``job``, ``seed``, ``distribution`` and ``rounding`` must stay as they are when a server
    continues a log. The others may change: log entries hold final coefficients.
    """

    job: str  # name of the job
    seed: int  # uint64 from which every seed of the job is derived
    lr: float | Callable[[int], float]  # learning rate, or a function from the round (from 1) to it
    num_perturbations: int = defaults.NUM_PERTURBATIONS  # P, directions of a client's local step
    local_steps: int = 1  # K, local steps of a round
    eps: float = defaults.EPS  # distance of the evaluations
    estimator: Estimator = defaults.ESTIMATOR
    distribution: Distribution = defaults.DISTRIBUTION  # of the noise
    rounding: Rounding = "stochastic"  # of 16-bit weights in an update
    clip: float | None = None  # largest absolute scalar; larger ones are cut to it. None: no limit
    clients_per_round: int | None = None  # how many clients take part in a round; None for all
    weighting: Weighting = "examples"  # clients weigh by their examples, or all alike
    # "shared": all clients measure the same P directions, and "own": each measures P of its own, so
    # that a round has P for every client. None: own ones while at most ``own_up_to`` take part.
    directions: Directions | None = None
    own_up_to: int = 64
    # With own directions nobody can compare clients' scalars; so no client moves the weights by
    # more than this, times what the median client does. None: no limit.
    part_bound: float | None = 5.0
    # Of a block's scalars, with shared directions: their mean, their median, or the mean of what is
    # left when they are trimmed at both ends. See ``zorba.federated.aggregate``.
    aggregation: Aggregation = "mean"
    # Share of a block's weight that is trimmed at each end, at least 0 and below 0.5: more than the
    # share of clients that may lie.
    trim: float = 0.25

    def __post_init__(self) -> None:
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
        check_choice("weighting", self.weighting, get_args(Weighting))
        check_choice("aggregation", self.aggregation, AGGREGATIONS)
        if self.directions is not None:
            check_choice("directions", self.directions, DIRECTIONS)
        if self.directions == "own" and self.aggregation != "mean":
            raise ValueError(
                f"aggregation {self.aggregation!r} compares clients along the same direction, and "
                "directions are 'own': take directions='shared', or aggregation='mean'"
            )
        _check_count("own_up_to", self.own_up_to, 1 << 20)
        if self.part_bound is not None and _check_number("part_bound", self.part_bound) < 1:
            raise ValueError(f"part_bound must be at least 1, got {self.part_bound!r}")
        if _check_number("trim", self.trim) >= 0.5:
            raise ValueError(f"trim must be below 0.5, got {self.trim!r}: 0.5 is the median")
        if not callable(self.lr):  # a schedule is checked where it is called: ``lr_at``
            _check_number("lr", self.lr)

    @cached_property  # every message is compared with it
    def job_id(self) -> int:
        """uint64 that messages and the log carry: a hash of the job's name and seed."""
        return self._derive("job", self.job.encode())

    def directions_of(self, clients: int) -> Directions:
        """Returns whose the directions of a job with this many clients are."""
        if self.directions is not None:
            return self.directions
        taking_part = min(clients, self.clients_per_round or clients)
        robust = self.aggregation != "mean"
        return "shared" if robust or taking_part > self.own_up_to else "own"

    def lr_at(self, round_number: int) -> float:
        """Returns the learning rate of a round, or raises ValueError where the schedule fails."""
        rate = self.lr(round_number) if callable(self.lr) else self.lr
        return _check_number(f"lr of round {round_number}", rate)

    def seeds_of(self, round_number: int) -> tuple[int, ...]:
        """Returns the uint64 seed of each local step of a round, [K]."""
        # A function of job and round: clients that are asked at different times measure the same
        # directions, and a server that was killed asks the same again.
        steps = range(self.local_steps)
        return tuple(self._derive("seed", struct.pack("<II", round_number, k)) for k in steps)

    def rounding_seed_of(self, round_number: int) -> int:
        """Returns the uint64 seed of a round's stochastic rounding."""
        return self._derive("rounding", struct.pack("<I", round_number))

    def ranks_of(self, round_number: int, count: int) -> npt.NDArray[np.uint64]:
        """Returns a number for each client in the order of names, [count]: the lowest are drawn."""
        # The raw stream of Philox4x64: numpy promises that it stays the same between versions,
        # which it does not promise of Generator's methods.
        key = self._derive("draw", struct.pack("<I", round_number))
        ranks: npt.NDArray[np.uint64] = np.random.Philox(key=key).random_raw(count)
        return ranks

    def _derive(self, purpose: str, data: bytes) -> int:
        # A hash, not a generator's next number: a server may start in the middle of a job. Seeds of
        # noise and of rounding must never be the same, so the purpose is part of it.
        text = b"zorba " + purpose.encode() + b"\0" + struct.pack("<Q", self.seed) + data
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


class Masks:
    """Which client activates which block, checked: bool [clients, blocks], rows sorted by name."""

    def __init__(self, names: Sequence[str], masks: Any, num_blocks: int) -> None:
        array: npt.NDArray[np.bool_] = np.asarray(masks)
        wanted, got = [len(names), num_blocks], [*array.shape]
        if array.dtype != np.bool_ or got != wanted:
            told = f"masks must be bool {wanted} (clients, blocks), got {array.dtype} {got}"
            raise ValueError(told)
        # A name is the client's place in the log's sums and on disk: two clients cannot share it.
        if len(set(names)) != len(names) or not names:
            raise ValueError("there must be clients, and their names must differ")
        # The order of every sum over clients: it must not depend on how a caller lists them.
        order = sorted(range(len(names)), key=names.__getitem__)
        self.rows = {check_name(names[at], "client name"): row for row, at in enumerate(order)}
        self.array = array[order]
        digest = hashlib.sha256()
        for name, mask in zip(self.rows, self.array, strict=True):
            # Without blocks it would measure noise that is not there, and count as one of N.
            if not mask.any():
                raise ValueError(f"client {name} activates no block: leave it out or give it one")
            digest.update(name.encode() + b"\0" + mask.tobytes())
        # A hash, not a counter: a server that starts again gives the same masks the same number.
        self.version = int.from_bytes(digest.digest()[:4], "little")  # uint32

    def of(self, names: Iterable[str]) -> npt.NDArray[np.bool_]:
        """Returns the masks of these clients, bool [names, blocks]."""
        return self.array[[self.rows[name] for name in names]]


def positive_in_float32(value: float) -> bool:
    """Returns whether a number is positive and finite in float32, in which noise is added."""
    # Not only positive: 1e-300 is 0 in float32, and an evaluation there measures nothing.
    with np.errstate(over="ignore"):
        return 0 < float(np.float32(value)) < math.inf


def _check_count(what: str, value: int, most: int) -> None:
    if isinstance(value, bool) or not 1 <= integer(value, what) <= most:
        raise ValueError(f"{what} must be an integer from 1 to {most}, got {value!r}")


def _check_number(what: str, value: Any) -> float:
    """Returns value as a float, or raises where it is no finite number of at least 0."""
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{what} must be a finite number and not negative, got {value!r}")
    return number
