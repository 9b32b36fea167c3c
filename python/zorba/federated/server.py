"""Server: turns messages into messages and a log. It knows no network and holds no model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zorba.federated.aggregate import aggregate
from zorba.federated.entry import UNCOVERED, LogEntry
from zorba.federated.errors import MessageError
from zorba.federated.identity import ModelIdentity
from zorba.federated.log import LogHeader, RoundLog
from zorba.federated.masks import Masks
from zorba.federated.messages import Greeting, Hello, Plan, Reply, decode
from zorba.federated.open_round import OpenRound, Replies
from zorba.federated.privacy import PrivacySpent
from zorba.federated.settings import FederationSettings
from zorba.identity import package_version
from zorba_kernels.noise import NOISE_VERSION

MAX_PLAN_LOG_BYTES = 1 << 26
"""Log bytes in one plan. A client that lacks more gets them in several, and measures after that."""


class _DivergedClientError(MessageError):
    """A client's weights are not those of its round."""


@dataclass(frozen=True)
class Receipt:
    """What became of a message.

    Attributes:
        accepted: whether it changed anything.
        reason: why not; empty when it was accepted.
        diverged: refused because the client's weights are not those of its round.
    """

    accepted: bool
    reason: str = ""
    diverged: bool = False


@dataclass
class RoundOutcome:
    """What a round came to.

    Attributes:
        entry: as it is in the log.
        replies: that went into it, by client.
        loss: mean of the clients' losses by their examples; nan when nobody told one.
        diverged: clients whose weights differ from the others', and why that is believed.
        problem: why replies that came were not used; empty when they were, or none came.
    """

    entry: LogEntry
    replies: Replies
    loss: float
    diverged: dict[str, str] = field(default_factory=dict)
    problem: str = ""


