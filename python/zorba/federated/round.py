"""Round: one round from its first message to its log entry, and the report of it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from zorba.federated.aggregate import aggregate, aggregate_own
from zorba.federated.errors import MessageError
from zorba.federated.messages import Reply
from zorba.federated.settings import FederationSettings, Masks
from zorba.log import LogEntry
from zorba.optim.terms import NoiseTerms


@dataclass(frozen=True)
class Receipt:
    """Whether the server took a message, and why not."""

    accepted: bool
    reason: str = ""
    diverged: bool = False  # refused because the client's weights are not those of its round


@dataclass(frozen=True)
class RoundReport:
    """What a round did and cost; dictionaries are by client."""

    round: int  # from 1
    entry: LogEntry
    clients: tuple[str, ...]  # whose replies went into the entry
    loss: float  # mean of their losses by their examples; nan when nobody told one
    losses: dict[str, float]  # nan where a client keeps its loss private
    bytes_up: dict[str, int]  # encoded answers, greetings' included
    bytes_down: dict[str, int]  # encoded messages
    scalar_bytes_up: dict[str, int]  # of these answers the scalars alone
    scalar_bytes_down: int  # coefficients and seeds alone of the log entry
    seconds: float
    failures: dict[str, str]  # why there is no answer
    refusals: dict[str, str]  # why an answer was refused
    fingerprints_equal: bool  # whether all who answered hold the weights of their round
    problem: str  # why replies that came were not used; empty when they were, or none came


class Round:
    """What was asked of whom, what came, and what it cost."""

    def __init__(
        self, number: int, settings: FederationSettings, masks: Masks, *, measures: bool = True
    ) -> None:
        self.number = number
        self.directions = settings.directions_of(len(masks.rows))
        self.measures = measures  # whether clients are asked for scalars; else they only catch up
        self.to_ask: set[str] = set()  # clients that a plan is due to, see ``Server.ask_again``
        self.asked: dict[str, int] = {}  # round after which each client is to answer
        self.replies: dict[str, Reply] = {}  # those that have scalars
        self.bytes_up: Counter[str] = Counter()
        self.bytes_down: Counter[str] = Counter()
        self.failures: dict[str, str] = {}
        self.refusals: dict[str, str] = {}
        self.disbelieved: dict[str, str] = {}  # why replies that came are not used
        self._settings = settings
        self._masks = masks
        self._diverged = False
        self._started = time.perf_counter()  # monotonic: the clock of the day may jump

    def draw(self, ready: list[str]) -> list[str]:
        """Returns the clients of these, sorted, that take part beside those that do already."""
        limit, rows = self._settings.clients_per_round, self._masks.rows
        if limit is None or not self.measures:
            return ready
        room = max(0, limit - len(self.asked.keys() - set(ready)))
        # Ranks are a function of job and round: a round that is begun again draws the same.
        ranks = self._settings.ranks_of(self.number, len(rows)).tolist()
        return sorted(sorted(ready, key=lambda name: ranks[rows[name]])[:room])

    def first_samples(self, names: Sequence[str]) -> list[int]:
        """Returns where the samples of these clients begin: each has P that are its own."""
        # By the client's place among all: a round that is begun again asks for the same.
        each = self._settings.num_perturbations if self.directions == "own" else 0
        return [self._masks.rows[name] * each for name in names]

    def note(self, name: str, data: bytes, receipt: Receipt) -> None:
        """Counts an answer, and keeps the reason where the server refused it."""
        self.bytes_up[name] += len(data)
        if not receipt.accepted:
            self.refusals[name] = receipt.reason
            self._diverged |= receipt.diverged

    def check(self, name: str, reply: Reply) -> None:
        """Raises MessageError for a reply that is not the one which was asked for."""
        now, applied, shape = self.number, reply.applied_round, list(reply.scalars.shape)
        asked = self.asked.get(name, now)
        # The shape follows from what was asked, not from the reply: who only catches up has none.
        steps = self._settings.local_steps if self.measures and asked == now - 1 else 0
        wanted = [steps, self._settings.num_perturbations]
        for fits, wrong in (
            (name in self.asked, f"replies to round {reply.round}; it was asked nothing now"),
            # Common after a timeout. Its scalars are of older weights: nothing of it is used.
            (reply.round == now, f"replies to round {reply.round}; round {now} is under way"),
            # The first counts: a network that repeats messages must not weigh a client twice.
            (name not in self.replies, f"replied to round {reply.round} already"),
            (shape == wanted, f"sent scalars of shape {shape}, expected {wanted}"),
            (asked <= applied < now, f"measured after round {applied}, expected round {asked}"),
            (steps == 0 or reply.num_examples > 0, "measured on no examples"),
        ):
            if not fits:
                raise MessageError(f"{name} {wrong}")

    def end(self) -> LogEntry:
        """Returns the log entry that the replies make; see ``Server.end_round``."""
        now, self._problem = self.number, ""
        self._used, self.disbelieved = self._judge()
        terms = self._terms()
        # One infinite coefficient would end every replica; an empty round costs only itself.
        if not torch.isfinite(terms.coefs).all():
            self._problem = f"coefficients of round {now} must be finite: set clip, or lower lr"
            self._used = []
            terms = self._terms()
        base = self._used[0].fingerprint if self._used else None
        seed, version = self._settings.rounding_seed_of(now), self._masks.version
        return LogEntry(now, terms, seed, base=base, mask_version=version)

    def _judge(self) -> tuple[list[Reply], dict[str, str]]:
        """The majority's replies by name, and why others are not believed; without one, all."""
        # The server has no model, so the clients judge each other: all measured at the same bits if
        # nothing went wrong. This finds accidents, not who makes a fingerprint fit on purpose.
        replies = [reply for _, reply in sorted(self.replies.items())]
        votes = Counter(reply.fingerprint for reply in replies).most_common()
        if len(votes) <= 1:
            return replies, {}
        most, count = votes[0]
        if 2 * count <= len(replies):
            reason = "the clients' fingerprints differ and no majority tells which are right"
            return [], {reply.client: reason for reply in replies}
        return [reply for reply in replies if reply.fingerprint == most], {
            reply.client: f"fingerprint {reply.fingerprint:#018x} after round {self.number - 1}, "
            f"most clients have {most:#018x}"
            for reply in replies
            if reply.fingerprint != most
        }

    def _terms(self) -> NoiseTerms:
        """What the round adds to the weights, from the scalars of the replies that are used."""
        s, replies = self._settings, self._used
        if not replies:
            return NoiseTerms.none(self._masks.array.shape[1])
        names = [reply.client for reply in replies]
        told = (
            np.stack([reply.scalars for reply in replies]),
            self._masks.of(names),
            np.array([reply.num_examples for reply in replies]),
            s.lr_at(self.number),
            s.weighting,
            s.clip,
        )
        if self.directions == "own":
            coefs, firsts = aggregate_own(*told, s.part_bound), self.first_samples(names)
        else:
            coefs, firsts = aggregate(*told, s.aggregation, s.trim), [0]
        # Steps before perturbations, as clients add local steps: float32 sums depend on the order.
        samples = tuple(first + p for first in firsts for p in range(s.num_perturbations))
        seeds = tuple(seed for seed in s.seeds_of(self.number) for _ in samples)
        terms = torch.from_numpy(coefs.reshape(len(coefs), -1))
        return NoiseTerms(seeds, samples * s.local_steps, terms)

    def report(self, entry: LogEntry) -> RoundReport:
        """Returns what the round, which ended with this entry, did and cost."""
        losses = {reply.client: reply.loss for reply in self._used}
        # Losses are telemetry, and nan where they are private: they decide nothing.
        told = [(r.loss, r.num_examples) for r in self._used if math.isfinite(r.loss)]
        return RoundReport(
            round=self.number,
            entry=entry,
            clients=tuple(losses),
            loss=sum(x * n for x, n in told) / sum(n for _, n in told) if told else math.nan,
            losses=losses,
            bytes_up=dict(self.bytes_up),
            bytes_down=dict(self.bytes_down),
            scalar_bytes_up={reply.client: reply.scalars.nbytes for reply in self._used},
            scalar_bytes_down=entry.scalar_bytes,
            seconds=time.perf_counter() - self._started,
            failures=self.failures,
            refusals=self.refusals | self.disbelieved,
            fingerprints_equal=not (self._diverged or self.disbelieved),
            problem=self._problem,
        )
