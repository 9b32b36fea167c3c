"""OpenRound: what was asked of whom in the round under way, and what came."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zorba.federated.errors import MessageError
from zorba.federated.messages import Reply
from zorba.federated.privacy import PrivacySpent


class Replies(Mapping[str, Reply]):
    """Replies by client in the order of names, held as the arrays that aggregation takes.

    Attributes:
        scalars: float32 [clients, K, P].
        examples: uint32 [clients].
        fingerprints: uint64 [clients].
        losses: float32 [clients]; nan where a client keeps its loss private.
        scalar_bytes: of one client's scalars.
        privacy: what scalars have told so far, of the clients that keep count.
    """

    def __init__(
        self,
        job: int,
        number: int,
        names: Sequence[str],
        table: npt.NDArray[Any],
        privacy: Mapping[str, PrivacySpent],
    ):
        """``table`` has a row of ``OpenRound``'s for each name."""
        self.privacy = privacy
        self._job = job
        self._number = number
        self._rows = {name: row for row, name in enumerate(names)}
        self._applied = table["applied"]
        self.scalars: npt.NDArray[np.float32] = table["scalars"]
        self.examples: npt.NDArray[np.uint32] = table["examples"]
        self.fingerprints: npt.NDArray[np.uint64] = table["fingerprint"]
        self.losses: npt.NDArray[np.float32] = table["loss"]
        self.scalar_bytes = self.scalars.dtype.itemsize * int(np.prod(self.scalars.shape[1:]))

    @property
    def loss(self) -> float:
        """Mean of the losses by examples; nan where nobody tells one."""
        told = np.isfinite(self.losses)
        if not told.any():
            return math.nan
        return float(np.average(self.losses[told], weights=self.examples[told]))

    def __getitem__(self, name: str) -> Reply:
        row = self._rows[name]
        return Reply(
            job=self._job,
            round=self._number,
            client=name,
            applied_round=int(self._applied[row]),
            fingerprint=int(self.fingerprints[row]),
            scalars=self.scalars[row].copy(),
            num_examples=int(self.examples[row]),
            loss=float(self.losses[row]),
            privacy=self.privacy.get(name),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class OpenRound:
    """Collects replies, in a table with a row for each client that was asked.

    Args:
        job: uint64.
        number: of the round; a client that is after the one before it measures.
        shape: K and P, of the scalars of a client that measures.
    """

    def __init__(self, job: int, number: int, shape: tuple[int, int]) -> None:
        self._job = job
        self._number = number
        self._shape = shape
        columns = [("applied", "u4"), ("examples", "u4"), ("fingerprint", "u8"), ("loss", "f4")]
        self._rows: dict[str, int] = {}
        self._reached: dict[str, int] = {}
        self._steps: dict[str, int] = {}
        self._table = np.zeros(0, dtype=[*columns, ("scalars", "f4", shape)])
        self._came = np.zeros(0, dtype=bool)
        self._privacy: dict[str, PrivacySpent] = {}

    @property
    def asked(self) -> set[str]:
        """Clients that a plan was sent to."""
        return set(self._rows)

    def answered(self, name: str) -> bool:
        """Whether a client's scalars came."""
        row = self._rows.get(name)
        return row is not None and bool(self._came[row])

    def expect(self, reached: Mapping[str, int], *, measure: bool) -> None:
        """Expects a reply of each of these clients, besides those that are expected already.

        Args:
            reached: the round that each client is after once it applied its plan.
            measure: whether those that are then after the round before this one measure.
        """
        self._reached.update(reached)
        for name, after in reached.items():
            self._steps[name] = self._shape[0] if measure and after == self._number - 1 else 0
        if reached.keys() <= self._rows.keys():
            return
        old, table, came = self._rows, self._table, self._came
        self._rows = {name: row for row, name in enumerate(sorted(self._reached))}
        self._table = np.zeros(len(self._rows), dtype=table.dtype)
        self._came = np.zeros(len(self._rows), dtype=bool)
        moved = [self._rows[name] for name in old]
        self._table[moved], self._came[moved] = table, came

    def check(self, name: str, reply: Reply) -> None:
        """Raises MessageError for a reply that is not the one which was asked for."""
        row = self._rows.get(name)
        if row is None:
            raise MessageError(f"{name} replies to round {reply.round}; it was asked nothing now")
        if reply.round != self._number:
            raise MessageError(
                f"{name} replies to round {reply.round}; round {self._number} is under way"
            )
        if self._came[row]:
            raise MessageError(f"{name} replied to round {reply.round} already")
        reached, steps, samples = self._reached[name], self._steps[name], self._shape[1]
        if reply.scalars.shape != (steps, samples):
            raise MessageError(
                f"{name} sent scalars of shape {list(reply.scalars.shape)}, expected "
                f"{[steps, samples]}"
            )
        if not reached <= reply.applied_round < self._number:
            raise MessageError(
                f"{name} measured after round {reply.applied_round}, expected round {reached}"
            )
        if steps and reply.num_examples == 0:
            raise MessageError(f"{name} measured on no examples")

    def add(self, name: str, reply: Reply) -> None:
        """Takes a checked reply; one without scalars tells nothing that the round needs."""
        if not len(reply.scalars):
            return
        row = self._rows[name]
        self._table[row] = (
            reply.applied_round,
            reply.num_examples,
            reply.fingerprint,
            reply.loss,
            reply.scalars,
        )
        self._came[row] = True
        if reply.privacy is not None:
            self._privacy[name] = reply.privacy

    def none(self) -> Replies:
        """Returns no replies."""
        return self._at(np.zeros(0, dtype=np.int64))

    def agreeing(self) -> tuple[Replies, dict[str, str]]:
        """Splits what came by fingerprint.

        Returns:
            Replies of the majority, and why the others are not believed, by client. Without a
            majority nobody is.
        """
        rows = np.flatnonzero(self._came)
        names = list(self._rows)
        told = self._table["fingerprint"][rows]
        values, votes = np.unique(told, return_counts=True)
        if len(values) <= 1:
            return self._at(rows), {}
        if 2 * votes.max() <= len(rows):
            reason = "the clients' fingerprints differ and no majority tells which are right"
            return self.none(), {names[row]: reason for row in rows}
        winner = values[votes.argmax()]
        return self._at(rows[told == winner]), {
            names[row]: f"fingerprint {self._table['fingerprint'][row]:#018x} after round "
            f"{self._table['applied'][row]}, most clients have {winner:#018x}"
            for row in rows[told != winner]
        }

    def _at(self, rows: npt.NDArray[np.int64]) -> Replies:
        every = list(self._rows)
        names = [every[row] for row in rows.tolist()]
        told = {name: self._privacy[name] for name in names if name in self._privacy}
        return Replies(self._job, self._number, names, self._table[rows], told)
