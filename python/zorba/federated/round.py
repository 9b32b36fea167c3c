"""Round: one round from its first message to its log entry, and the report of it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from zorba.federated.aggregate import aggregate
from zorba.federated.errors import MessageError
from zorba.federated.masks import Masks
from zorba.federated.messages import Reply
from zorba.federated.settings import FederationSettings
from zorba.log import LogEntry
from zorba.optim.terms import NoiseTerms

Rows = npt.NDArray[np.int64]
"""Clients by their place in the order of names, [clients]."""

_NOT_ASKED = -1


@dataclass(frozen=True)
class Receipt:
    """Whether the server took a message, and why not.

    ``diverged``: refused because the client's weights are not those of its round.
    """

    accepted: bool
    reason: str = ""
    diverged: bool = False


@dataclass(frozen=True)
class RoundReport:
    """What a round did and cost; dictionaries are by client.

    Attributes:
        round: from 1.
        entry: of the log.
        clients: whose replies went into the log entry.
        loss: mean of the clients' losses by their examples; nan when nobody told one.
        losses: of each of these clients; nan where a client keeps its loss private.
        bytes_up: encoded answers, greetings' included.
        bytes_down: encoded messages.
        scalar_bytes_up: of these answers the scalars alone.
        scalar_bytes_down: coefficients and seeds alone of the round's log entry.
        seconds: that the round took.
        failures: why there is no answer.
        refusals: why an answer was refused.
        fingerprints_equal: whether all clients that answered hold the weights of their round.
        problem: why replies that came were not used; empty when they were, or none came.
    """

    round: int
    entry: LogEntry
    clients: tuple[str, ...]
    loss: float
    losses: dict[str, float]
    bytes_up: dict[str, int]
    bytes_down: dict[str, int]
    scalar_bytes_up: dict[str, int]
    scalar_bytes_down: int
    seconds: float
    failures: dict[str, str]
    refusals: dict[str, str]
    fingerprints_equal: bool
    problem: str


class Round:
    """What was asked of whom, what came, and what it cost.

    Replies are held in arrays with a row for each client of the job. The rows are in the order of
    names, which aggregation needs, and a client that joins in mid-round moves none of them.

    Args:
        number: of the round; a client whose replica is after the one before it measures.
        settings: of the job.
        masks: of the job's clients.
        measures: whether clients are asked for scalars; else they only catch up with the log.

    Attributes:
        to_ask: clients that a plan is due to, see ``Server.ask_again``.
        fingerprints: uint64 [clients], of the replicas that were measured.
        bytes_up, bytes_down, failures, refusals: see ``RoundReport``.
    """

    def __init__(
        self, number: int, settings: FederationSettings, masks: Masks, *, measures: bool = True
    ) -> None:
        self.number = number
        self.measures = measures
        self.to_ask: set[str] = set()
        self.bytes_up: dict[str, int] = {}
        self.bytes_down: dict[str, int] = {}
        self.failures: dict[str, str] = {}
        self.refusals: dict[str, str] = {}
        self._settings = settings
        self._masks = masks
        self._rows = masks.rows
        self._diverged = False
        self._started = time.perf_counter()  # monotonic: the clock of the day may jump
        clients = len(masks.rows)
        self._reached = np.full(clients, _NOT_ASKED, np.int64)  # round after which each answers
        self._came = np.zeros(clients, bool)
        # Memory that nobody answers into is never touched, and so never taken: zeros are free.
        shape = (clients, settings.local_steps, settings.num_perturbations)
        self._scalars = np.zeros(shape, np.float32)
        self._examples = np.zeros(clients, np.uint32)
        self._losses = np.zeros(clients, np.float32)
        self.fingerprints = np.zeros(clients, np.uint64)

    # --- Asking -----------------------------------------------------------------------------------

    def draw(self, ready: list[str]) -> list[str]:
        """Returns the clients of these, sorted, that take part beside those that do already."""
        limit = self._settings.clients_per_round
        if limit is None or not self.measures:
            return ready
        rows = np.array([self._rows[name] for name in ready], np.int64)
        asked = self._reached != _NOT_ASKED
        room = max(0, limit - int(asked.sum()) + int(asked[rows].sum()))
        if len(ready) <= room:
            return ready
        # Ranks are a function of job and round: a round that is begun again draws the same.
        ranks = self._settings.ranks_of(self.number, len(self._rows))
        drawn = np.argsort(ranks[rows], kind="stable")[:room]
        return [ready[at] for at in np.sort(drawn)]

    def expect(self, names: Sequence[str], reached: int) -> None:
        """Expects replies of clients that are after round ``reached`` once they followed the plan.

        A client that was asked before is expected to answer the newer plan alone.
        """
        self._reached[[self._rows[name] for name in names]] = reached

    def sent(self, messages: Mapping[str, bytes]) -> None:
        """Counts messages that go down."""
        for name, data in messages.items():
            self.bytes_down[name] = self.bytes_down.get(name, 0) + len(data)

    # --- Answers ----------------------------------------------------------------------------------

    def note(self, name: str, data: bytes, receipt: Receipt) -> None:
        """Counts an answer, and keeps the reason where the server refused it."""
        self.bytes_up[name] = self.bytes_up.get(name, 0) + len(data)
        if not receipt.accepted:
            self.refusals[name] = receipt.reason
            self._diverged |= receipt.diverged

    def answered(self, name: str) -> bool:
        """Returns whether a client's scalars came."""
        return bool(self._came[self._rows[name]])

    def check(self, name: str, reply: Reply) -> None:
        """Raises MessageError for a reply that is not the one which was asked for."""
        # A late answer to an older round is the common case after a timeout. Its scalars are of
        # older weights, so nothing of it is used, and the client is asked as if it had been silent.
        row = self._rows[name]
        reached = int(self._reached[row])
        if reached == _NOT_ASKED:
            raise MessageError(f"{name} replies to round {reply.round}; it was asked nothing now")
        if reply.round != self.number:
            raise MessageError(
                f"{name} replies to round {reply.round}; round {self.number} is under way"
            )
        # The first one counts: a network that repeats a message, or a sender that changes its
        # mind, must not weigh twice.
        if self._came[row]:
            raise MessageError(f"{name} replied to round {reply.round} already")
        # The shape follows from what was asked, not from the reply.
        steps, samples = self._scalars.shape[1:]
        if not (self.measures and reached == self.number - 1):
            steps = 0  # it was asked to catch up only
        if reply.scalars.shape != (steps, samples):
            raise MessageError(
                f"{name} sent scalars of shape {list(reply.scalars.shape)}, expected "
                f"{[steps, samples]}"
            )
        if not reached <= reply.applied_round < self.number:
            raise MessageError(
                f"{name} measured after round {reply.applied_round}, expected round {reached}"
            )
        if steps and reply.num_examples == 0:
            raise MessageError(f"{name} measured on no examples")

    def add(self, name: str, reply: Reply) -> None:
        """Takes a checked reply; one without scalars tells nothing that the round needs."""
        if len(reply.scalars):
            row = self._rows[name]
            self._scalars[row] = reply.scalars
            self._examples[row] = reply.num_examples
            self._losses[row] = reply.loss
            self.fingerprints[row] = reply.fingerprint
            self._came[row] = True

    # --- The end ----------------------------------------------------------------------------------

    def agreeing(self) -> tuple[Rows, dict[str, str]]:
        """Returns the rows of the majority, and why the other replies are not believed, by client.

        Without a majority nobody is believed.
        """
        # The server has no model, so the clients judge each other: all measured at the weights of
        # one round, which are the same bits wherever nothing went wrong.
        rows = np.flatnonzero(self._came)
        # Accidents are found this way. Whoever makes a fingerprint fit on purpose is not.
        values, votes = np.unique(self.fingerprints[rows], return_counts=True)
        if len(values) <= 1:
            return rows, {}
        names = list(self._rows)
        if 2 * votes.max() <= len(rows):
            reason = "the clients' fingerprints differ and no majority tells which are right"
            return rows[:0], {names[row]: reason for row in rows}
        winner = values[votes.argmax()]
        agree = self.fingerprints[rows] == winner
        return rows[agree], {
            names[row]: f"fingerprint {self.fingerprints[row]:#018x} after round "
            f"{self.number - 1}, most clients have {winner:#018x}"
            for row in rows[~agree]
        }

    def terms(self, rows: Rows) -> NoiseTerms:
        """Returns what the round adds to the weights, from the scalars of these clients."""
        s, masks = self._settings, self._masks.array
        if not len(rows):
            return NoiseTerms.none(masks.shape[1])
        scalars, examples = self._scalars[rows], self._examples[rows]
        lr = s.lr_at(self.number)
        rule = (s.weighting, s.clip, s.aggregation, s.trim)
        coefs = aggregate(scalars, masks[rows], examples, lr, *rule)
        # The order of terms, steps before perturbations, is part of the result: float32 sums
        # depend on it, and a client that measures several local steps adds them in this order.
        samples = tuple(range(s.num_perturbations))
        return NoiseTerms(
            seeds=tuple(seed for seed in s.seeds_of(self.number) for _ in samples),
            samples=samples * s.local_steps,
            coefs=torch.from_numpy(coefs.reshape(len(coefs), -1)),
        )

    def report(
        self, entry: LogEntry, rows: Rows, diverged: dict[str, str], problem: str
    ) -> RoundReport:
        """Returns what the round did and cost.

        Args:
            entry: as it is in the log.
            rows: of the clients whose replies went into it.
            diverged: why the replies of others are not believed, by client.
            problem: why replies that came were not used; empty when they were.
        """
        names = list(self._rows)
        clients = tuple(names[row] for row in rows.tolist())
        losses, examples = self._losses[rows], self._examples[rows]
        # Losses are telemetry, and nan where they are private: they decide nothing.
        told = np.isfinite(losses)
        mean = np.average(losses[told], weights=examples[told]) if told.any() else math.nan
        return RoundReport(
            round=self.number,
            entry=entry,
            clients=clients,
            loss=float(mean),
            losses=dict(zip(clients, losses.tolist(), strict=True)),
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
            scalar_bytes_up=dict.fromkeys(clients, int(self._scalars[:1].nbytes)),
            scalar_bytes_down=entry.scalar_bytes,
            seconds=time.perf_counter() - self._started,
            failures=self.failures,
            refusals=self.refusals | diverged,
            fingerprints_equal=not (self._diverged or diverged),
            problem=problem,
        )
