"""The loop: server and transport, round after round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from zorba.federated.entry import LogEntry
from zorba.federated.privacy import PrivacySpent
from zorba.federated.server import Server
from zorba.federated.transport import Transport

_EXCHANGES = 3
"""Most exchanges of a round: a greeting, a plan that a client cannot follow, one that it can."""


@dataclass(frozen=True)
class RoundReport:
    """What a round did and cost.

    Attributes:
        round: from 1.
        loss: mean of the clients' losses by their examples; nan when nobody told one.
        clients: whose replies went into the log entry.
        losses: of each of these clients.
        bytes_up: encoded answers, greetings' included, by client.
        bytes_down: encoded messages, by client.
        scalar_bytes_up: of these answers the scalars alone, by client.
        scalar_bytes_down: coefficients and seeds alone of the round's log entry.
        seconds: that the round took.
        failures: why there is no answer, by client.
        refusals: why an answer was refused, by client.
        fingerprints_equal: whether all clients that answered hold the weights of their round.
        problem: why replies that came were not used; empty when they were, or none came.
        entry: of the log.
    """

    round: int
    loss: float
    clients: tuple[str, ...]
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
    entry: LogEntry


@dataclass(frozen=True)
class FederationResult:
    """What a run came to.

    Attributes:
        reports: of each round; none where they were not to be kept.
        final_round: last round in the log.
        fingerprints: of each client that answered at the end, all after ``final_round``.
        replicas_identical: whether every reachable client answered, with the same fingerprint.
        flush_bytes_down: encoded messages of the last exchange, by client.
        failures: why a client did not answer at the end, or was refused.
        privacy: what the scalars of each client have told, by its own account; clients that add no
            noise are not among them.
    """

    reports: tuple[RoundReport, ...]
    final_round: int
    fingerprints: dict[str, int]
    replicas_identical: bool
    flush_bytes_down: dict[str, int]
    failures: dict[str, str]
    privacy: dict[str, PrivacySpent]


@dataclass
class _Exchange:
    """Counters of the messages of one round."""

    server: Server
    transport: Transport
    timeout: float | None
    up: dict[str, int] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    diverged: bool = False

    def run(self, messages: Mapping[str, bytes]) -> None:
        """Sends messages and gives the answers to the server."""
        if not messages:
            return
        replies, failures = self.transport.exchange(messages, self.timeout)
        for name, data in messages.items():
            self.down[name] = self.down.get(name, 0) + len(data)
        self.failures.update(failures)
        for name, data in replies.items():
            self.up[name] = self.up.get(name, 0) + len(data)
            receipt = self.server.receive(name, data)
            if not receipt.accepted:
                self.refusals[name] = receipt.reason
                self.diverged |= receipt.diverged


def run_federation(
    server: Server,
    transport: Transport,
    rounds: int,
    on_round: Callable[[RoundReport], None] | None = None,
    available: Callable[[int], Iterable[str]] | None = None,
    timeout: float | None = None,
    keep_reports: bool = True,
) -> FederationResult:
    """Runs rounds, then sends every reachable client the rest of the log.

    One exchange a round: a round's log entry rides on the next plan. A client that the server does
    not know is greeted beside it; in a second exchange it gets its plan, and so does one that
    could not follow the plan that it had.

    Args:
        server: of the job; it may have rounds behind it.
        transport: that reaches the clients.
        rounds: how many to run now.
        on_round: called after each round; what it raises ends the run, with the round in the log.
        available: clients that take part in a round, by its number; None for all that are
            reachable.
        timeout: seconds for an exchange.
        keep_reports: whether the result has the reports of all rounds. With many clients they are
            most of the memory that a long run takes; ``on_round`` gets each one anyway.

    Returns:
        What the run came to.
    """
    reports: list[RoundReport] = []
    for _ in range(rounds):
        nodes = set(transport.nodes())
        wanted = nodes if available is None else nodes & set(available(server.round))
        report = _run_round(server, transport, wanted, timeout)
        if keep_reports:
            reports.append(report)
        if on_round is not None:
            on_round(report)
    return _flush(server, transport, timeout, tuple(reports))


def _run_round(
    server: Server,
    transport: Transport,
    nodes: set[str],
    timeout: float | None,
) -> RoundReport:
    started = time.perf_counter()
    exchange = _Exchange(server, transport, timeout)
    messages = server.begin_round(nodes)
    for _ in range(_EXCHANGES):
        exchange.run(messages)
        messages = server.ask_again()
        if not messages:
            break
    outcome = server.end_round()
    entry, replies = outcome.entry, outcome.replies
    return RoundReport(
        round=entry.round,
        loss=outcome.loss,
        clients=tuple(replies),
        losses=dict(zip(replies, replies.losses.tolist(), strict=True)),
        bytes_up=exchange.up,
        bytes_down=exchange.down,
        scalar_bytes_up=dict.fromkeys(replies, replies.scalar_bytes),
        scalar_bytes_down=entry.scalar_bytes,
        seconds=time.perf_counter() - started,
        failures=exchange.failures,
        refusals=exchange.refusals | outcome.diverged,
        fingerprints_equal=not (exchange.diverged or outcome.diverged),
        problem=outcome.problem,
        entry=entry,
    )


def _flush(
    server: Server, transport: Transport, timeout: float | None, reports: tuple[RoundReport, ...]
) -> FederationResult:
    reachable = set(transport.nodes())
    nodes = [name for name in server.names if name in reachable]
    exchange = _Exchange(server, transport, timeout)
    exchange.run(server.greetings(nodes))
    ready = [name for name in server.admitted if name in reachable]
    # Once, unless a client lacks more than fits in a message, or says that it lacks more than that.
    stalls = 0
    while ready and stalls < _EXCHANGES:
        before = sum(map(server.lacking, ready))
        exchange.run(server.final_plan(ready))
        ready = [n for n in ready if server.lacking(n) and n not in exchange.failures]
        stalls = stalls + 1 if sum(map(server.lacking, ready)) >= before else 0
    last = server.log.last_round
    told = {name: server.fingerprints[name] for name in nodes if name in server.fingerprints}
    fingerprints = {name: mark[1] for name, mark in told.items() if mark[0] == last}
    return FederationResult(
        reports=reports,
        final_round=last,
        fingerprints=fingerprints,
        replicas_identical=len(fingerprints) == len(nodes) and len(set(fingerprints.values())) == 1,
        flush_bytes_down=exchange.down,
        failures=exchange.failures | exchange.refusals,
        privacy={name: server.privacy[name] for name in nodes if name in server.privacy},
    )
