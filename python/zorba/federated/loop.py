"""The loop: server and transport, round after round; and the transport within this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from zorba.federated.client import Client
from zorba.federated.errors import FederationError
from zorba.federated.privacy import PrivacySpent
from zorba.federated.round import RoundReport
from zorba.federated.server import MAX_PLAN_LOG_BYTES, Server

# Most exchanges of a round: a greeting, a plan that a client cannot follow, one that it can.
_EXCHANGES = 3


class Transport(Protocol):
    """All that the loop asks of an engine."""

    def nodes(self) -> Sequence[str]:
        """Returns the names of the clients that can be reached now."""

    def exchange(
        self, plans: Mapping[str, bytes], timeout: float | None = None
    ) -> tuple[dict[str, bytes], dict[str, str]]:
        """Sends each client its message; returns answers, and why there is none, by client.

        Clients that have not answered after ``timeout`` seconds have failed; None waits.
        """


class LocalTransport:
    """Clients in this process, by name, asked one after the other."""

    def __init__(self, clients: Mapping[str, Client]) -> None:
        for name, client in clients.items():
            if name != client.name:
                raise ValueError(f"client {client.name} is registered as {name}")
        self._clients = dict(clients)

    def nodes(self) -> Sequence[str]:
        """Returns the names of all clients."""
        return list(self._clients)

    def exchange(
        self, plans: Mapping[str, bytes], timeout: float | None = None
    ) -> tuple[dict[str, bytes], dict[str, str]]:
        """See ``Transport``. A client that raises has failed; nobody is late in one process."""
        replies: dict[str, bytes] = {}
        failures: dict[str, str] = {}
        for name, data in plans.items():
            try:
                # Bytes in and out, also in one process: messages are tested by every run.
                replies[name] = self._clients[name].handle(data)
            except FederationError as error:  # a sentence for people, which names the client itself
                failures[name] = str(error)
            # The objective's. As with an engine that lost a client the others go on; Ctrl-C passes.
            except Exception as error:
                failures[name] = f"{type(error).__name__}: {error}"
        return replies, failures


@dataclass(frozen=True)
class FederationResult:
    """What a run came to; dictionaries are by client."""

    reports: tuple[RoundReport, ...]  # of each round
    final_round: int  # last round in the log
    fingerprints: dict[str, int]  # of the clients that answered at the end, after ``final_round``
    replicas_identical: bool  # whether every reachable client answered, with the same fingerprint
    flush_bytes_down: dict[str, int]  # encoded messages after the last round
    failures: dict[str, str]  # why a client did not answer at the end, or was refused
    privacy: dict[str, PrivacySpent]  # what the scalars told, by the client's own account


def run_federation(
    server: Server,
    transport: Transport,
    rounds: int,
    on_round: Callable[[RoundReport], None] | None = None,
    available: Callable[[int], Iterable[str]] | None = None,
    timeout: float | None = None,
) -> FederationResult:
    """Runs rounds, then sends every reachable client the rest of the log.

    One exchange a round: a round's log entry rides on the next plan. In a second one, clients get a
    plan that were greeted in the first, or could not follow the plan that they had.

    Args:
        server: of the job; it may have rounds behind it.
        transport: that reaches the clients.
        rounds: how many to run now.
        on_round: called after each round; what it raises ends the run, with the round in the log.
        available: clients that take part in a round, by its number; None for all in reach.
        timeout: seconds for an exchange.
    """
    reports: list[RoundReport] = []
    for _ in range(rounds):
        nodes = set(transport.nodes())
        if available is not None:
            nodes &= set(available(server.round))
        _exchange(server, transport, server.begin_round(nodes), _EXCHANGES, timeout)
        report = server.end_round()
        reports.append(report)
        # The entry is on disk: what a callback raises, Ctrl-C included, loses nothing.
        if on_round is not None:
            on_round(report)
    # The last entry has no next plan to ride on: replicas would stay one round behind for good.
    messages = server.begin_round(transport.nodes(), measures=False)
    # A client may lack more of the log than fits in a plan; two plans in a row carry one's fill.
    most = _EXCHANGES + 2 * server.log.size // MAX_PLAN_LOG_BYTES
    _exchange(server, transport, messages, most, timeout)
    last, flush = server.log.last, server.current
    told = {name: server.fingerprints[name] for name in messages if name in server.fingerprints}
    fingerprints = {name: now for name, (applied, now) in told.items() if applied == last}
    same = len(fingerprints) == len(messages) and len(set(fingerprints.values())) == 1
    return FederationResult(
        reports=tuple(reports),
        final_round=last,
        fingerprints=fingerprints,
        replicas_identical=same,
        flush_bytes_down=dict(flush.bytes_down),
        failures=flush.failures | flush.refusals,
        privacy={name: server.privacy[name] for name in messages if name in server.privacy},
    )


def _exchange(
    server: Server, transport: Transport, plans: dict[str, bytes], most: int, timeout: float | None
) -> None:
    """Sends messages and takes the answers, which may ask for further ones, and notes all of it."""
    now = server.current
    # Bounded, whatever clients answer: one that says hello for ever misses the round, and the
    # others do not wait for it.
    while plans and most:
        now.bytes_down.update({name: len(data) for name, data in plans.items()})
        # A failure is of the client alone, and the round goes on with the others.
        replies, failures = transport.exchange(plans, timeout)
        now.failures.update(failures)
        for name, data in replies.items():
            now.note(name, data, server.receive(name, data))
        plans, most = server.ask_again(), most - 1
