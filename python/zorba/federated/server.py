"""Server: turns messages into messages and a log. It knows no network and holds no model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from zorba.federated.errors import MessageError, ServerLogError
from zorba.federated.messages import Greeting, Hello, Plan, Reply, decode
from zorba.federated.privacy import PrivacySpent
from zorba.federated.round import Receipt, Round, RoundReport
from zorba.federated.settings import FederationSettings, Masks
from zorba.identity import ModelIdentity, package_version
from zorba.log import LogError, LogFile, LogHeader
from zorba_kernels.noise import ROUNDING_DOMAIN, VERSIONS

# A client that lacks more of the log gets it in several plans, and measures after that.
MAX_PLAN_LOG_BYTES = 1 << 26


class _DivergedClientError(MessageError):
    """A client's weights are not those of its round."""


class Server:
    """The federation's state: settings, masks, and the log, from which all else follows.

    A round is ``begin_round``, ``receive`` for each answer, ``ask_again`` for those who joined
    late, and ``end_round``. On an existing log it continues at the round after the last entry, with
    the seeds that it would have used anyway; clients, masks and most settings may be others.

    Args:
        settings: of the job.
        identity: of the model at theta_0, ``Replica.identity`` of any replica of it.
        names: of the clients, 1 to 64 letters, digits and ``._+-`` each.
        masks: which client activates which block, bool [clients, blocks].
        log_path: of the log; made when it does not exist.

    Raises:
        ValueError: names or masks do not fit.
        ServerLogError: the log is damaged, of another job or model, or open in another server.
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
        # (applied round, fingerprint) that each admitted client last told. Never what was sent to
        # it, and not kept on disk: a server that starts again asks anew.
        self.fingerprints: dict[str, tuple[int, int]] = {}
        self.privacy: dict[str, PrivacySpent] = {}  # last told by each client that adds noise
        self._masks = Masks(names, masks, identity.num_blocks)
        if len(names) * settings.num_perturbations > ROUNDING_DOMAIN:
            raise ValueError(
                f"{len(names)} clients times num_perturbations {settings.num_perturbations} are "
                "more than the 2**31 samples of a seed"
            )
        law = (settings.distribution, settings.rounding)
        with _log_errors():
            self.log = LogFile(log_path, LogHeader(settings.job_id, identity, *law))
        self.current = Round(self.round, settings, self._masks)  # the round under way

    @property
    def round(self) -> int:
        """The round that is measured now, or next."""
        return self.log.last + 1

    @property
    def masks(self) -> dict[str, tuple[bool, ...]]:
        """Which blocks each client activates, by client."""
        return dict(zip(self._masks.rows, map(tuple, self._masks.array.tolist()), strict=True))

    def begin_round(
        self, available: Iterable[str] | None = None, *, measures: bool = True
    ) -> dict[str, bytes]:
        """Starts a round, or starts it over: replies that came to an unfinished one are dropped.

        Returns a plan for each admitted client that is drawn from those available (None for all),
        and a greeting for each other one. Where nothing is measured, clients only get all of the
        log, as after the last round, and the round must not be ended with an entry.
        """
        self.current = Round(self.round, self.settings, self._masks, measures=measures)
        wanted = self._masks.rows.keys() if available is None else set(available)
        present = [name for name in self._masks.rows if name in wanted]
        ready = [name for name in present if name in self.fingerprints]
        # Who is not admitted yet gets nothing of the log. Greetings go beside the plans, so that a
        # client that joins costs the others no exchange.
        greeting = Greeting(self.settings.job_id).encode()
        plans = self._ask(self.current.draw(ready))
        return plans | {name: greeting for name in present if name not in self.fingerprints}

    def ask_again(self) -> dict[str, bytes]:
        """Returns plans of the round under way for clients that said hello since it began.

        They joined, or could not follow their plan: one that was killed is back at its checkpoint.
        In a round that measures nothing, clients that still lack entries are asked again, too.
        """
        ready = sorted(self.current.to_ask - self.current.replies.keys())
        self.current.to_ask = set()
        return self._ask(self.current.draw(ready))

    def _ask(self, names: Sequence[str]) -> dict[str, bytes]:
        """A plan for each of these clients, in the order given; expects their replies."""
        messages: dict[str, bytes] = dict.fromkeys(names, b"")
        by_mark: dict[int, list[str]] = {}
        for name in names:
            by_mark.setdefault(self.fingerprints[name][0], []).append(name)
        # Clients after the same round get the same plan but for their masks: the log is read once.
        for mark, group in by_mark.items():
            plan = self._plan(mark)
            firsts = self.current.first_samples(group) if plan.seeds else [0] * len(group)
            plans = plan.encode_each(self._masks.of(group), firsts)
            messages.update(zip(group, plans, strict=True))
            self.current.asked |= dict.fromkeys(group, plan.reached)
        return messages

    def _plan(self, mark: int) -> Plan:  # of clients after round mark, with all blocks active
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
            directions=self.current.directions,
            num_entries=count,
            frames=frames,
        )

    def receive(self, name: str, data: bytes) -> Receipt:
        """Takes a message of a client that the transport knows; a refused one changes nothing."""
        try:
            self._take(name, decode(data))
        # Refusals alone: a fault of the server itself must not look like one of the client.
        except MessageError as error:
            return Receipt(False, str(error), isinstance(error, _DivergedClientError))
        return Receipt(True)

    def _take(self, name: str, message: Greeting | Hello | Plan | Reply) -> None:
        # All checks come before the first change: a refused message leaves no trace.
        if name not in self._masks.rows:
            raise MessageError(f"{name!r} is no client of this job")
        if isinstance(message, Greeting | Plan):
            raise MessageError(f"a client sends no {type(message).__name__.lower()}")
        # The transport's name is the one that was authenticated; the message's is a claim.
        if message.client != name:
            raise MessageError(f"{name} sent a message in the name of {message.client}")
        job = self.settings.job_id
        if message.job != job:
            raise MessageError(f"{name} answers for job {message.job:#018x}, this is {job:#018x}")
        if isinstance(message, Hello):
            self._check_hello(name, message)
        else:
            self.current.check(name, message)
        self._check_position(name, message.applied_round, message.fingerprint)
        self.fingerprints[name] = (message.applied_round, message.fingerprint)
        if isinstance(message, Reply):
            if len(message.scalars):  # one without tells nothing that the round needs
                self.current.replies[name] = message
            # The client's own word, kept to be shown; nothing depends on it.
            self.privacy.pop(name, None)
            if message.privacy is not None:
                self.privacy[name] = message.privacy
        # Who said hello joins the round; one that measures nothing is for all who lack entries.
        lacks = message.applied_round < self.log.last
        if isinstance(message, Hello) if self.current.measures else lacks:
            self.current.to_ask.add(name)

    def _check_hello(self, name: str, hello: Hello) -> None:
        for what, theirs, mine in (
            ("noise version", hello.noise_version, VERSIONS[self.settings.distribution]),
            ("package version", hello.package, package_version()),
            ("distribution", hello.distribution, self.settings.distribution),
            ("rounding", hello.rounding, self.settings.rounding),
        ):
            if theirs != mine:
                raise MessageError(f"{name} has {what} {theirs}, this job is of {mine}")
        # Frozen weights count as well: two models may share every shape, and every trainable bit.
        if wrong := self.identity.difference(hello.identity):
            raise MessageError(f"{name} has {wrong}")

    def _check_position(self, name: str, applied: int, fingerprint: int) -> None:
        if applied > self.log.last:
            raise MessageError(
                f"{name} has applied round {applied}, but the log ends at {self.log.last}: it "
                "followed another log of this job"
            )
        # Entries tell the fingerprint before them: that after the last one is None until the round
        # is over, and the majority decides.
        known = self.log.fingerprint_after(applied)
        if known is not None and fingerprint != known:
            raise _DivergedClientError(
                f"{name} has diverged: after round {applied} its fingerprint is "
                f"{fingerprint:#018x}, expected {known:#018x}; load a checkpoint or start it again "
                "from the original model"
            )

    def end_round(self) -> RoundReport:
        """Aggregates the replies that came and writes the log entry; it is on disk on return.

        The entry has no terms, and the round changes nothing, when no reply came, when the
        coefficients overflow, and when the clients disagree about their weights and no majority
        tells who is right. ServerLogError: it could not be written; the round can be ended again.
        """
        done = self.current
        entry = done.end()
        # On disk before anybody hears of it: a server that is killed after this goes on with the
        # entry, one that is killed before measures the round again.
        with _log_errors():
            self.log.append(entry)
        for name in done.disbelieved:
            self.fingerprints.pop(name, None)  # greeted next, and judged by what it says then
        self.current = Round(self.round, self.settings, self._masks)
        return done.report(entry)

    def close(self) -> None:
        """Closes the log."""
        self.log.close()


@contextlib.contextmanager
def _log_errors() -> Iterator[None]:
    """Lets who catches FederationError catch what the log refuses, too."""
    try:
        yield
    except LogError as error:
        raise ServerLogError(str(error)) from error
