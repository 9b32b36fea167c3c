"""The loop: server and transport, round after round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from zorba.federated.privacy import PrivacySpent
from zorba.federated.round import RoundReport
from zorba.federated.server import Server
from zorba.federated.transport import Transport

_EXCHANGES = 3
"""Most exchanges of a round: a greeting, a plan that a client cannot follow, one that it can."""


@dataclass(frozen=True)
class FederationResult:
    """What a run came to; dictionaries are by client.

    Attributes:
        reports: of each round; none where they were not to be kept.
        final_round: last round in the log.
        fingerprints: of each client that answered at the end, all after ``final_round``.
        replicas_identical: whether every reachable client answered, with the same fingerprint.
        flush_bytes_down: encoded messages after the last round.
        failures: why a client did not answer at the end, or was refused.
        privacy: what the scalars of each have told, by its own account, if it adds noise.
    """

    reports: tuple[RoundReport, ...]
    final_round: int
    fingerprints: dict[str, int]
    replicas_identical: bool
    flush_bytes_down: dict[str, int]
    failures: dict[str, str]
    privacy: dict[str, PrivacySpent]


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
        available: clients that take part in a round, by its number; None for all in reach.
        timeout: seconds for an exchange.
        keep_reports: whether the result has the reports of all rounds. With many clients they are
            most of the memory that a long run takes; ``on_round`` gets each one anyway.
    """
    reports: list[RoundReport] = []
    for _ in range(rounds):
        nodes = set(transport.nodes())
        if available is not None:
            nodes &= set(available(server.round))
        report = _run_round(server, transport, nodes, timeout)
        if keep_reports:
            reports.append(report)
        # The entry is on disk: what a callback raises, Ctrl-C included, loses nothing.
        if on_round is not None:
            on_round(report)
    return _flush(server, transport, timeout, tuple(reports))


def _run_round(
    server: Server, transport: Transport, nodes: set[str], timeout: float | None
) -> RoundReport:
    messages = server.begin_round(nodes)
    # Bounded, whatever clients answer: one that says hello for ever misses the round, and the
    # others do not wait for it.
    for _ in range(_EXCHANGES):
        if messages:
            _exchange(server, transport, messages, timeout)
            messages = server.ask_again()
    return server.end_round()


def _flush(
    server: Server, transport: Transport, timeout: float | None, reports: tuple[RoundReport, ...]
) -> FederationResult:
    # The last entry has no next plan to ride on: replicas would stay one round behind for good.
    reachable = set(transport.nodes())
    nodes = [name for name in server.names if name in reachable]
    messages = server.final_plan(nodes)
    # Once, unless clients have to say hello first or lack more than fits in a message. A client
    # that goes back and forth must not hold the run for ever: exchanges without progress count.
    stalls = 0
    while messages and stalls < _EXCHANGES:
        before = sum(map(server.lacking, nodes))
        _exchange(server, transport, messages, timeout)
        messages = server.ask_again()
        stalls += sum(map(server.lacking, nodes)) >= before
    last, flush = server.log.last, server.current
    told = {name: server.fingerprints[name] for name in nodes if name in server.fingerprints}
    fingerprints = {name: now for name, (applied, now) in told.items() if applied == last}
    return FederationResult(
        reports=reports,
        final_round=last,
        fingerprints=fingerprints,
        replicas_identical=len(fingerprints) == len(nodes) and len(set(fingerprints.values())) == 1,
        flush_bytes_down=flush.bytes_down,
        failures=flush.failures | flush.refusals,
        privacy={name: server.privacy[name] for name in nodes if name in server.privacy},
    )


def _exchange(
    server: Server, transport: Transport, messages: Mapping[str, bytes], timeout: float | None
) -> None:
    """Sends messages, gives the answers to the server, and notes all of it in the round."""
    now = server.current
    now.sent(messages)
    # A failure is of the client alone, and the round goes on with the others.
    replies, failures = transport.exchange(messages, timeout)
    now.failures.update(failures)
    for name, data in replies.items():
        now.note(name, data, server.receive(name, data))
