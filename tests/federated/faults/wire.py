"""Messages between processes of one machine, over a Unix socket."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Client, Connection, wait
from pathlib import Path

_NUMBER = struct.Struct("<Q")
_RETRY_SECONDS = 0.005


class SocketTransport:
    """A ``Transport``: sites connect, tell their name, and answer numbered messages.

    A site that comes back while its message waits for an answer gets the message again. An answer
    to a message that is no longer waited for is dropped. ``nodes`` waits for a number of sites.
    """

    def __init__(self, path: Path, sites: int) -> None:
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._sites = sites
        self._names: dict[Connection, str] = {}
        self._pending: dict[str, tuple[int, bytes]] = {}
        self._numbers = itertools.count(int.from_bytes(os.urandom(6), "little"))

    def nodes(self) -> Sequence[str]:
        self._pump(0.0)
        while len(self._names) < self._sites:
            self._pump(None)
        return sorted(self._names.values())

    def exchange(
        self, plans: Mapping[str, bytes], timeout: float | None = None
    ) -> tuple[dict[str, bytes], dict[str, str]]:
        self._pending = {name: (next(self._numbers), data) for name, data in plans.items()}
        for connection, name in list(self._names.items()):
            self._send(connection, name)
        answers: dict[str, bytes] = {}
        while self._pending:
            self._pump(None, answers)
        return answers, {}

    def close(self) -> None:
        for connection, name in list(self._names.items()):
            self._pending = {name: (0, b"")}
            self._send(connection, name)
            connection.close()

    def _pump(self, timeout: float | None, answers: dict[str, bytes] | None = None) -> None:
        """Takes what is there or comes within the timeout."""
        for source in wait([self._listener, *self._names], timeout):
            if source is self._listener:
                connection = Connection(self._listener.accept()[0].detach())
                try:
                    name = connection.recv_bytes().decode()
                except (EOFError, OSError):
                    continue
                self._names = {c: n for c, n in self._names.items() if n != name}
                self._names[connection] = name
                self._send(connection, name)
                continue
            assert isinstance(source, Connection)
            name = self._names[source]
            try:
                answer = source.recv_bytes()
            except (EOFError, OSError):
                del self._names[source]
                continue
            (number,) = _NUMBER.unpack_from(answer)
            if answers is not None and self._pending.get(name, (0,))[0] == number:
                del self._pending[name]
                answers[name] = answer[_NUMBER.size :]

    def _send(self, connection: Connection, name: str) -> None:
        if name in self._pending:
            number, data = self._pending[name]
            try:
                connection.send_bytes(_NUMBER.pack(number) + data)
            except OSError:
                self._names.pop(connection, None)


class SiteLink:
    """The site's end: survives a server that is killed and comes back."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._connection = self._connect()

    def receive(self) -> tuple[int, bytes]:
        """Returns a message's number and bytes; b"" when the run is over."""
        while True:
            try:
                data = self._connection.recv_bytes()
                return _NUMBER.unpack_from(data)[0], data[_NUMBER.size :]
            except (EOFError, OSError):
                self._connection = self._connect()

    def send(self, number: int, data: bytes) -> None:
        try:
            self._connection.send_bytes(_NUMBER.pack(number) + data)
        except OSError:
            self._connection = self._connect()

    def _connect(self) -> Connection:
        while True:
            try:
                connection = Client(str(self._path))
                connection.send_bytes(self._name.encode())
                return connection
            except OSError:
                time.sleep(_RETRY_SECONDS)