class Server:
    """The federation's state: settings, masks, and the log, from which all else follows.

    A server that is started on an existing log continues at the round after its last entry, with
    the seeds that it would have used anyway.

    Args:
        settings: of the job.
        identity: of the model at theta_0, ``Replica.identity`` of any replica of it.
        names: of the clients, 1 to 64 letters, digits and ``._+-`` each.
        masks: which client activates which block, bool [clients, blocks].
        log_path: of the log; made when it does not exist.

    Attributes:
        settings: of the job.
        identity: of the model.
        log: the log.
        fingerprints: what each client last told of its replica: (applied round, fingerprint).
        privacy: what each client last told of its privacy; none of those that add no noise.
    """

    def __init__(
        self,
        settings: FederationSettings,
        identity: ModelIdentity,
        names: Sequence[str],
        masks: Any,
        log_path: str | Path,
    ) -> None:
        self.settings = settings
        self.identity = identity
        self.fingerprints: dict[str, tuple[int, int]] = {}
        self.privacy: dict[str, PrivacySpent] = {}
        # A mark is what the client itself told; a server that was started again asks anew.
        self._marks: dict[str, int] = {}
        self._greeted_back: set[str] = set()  # hellos of the round under way, not yet asked
        self._masks = Masks(names, masks, identity.num_blocks)
        self.log = RoundLog(
            log_path,
            LogHeader(settings.job_id, identity, settings.distribution, settings.rounding),
        )
        self._give_up_round()

    @property
    def round(self) -> int:
        """The round that is measured now, or next."""
        return self.log.last_round + 1

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all clients."""
        return self._masks.names

    @property
    def masks(self) -> dict[str, tuple[bool, ...]]:
        """Which blocks each client activates, by client."""
        rows = self._masks.of(self.names).tolist()
        return {name: tuple(row) for name, row in zip(self.names, rows, strict=True)}

    @property
    def admitted(self) -> tuple[str, ...]:
        """Clients whose hello was accepted."""
        return tuple(name for name in self.names if name in self._marks)

    def set_masks(self, names: Sequence[str], masks: Any) -> None:
        """Replaces clients and masks; the round that is under way is given up.

        Args:
            names: of the clients.
            masks: bool [clients, blocks]; each client activates at least one block.

        Raises:
            ValueError: shapes or names do not fit; nothing was changed.
        """
        self._masks = Masks(names, masks, self.identity.num_blocks)
        self._give_up_round()

    def set_settings(self, settings: FederationSettings) -> None:
        """Replaces settings, the learning rate for example; the round under way is given up.

        Raises:
            ValueError: they are of another job; nothing was changed.
        """
        for what in ("job_id", "distribution", "rounding"):
            mine, theirs = getattr(self.settings, what), getattr(settings, what)
            if mine != theirs:
                raise ValueError(f"{what} of a running job must stay {mine}, got {theirs}")
        self.settings = settings
        self._give_up_round()

    def greetings(self, available: Iterable[str] | None = None) -> dict[str, bytes]:
        """Returns a greeting for each client that was not admitted yet (of those available)."""
        message = Greeting(self.settings.job_id).encode()
        return {name: message for name in self._masks.present(available) if name not in self._marks}

    def begin_round(self, available: Iterable[str] | None = None) -> dict[str, bytes]:
        """Starts a round, or starts it over: replies that came to an unfinished one are dropped.

        Args:
            available: clients that can take part; None for all.

        Returns:
            A plan for each client drawn, and a greeting for each available one not admitted.
        """
        ready = [name for name in self._masks.present(available) if name in self._marks]
        self._give_up_round()
        return self._ask(self._draw(ready, taken=0), measure=True) | self.greetings(available)

    def ask_again(self) -> dict[str, bytes]:
        """Returns plans of the round under way for clients that said hello since it began.

        Those joined, or could not follow the plan that they had: one that was killed is back where
        its checkpoint is, and lacks more of the log than the server knew. Replies that came stay.
        """
        ready = sorted(name for name in self._greeted_back if not self._open.answered(name))
        self._greeted_back = set()
        taken = len(self._open.asked - set(ready))
        return self._ask(self._draw(ready, taken), measure=True)

    def receive(self, name: str, data: bytes) -> Receipt:
        """Takes a client's answer.

        Args:
            name: of the client, as the transport knows it.
            data: the message.

        Returns:
            Whether it was accepted. A message that is not changes nothing.
        """
        try:
            message = decode(data)
            if name not in self._masks.rows:
                raise MessageError(f"{name!r} is no client of this job")
            if isinstance(message, Greeting | Plan):
                raise MessageError(f"a client sends no {type(message).__name__.lower()}")
            if message.client != name:
                raise MessageError(f"{name} sent a message in the name of {message.client}")
            if message.job != self.settings.job_id:
                raise MessageError(
                    f"{name} answers for job {message.job:#018x}, this is "
                    f"{self.settings.job_id:#018x}"
                )
            if isinstance(message, Hello):
                self._take_hello(name, message)
            else:
                self._take_reply(name, message)
        except MessageError as error:
            return Receipt(False, str(error), isinstance(error, _DivergedClientError))
        return Receipt(True)

    def end_round(self) -> RoundOutcome:
        """Aggregates the replies that came and writes the log entry; it is on disk on return.

        The entry has no columns, and the round changes nothing, when no reply came, when the
        coefficients overflow, and when the clients disagree about their weights and no majority
        tells who is right.

        Raises:
            LogError: the entry could not be written; the round can be ended again.
        """
        replies, diverged = self._open.agreeing()
        problem = ""
        try:
            entry = self._entry(replies)
        except MessageError as error:
            problem = f"{error}: set clip, or lower lr"
            replies = self._open.none()
            entry = self._entry(replies)
        self.log.append(entry)
        for name in diverged:
            self._marks.pop(name, None)  # greeted next, and judged by what it says then
        self._give_up_round()
        return RoundOutcome(entry, replies, replies.loss, diverged, problem)

    def final_plan(self, available: Iterable[str] | None = None) -> dict[str, bytes]:
        """Returns plans that measure nothing for the admitted clients: they end with all the log.

        Args:
            available: clients that can be reached; None for all.
        """
        ready = [name for name in self._masks.present(available) if name in self._marks]
        self._give_up_round()
        return self._ask(ready, measure=False)

    def lacking(self, name: str) -> int:
        """Returns how many log entries the client is known to lack; all of them if unknown."""
        return self.log.last_round - self._marks.get(name, 0)

    def close(self) -> None:
        """Closes the log."""
        self.log.close()

    def _give_up_round(self) -> None:
        shape = (self.settings.local_steps, self.settings.num_perturbations)
        self._open = OpenRound(self.settings.job_id, self.round, shape)
        self._greeted_back = set()

    def _draw(self, ready: list[str], taken: int) -> list[str]:
        """Returns the clients that take part, where ``taken`` others do already; sorted."""
        limit = self.settings.clients_per_round
        if limit is None or taken + len(ready) <= limit:
            return ready
        ranks = self.settings.ranks_of(self.round, len(self._masks.rows))
        places = np.array([self._masks.rows[name] for name in ready])
        drawn = np.argsort(ranks[places], kind="stable")[: max(0, limit - taken)]
        return [ready[at] for at in np.sort(drawn)]

    def _ask(self, names: Sequence[str], *, measure: bool) -> dict[str, bytes]:
        """Returns a plan for each of these clients, in the order given, and expects its reply."""
        s = self.settings
        by_mark: dict[int, list[str]] = {}
        for name in names:
            by_mark.setdefault(self._marks[name], []).append(name)
        messages: dict[str, bytes] = dict.fromkeys(names, b"")
        reached: dict[str, int] = dict.fromkeys(names, 0)
        for mark, group in by_mark.items():  # those after the same round get the same, but masks
            count, records = self.log.records(mark + 1, MAX_PLAN_LOG_BYTES)
            steps = s.local_steps if measure and mark + count == self.log.last_round else 0
            plan = self._plan(mark, steps)
            plans = plan.encode_each(self._masks.of(group), count, records)
            messages.update(zip(group, plans, strict=True))
            reached.update(dict.fromkeys(group, mark + count))
        self._open.expect(reached, measure=measure)
        return messages

    def _plan(self, mark: int, steps: int) -> Plan:
        """Plan of clients after round ``mark``, without the entries and with all blocks active."""
        s = self.settings
        return Plan(
            job=s.job_id,
            round=self.round,
            base_round=mark,
            entries=(),
            seeds=tuple(s.seed_of(self.round, step) for step in range(steps)),
            num_perturbations=s.num_perturbations,
            eps=s.eps,
            estimator=s.estimator,
            distribution=s.distribution,
            rounding=s.rounding,
            mask=(True,) * self.identity.num_blocks,
            mask_version=self._masks.version,
            local_lr=s.lr_at(self.round),
            clip=s.clip or math.inf,
        )

    def _take_hello(self, name: str, hello: Hello) -> None:
        for what, theirs, mine in (
            ("noise version", hello.noise_version, NOISE_VERSION),
            ("package version", hello.package, package_version()),
            ("distribution", hello.distribution, self.settings.distribution),
            ("rounding", hello.rounding, self.settings.rounding),
        ):
            if theirs != mine:
                raise MessageError(f"{name} has {what} {theirs}, this job is of {mine}")
        wrong = self.identity.difference(hello.identity)
        if wrong:
            raise MessageError(f"{name} has {wrong}")
        self._check_position(name, hello.applied_round, hello.fingerprint)
        self._marks[name] = hello.applied_round
        self._greeted_back.add(name)
        self.fingerprints[name] = (hello.applied_round, hello.fingerprint)

    def _take_reply(self, name: str, reply: Reply) -> None:
        self._open.check(name, reply)
        self._check_position(name, reply.applied_round, reply.fingerprint)
        self._marks[name] = reply.applied_round
        self.fingerprints[name] = (reply.applied_round, reply.fingerprint)
        self.privacy.pop(name, None)
        if reply.privacy is not None:
            self.privacy[name] = reply.privacy
        self._open.add(name, reply)

    def _check_position(self, name: str, applied: int, fingerprint: int) -> None:
        """Compares a client's weights with what the log knows of that round's."""
        if applied > self.log.last_round:
            raise MessageError(
                f"{name} has applied round {applied}, but the log ends at {self.log.last_round}: "
                "it followed another log of this job"
            )
        known = self.log.fingerprint_after(applied)  # None: the majority will tell
        if known is not None and fingerprint != known:
            raise _DivergedClientError(
                f"{name} has diverged: after round {applied} its fingerprint is "
                f"{fingerprint:#018x}, expected {known:#018x}; load a checkpoint or start it again "
                "from the original model"
            )

    def _entry(self, replies: Replies) -> LogEntry:
        s = self.settings
        coefs = np.zeros((s.local_steps, s.num_perturbations, 0), dtype=np.float32)
        columns = np.full(self.identity.num_blocks, UNCOVERED, dtype=np.int32)
        if replies:
            coefs, columns = aggregate(
                replies.scalars,
                self._masks.of(replies),
                replies.examples,
                s.lr_at(self.round),
                s.weighting,
                s.clip,
                s.aggregation,
                s.trim,
            )
        return LogEntry(
            round=self.round,
            seeds=tuple(s.seed_of(self.round, step) for step in range(s.local_steps)),
            coefs=coefs,
            columns=columns,
            rounding_seed=s.rounding_seed_of(self.round),
            mask_version=self._masks.version,
            base_fingerprint=int(replies.fingerprints[0]) if replies else None,
            distribution=s.distribution,
            rounding=s.rounding,
        )
