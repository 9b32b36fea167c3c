"""Differential privacy of a client's scalars: clip, add Gaussian noise, count what it spends.

After DPZero (Zhang et al., arXiv 2310.09639, algorithm 2); ``docs/security.md`` says what is
protected from whom.
"""

from __future__ import annotations

import base64
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from zorba.federated.errors import FederationError
from zorba.files import write_whole
from zorba.optim.own import direction_means, examples_each
from zorba_kernels.program import check_choice

LEDGER_SCHEMA = 1
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

    Where each example has but one of the P directions (own directions, a batch in P parts), its
    vector is that one number, the mean is over its part, and n stands for n / P. With "client" a
    batch is never cut: the fewer examples a scalar is of, the more of it is the clip.
    """

    unit: Unit  # whom epsilon protects: each example, or the client with all of its examples
    clip: float  # L2 norm of a vector of P differences, in units of the scalars
    noise_multiplier: float  # of that sensitivity
    delta: float  # at which epsilon is told; well below one over the number of units
    max_epsilon: float = math.inf  # the client measures nothing that would spend more

    def __post_init__(self) -> None:
        check_choice("unit", self.unit, UNITS)
        for what, fits, expected in (
            ("clip", 0 < self.clip < math.inf, "positive and finite"),
            ("noise_multiplier", 0 < self.noise_multiplier < math.inf, "positive and finite"),
            ("delta", 0 < self.delta < 1, "between 0 and 1"),
            ("max_epsilon", self.max_epsilon > 0, "positive"),
        ):
            if not fits:
                raise ValueError(f"{what} must be {expected}, got {getattr(self, what)!r}")


@dataclass(frozen=True)
class PrivacySpent:
    """What a client says that all of its scalars have told so far: epsilon at delta, of a unit."""

    unit: Unit
    epsilon: float
    delta: float


class PrivacyAccountant:
    """Makes a client's scalars private, and keeps count of what they told.

    Needs the package dp-accounting (``zorba-kernels[privacy]``).

    Args:
        privacy: what is done to the scalars; all but its unit may change between starts.
        path: of the file with the count, one a client and data set, whatever the job; its folder
            must exist. None keeps the count in memory, for simulations.

    Raises:
        FederationError: the file is damaged or of another unit.
    """

    # The file is written before an answer leaves: a client that is killed and started again neither
    # forgets what it spent, nor answers the same plan twice with new noise, which would tell more.

    def __init__(self, privacy: Privacy, path: str | Path | None = None) -> None:
        self.privacy = privacy
        self.path = None if path is None else Path(path)
        self.last: tuple[bytes, bytes] | None = None  # digest of the last plan, and the answer
        self._releases: dict[float, int] = {}  # by noise multiplier
        # The operating system's: noise that follows from a seed can be taken off again.
        self._random = random.SystemRandom()
        if self.path is not None and self.path.exists():
            self._load(self.path)
        self.spent()  # a missing package is told here, not after the first round

    def spent(self, further: int = 0) -> PrivacySpent:
        """Returns what all releases so far, and this many more, come to."""
        try:
            from dp_accounting import GaussianDpEvent
            from dp_accounting.rdp import RdpAccountant
        except ImportError as error:
            told = "privacy is counted with dp-accounting: pip install zorba-kernels[privacy]"
            raise ImportError(told) from error
        # Each local step is one Gaussian mechanism; they compose by Renyi differential privacy
        # (Mironov, arXiv 1702.07476). No amplification by sampling: nothing here knows how batches
        # are picked. By noise multiplier: when a site changes it, earlier steps count as they were.
        accountant, delta = RdpAccountant(), self.privacy.delta
        releases = {noise: count for noise, count in self._with(further).items() if count}
        for noise, count in releases.items():
            accountant.compose(GaussianDpEvent(noise), count)
        epsilon = float(accountant.get_epsilon(delta)) if releases else 0.0
        return PrivacySpent(self.privacy.unit, epsilon, delta)

    def afford(self, steps: int) -> PrivacySpent:
        """Returns what is spent after more local steps; FederationError if over the limit."""
        # Of all that the plan asks, before any of it: a part of the steps would be of no use.
        after = self.spent(steps)
        if steps and after.epsilon > self.privacy.max_epsilon:
            would, limit = f"{after.epsilon:.3f} at delta {after.delta:g}", self.privacy.max_epsilon
            raise FederationError(
                f"epsilon would be {would}, the limit is {limit:g}: the privacy budget is spent, "
                "and this client measures no more"
            )
        return after

    def release(
        self, differences: Sequence[Any], examples: int, parts: int = 1
    ) -> npt.NDArray[np.float32]:
        """Makes P numbers, or P arrays [examples] for the unit "example", private: float32 [P].

        With P ``parts`` there is one array, and each part of the examples has a direction.
        """
        # In float64: rounding to float32 comes last, after the noise, and so tells nothing more.
        rows = np.array([np.asarray(d, dtype=np.float64) for d in differences])
        if self.privacy.unit == "client":
            rows = rows.reshape(len(rows), -1).mean(axis=1, keepdims=True)
        elif rows.shape != (len(rows), examples):
            raise FederationError(
                f"privacy of each example needs the loss of each of {examples} examples, the "
                f"objective returned losses of shape {list(rows.shape[1:])}: return arrays, or "
                'take the unit "client"'
            )
        # An example that is not finite counts as zeros: leaving it out, or giving up, would tell.
        rows = np.where(np.isfinite(rows).all(axis=0), rows, 0.0)
        clip = self.privacy.clip
        with np.errstate(over="ignore"):  # an infinite norm cuts an example to zeros
            cut = rows * (clip / np.maximum(np.linalg.norm(rows, axis=0), clip))
            # What is not finite in float32 is refused where it is used.
            scale = self.privacy.noise_multiplier * 2 * clip * parts / rows.shape[1]
            each = examples_each(rows.shape[1], parts)
            means = np.concatenate([direction_means(row, each, parts) for row in cut])
            noise = np.array([self._gaussian() for _ in means])
            told: npt.NDArray[np.float32] = (means + scale * noise).astype(np.float32)
        return told

    def note(self, steps: int, digest: bytes, answer: bytes) -> None:
        """Counts what an answer tells; it is on disk on return, so the answer may leave."""
        # In memory first: the answer stays here if the disk is full, but the count must not be low.
        self._releases = self._with(steps)
        if self.path is not None:
            record = {
                "schema": LEDGER_SCHEMA,
                "unit": self.privacy.unit,
                "releases": [[noise, count] for noise, count in self._releases.items()],
                "last": [base64.b64encode(part).decode() for part in (digest, answer)],
            }
            write_whole(self.path, json.dumps(record) + "\n")
        self.last = (digest, answer)

    def _with(self, steps: int) -> dict[float, int]:
        noise = self.privacy.noise_multiplier
        return self._releases | {noise: self._releases.get(noise, 0) + steps}

    def _gaussian(self) -> float:
        # The lowest bits of a normal sampled in doubles can give away what it was added to (Mironov
        # 2012); a sum of several hides that (Holohan and Braghin, arXiv 2107.10138).
        return math.fsum(self._random.gauss(0.0, 1.0) for _ in range(4)) / 2

    def _load(self, path: Path) -> None:
        try:
            record = json.loads(path.read_text())
            unit, schema = record["unit"], record["schema"]
            releases = {float(noise): int(count) for noise, count in record["releases"]}
            digest, answer = (base64.b64decode(part, validate=True) for part in record["last"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise FederationError(f"{path} is no privacy ledger: {error!r}") from None
        # Releases of one unit say nothing of the other: they cannot be added up.
        if (schema, unit) != (LEDGER_SCHEMA, self.privacy.unit):
            raise FederationError(
                f"{path} counts for the unit {unit!r} (schema {schema}), not for "
                f"{self.privacy.unit!r} (schema {LEDGER_SCHEMA}): keep the unit"
            )
        self._releases, self.last = releases, (digest, answer)
