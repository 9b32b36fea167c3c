"""Transport: how messages get to clients and back, and the one that stays in this process."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from zorba.federated.client import Client
from zorba.federated.errors import FederationError


class Transport(Protocol):
    """All that the loop asks of an engine."""

    def nodes(self) -> Sequence[str]:
        """Returns the names of the clients that can be reached now."""
        ...

    def exchange(
        self, plans: Mapping[str, bytes], timeout: float | None = None
    ) -> tuple[dict[str, bytes], dict[str, str]]:
        """Sends each client its message and waits for the answers.

        Clients that have not answered after ``timeout`` seconds have failed; None waits.

        Returns:
            Answers, and why there is none, by client; each client is in one of the two.
        """
        ...


class LocalTransport:
    """Clients in this process, by name, asked one after the other.

    ``bytes_down`` and ``bytes_up`` count the messages to and from each client so far.
    """

    def __init__(self, clients: Mapping[str, Client]) -> None:
        for name, client in clients.items():
            if name != client.name:
                raise ValueError(f"client {client.name} is registered as {name}")
        self._clients = dict(clients)
        self.bytes_down = dict.fromkeys(clients, 0)
        self.bytes_up = dict.fromkeys(clients, 0)

    def nodes(self) -> Sequence[str]:
        """Returns the names of all clients."""
        return list(self._clients)

    def exchange(
        self, plans: Mapping[str, bytes], timeout: float | None = None
    ) -> tuple[dict[str, bytes], dict[str, str]]:
        """See ``Transport``. A client that raises has failed; Ctrl-C is not caught."""
        replies: dict[str, bytes] = {}
        failures: dict[str, str] = {}
        for name, data in plans.items():
            # A failure of this client, as with an engine that lost it: the others go on.
            if name not in self._clients:
                failures[name] = "there is no such client"
                continue
            self.bytes_down[name] += len(data)
            started = time.monotonic()
            try:
                # Bytes in and out, also in one process: messages are tested by every run.
                answer = self._clients[name].handle(data)
            except FederationError as error:
                # A sentence for people, which names the client itself.
                failures[name] = str(error)
                continue
            except Exception as error:  # the objective's; the others go on
                failures[name] = f"{type(error).__name__}: {error}"
                continue
            # Looked at when the answer is there: nothing interrupts a client of this process. An
            # engine drops what comes late, and so is this.
            seconds = time.monotonic() - started
            self.bytes_up[name] += len(answer)
            if timeout is not None and seconds > timeout:
                failures[name] = f"answered after {seconds:.3f} s, the limit is {timeout:.3f} s"
            else:
                replies[name] = answer
        return replies, failures
