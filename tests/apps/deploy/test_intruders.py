"""The eyes of the tests of the engine: they see what is open, where something is."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.apps.deploy.intruders import handshake, listening_unix_sockets, speak_plainly


@contextmanager
def listener(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError), server.accept()[0] as visitor:
                answer(visitor)

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


def test_listener_without_tls_is_seen() -> None:
    with listener(lambda visitor: visitor.sendall(visitor.recv(3))) as port:
        assert speak_plainly(port) == "b'PRI'"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("asks", [False, True])
def test_listener_that_asks_for_no_certificate_is_seen(
    shared_project: Path, version: ssl.TLSVersion, asks: bool
) -> None:
    kit = shared_project / "server" / "engine" / "startup"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(kit / "server.crt", kit / "server.key")
    context.load_verify_locations(kit / "rootCA.pem")
    context.verify_mode = ssl.CERT_REQUIRED if asks else ssl.CERT_NONE

    def answer(visitor: socket.socket) -> None:
        with context.wrap_socket(visitor, server_side=True) as secure:
            secure.sendall(b"hello")

    with listener(answer) as port:
        assert handshake(port, None, version) == ("refused" if asks else "let in")
    with listener(answer) as port:
        assert handshake(port, shared_project, version) == "let in"


def test_unix_socket_that_listens_is_seen(tmp_path: Path) -> None:
    mine = [psutil.Process()]
    before = listening_unix_sockets(mine)
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket"))
        unix.listen()
        assert len(listening_unix_sockets(mine) - before) == 1
    assert listening_unix_sockets(mine) == before
