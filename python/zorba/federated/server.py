"""Server: turns messages into messages and a log. It knows no network and holds no model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from zorba.federated.errors import MessageError
from zorba.federated.masks import Masks
from zorba.federated.messages import Greeting, Hello, Plan, Reply, decode
from zorba.federated.privacy import PrivacySpent
from zorba.federated.round import Receipt, Round, RoundReport
from zorba.federated.settings import FederationSettings
from zorba.identity import ModelIdentity, package_version
from zorba.log import LogEntry, LogFile, LogHeader
from zorba_kernels.noise import NOISE_VERSION

MAX_PLAN_LOG_BYTES = 1 << 26
"""Log bytes in one plan. A client that lacks more gets them in several, and measures after that."""


class _DivergedClientError(MessageError):
    """A client's weights are not those of its round."""


class Server:
    """The federation's state: settings, masks, and the log, from which all else follows.

    A round is ``begin_round``, ``receive`` for each answer, ``ask_again`` for those who joined
    late, and ``end_round``. A server that is started on an existing log continues at the round
    after its last entry, with the seeds that it would have used anyway.

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
        current: the round under way.
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
        # Round after which each client is. A mark is only ever what the client itself told, never
        # what was sent to it, and none is kept on disk: a server that starts again asks anew.
        self._marks: dict[str, int] = {}
        self._masks = Masks(names, masks, identity.num_blocks)
        self.log = LogFile(
            log_path,
            LogHeader(settings.job_id, identity, settings.distribution, settings.rounding),
        )
        self._start_over()

    @property
    def round(self) -> int:
        """The round that is measured now, or next."""
        return self.log.last + 1

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all clients."""
        return self._masks.names

    @property
    def masks(self) -> dict[str, tuple[bool, ...]]:
        """Which blocks each client activates, by client."""
        return dict(zip(self.names, map(tuple, self._masks.of(self.names).tolist()), strict=True))

    @property
    def admitted(self) -> tuple[str, ...]:
        """Clients whose hello was accepted."""
        return tuple(name for name in self.names if name in self._marks)

    def set_masks(self, names: Sequence[str], masks: Any) -> None:
        """Replaces clients and masks, as they are given to a new server; gives up the round.

        Raises:
            ValueError: shapes or names do not fit; nothing was changed.
        """
        # Replies of the round under way were measured with other masks: no mean is of both.
        self._masks = Masks(names, masks, self.identity.num_blocks)
        self._start_over()

    def set_settings(self, settings: FederationSettings) -> None:
        """Replaces settings, the learning rate for example; gives up the round.

        Raises:
            ValueError: they are of another job; nothing was changed.
        """
        # These are in the log's header, and hold for all of its entries.
        for what in ("job_id", "distribution", "rounding"):
            mine, theirs = getattr(self.settings, what), getattr(settings, what)
            if mine != theirs:
                raise ValueError(f"{what} of a running job must stay {mine}, got {theirs}")
        self.settings = settings
        self._start_over()

    # --- Asking -----------------------------------------------------------------------------------

    def greetings(self, available: Iterable[str] | None = None) -> dict[str, bytes]:
        """Returns a greeting for each client that was not admitted yet (of those available)."""
        # The job alone: who is not admitted yet gets nothing of the log.
        message = Greeting(self.settings.job_id).encode()
        return {name: message for name in self._masks.present(available) if name not in self._marks}

    def begin_round(self, available: Iterable[str] | None = None) -> dict[str, bytes]:
        """Starts a round, or starts it over: replies that came to an unfinished one are dropped.

        Args:
            available: clients that can take part; None for all.

        Returns:
            A plan for each admitted client that is drawn, and a greeting for each other one.
        """
        return self._begin(available, measures=True)

    def final_plan(self, available: Iterable[str] | None = None) -> dict[str, bytes]:
        """Starts a round that measures nothing: clients end it with all of the log.

        It never ends with an entry. Arguments and messages are those of ``begin_round``.
        """
        return self._begin(available, measures=False)

    def ask_again(self) -> dict[str, bytes]:
        """Returns plans of the round under way for clients that said hello since it began.

        Those joined, or could not follow the plan that they had: one that was killed is back where
        its checkpoint is, and lacks more of the log than the server knew. Replies that came stay.
        In a round that measures nothing, clients that still lack entries are asked again, too.
        """
        ready = sorted(name for name in self.current.to_ask if not self.current.answered(name))
        self.current.to_ask = set()
        return self._ask(self.current.draw(ready))

    def _start_over(self, *, measures: bool = True) -> None:
        self.current = Round(self.round, self.settings, self._masks, measures=measures)

    def _begin(self, available: Iterable[str] | None, *, measures: bool) -> dict[str, bytes]:
        self._start_over(measures=measures)
        present = self._masks.present(available)
        ready = [name for name in present if name in self._marks]
        # Beside the plans, so that a client that joins costs the others no exchange.
        return self._ask(self.current.draw(ready)) | self.greetings(present)

    def _ask(self, names: Sequence[str]) -> dict[str, bytes]:
        """Returns a plan for each of these clients, in the order given, and expects its reply."""
        by_mark: dict[int, list[str]] = {}
        for name in names:
            by_mark.setdefault(self._marks[name], []).append(name)
        messages: dict[str, bytes] = dict.fromkeys(names, b"")
        # Clients after the same round get the same plan, but for their masks: the log is read and
        # the plan made once for each such round, not once a client.
        for mark, group in by_mark.items():
            plan = self._plan(mark)
            plans = plan.encode_each(self._masks.of(group))
            messages.update(zip(group, plans, strict=True))
            self.current.expect(group, plan.reached)
        return messages

    def _plan(self, mark: int) -> Plan:
        """Plan of clients after round ``mark``, with all blocks active."""
        s = self.settings
        count, frames = self.log.frames(mark + 1, MAX_PLAN_LOG_BYTES)
        # Who does not get all of the log would measure at old weights: it only catches up.
        measures = self.current.measures and mark + count == self.log.last
        return Plan(
            job=s.job_id,
            round=self.round,
            base_round=mark,
            seeds=s.seeds_of(self.round) if measures else (),
            num_perturbations=s.num_perturbations,
            eps=s.eps,
            estimator=s.estimator,
            distribution=s.distribution,
            rounding=s.rounding,
            mask=(True,) * self.identity.num_blocks,
            mask_version=self._masks.version,
            local_lr=s.lr_at(self.round),
            clip=s.clip or math.inf,
            num_entries=count,
            frames=frames,
        )

    # --- Answers ----------------------------------------------------------------------------------

    def receive(self, name: str, data: bytes) -> Receipt:
        """Takes a message of a client, whose name the transport knows.

        One that is refused changes nothing.
        """
        try:
            message = decode(data)
            if name not in self._masks.rows:
                raise MessageError(f"{name!r} is no client of this job")
            if isinstance(message, Greeting | Plan):
                raise MessageError(f"a client sends no {type(message).__name__.lower()}")
            # The transport's name is the one that was authenticated; the message's is a claim.
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
        # Refusals alone: a fault of the server itself must not look like one of the client.
        except MessageError as error:
            return Receipt(False, str(error), isinstance(error, _DivergedClientError))
        return Receipt(True)

    def _take_hello(self, name: str, hello: Hello) -> None:
        for what, theirs, mine in (
            ("noise version", hello.noise_version, NOISE_VERSION),
            ("package version", hello.package, package_version()),
            ("distribution", hello.distribution, self.settings.distribution),
            ("rounding", hello.rounding, self.settings.rounding),
        ):
            if theirs != mine:
                raise MessageError(f"{name} has {what} {theirs}, this job is of {mine}")
        # Two models may share every shape, and every trainable bit: the identity counts frozen
        # weights as well.
        wrong = self.identity.difference(hello.identity)
        if wrong:
            raise MessageError(f"{name} has {wrong}")
        self._check_position(name, hello.applied_round, hello.fingerprint)
        self._note_position(name, hello)

    def _take_reply(self, name: str, reply: Reply) -> None:
        # All checks come before the first change: a refused reply leaves no trace. The account of
        # privacy is the client's own word, kept to be shown; nothing depends on it.
        self.current.check(name, reply)
        self._check_position(name, reply.applied_round, reply.fingerprint)
        self.current.add(name, reply)
        self._note_position(name, reply)
        self.privacy.pop(name, None)
        if reply.privacy is not None:
            self.privacy[name] = reply.privacy

    def _check_position(self, name: str, applied: int, fingerprint: int) -> None:
        """Compares a client's weights with those that the log knows of that round."""
        if applied > self.log.last:
            raise MessageError(
                f"{name} has applied round {applied}, but the log ends at {self.log.last}: "
                "it followed another log of this job"
            )
        # Entries tell the fingerprint before them, so the weights after the last one are known only
        # when the round is over. Until then it is None, and the majority decides.
        known = self.log.fingerprint_after(applied)
        if known is not None and fingerprint != known:
            raise _DivergedClientError(
                f"{name} has diverged: after round {applied} its fingerprint is "
                f"{fingerprint:#018x}, expected {known:#018x}; load a checkpoint or start it again "
                "from the original model"
            )

    def _note_position(self, name: str, message: Hello | Reply) -> None:
        self._marks[name] = message.applied_round
        self.fingerprints[name] = (message.applied_round, message.fingerprint)
        joins = self.current.measures and isinstance(message, Hello)
        if joins or (not self.current.measures and self.lacking(name)):
            self.current.to_ask.add(name)

    def lacking(self, name: str) -> int:
        """Returns how many log entries the client is known to lack; all of them if unknown."""
        return self.log.last - self._marks.get(name, 0)

    # --- The end of a round -----------------------------------------------------------------------

    def end_round(self) -> RoundReport:
        """Aggregates the replies that came and writes the log entry; it is on disk on return.

        The entry has no terms, and the round changes nothing, when no reply came, when the
        coefficients overflow, and when the clients disagree about their weights and no majority
        tells who is right.

        Raises:
            LogError: the entry could not be written; the round can be ended again.
        """
        done, problem = self.current, ""
        rows, diverged = done.agreeing()
        terms = done.terms(rows)
        # One infinite coefficient would end every replica; an empty round costs only itself.
        if not torch.isfinite(terms.coefs).all():
            problem = f"coefficients of round {self.round} must be finite: set clip, or lower lr"
            rows = rows[:0]
            terms = done.terms(rows)
        entry = LogEntry(
            number=self.round,
            terms=terms,
            rounding_seed=self.settings.rounding_seed_of(self.round),
            base=int(done.fingerprints[rows[0]]) if len(rows) else None,
            mask_version=self._masks.version,
        )
        # On disk before anybody hears of it: a server that is killed here goes on with this entry,
        # one that is killed a moment before measures the round again. No client has seen either.
        self.log.append(entry)
        for name in diverged:
            self._marks.pop(name, None)  # greeted next, and judged by what it says then
        self._start_over()
        return done.report(entry, rows, diverged, problem)

    def close(self) -> None:
        """Closes the log."""
        self.log.close()
