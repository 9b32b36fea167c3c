"""Strangers at the doors of a deployment: who listens, and what it says to whom."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
from nvflare.fuel.flare_api.flare_api import new_secure_session
from zorba.apps.deploy.provision import ADMIN, ADMIN_NAME, ENGINE

from tests.apps.deploy.conftest import SITES
from tests.apps.deploy.deployed import Deployed, wait_for

_PATIENCE = 60.0
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(64)
_OLD, _NEW = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


def listeners(deployed: Deployed) -> dict[tuple[str, int], str]:
    """Where processes take connections: the address, by party and port."""
    found = {}
    for process in deployed.processes():
        command = deployed.command(process)
        party = next((site for site in SITES if f"/sites/{site}" in command), "server")
        with suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found[party, connection.laddr.port] = connection.laddr.ip
    return found


def listening_unix_sockets(processes: Sequence[psutil.Process]) -> set[str]:
    """Inodes of Unix sockets on which any of the processes takes connections."""
    held = set()
    for process in processes:
        with suppress(FileNotFoundError):  # it ended
            handles = list(Path(f"/proc/{process.pid}/fd").iterdir())
            held |= {os.readlink(handle) for handle in handles if handle.is_symlink()}
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    listening = {line[6] for line in lines if int(line[3], 16) & 0x10000}
    return {inode for inode in listening if f"socket:[{inode}]" in held}


def knock(ports: set[int], mine: Path, other: Path) -> dict[int, dict[str, str]]:
    """What each port says to each kind of visitor; ``other`` is a project of another authority."""
    visits: dict[str, Callable[[int], str]] = {
        "plain": speak_plainly,
        "member, TLS 1.2": lambda port: handshake(port, mine, _OLD),
        "nobody, TLS 1.2": lambda port: handshake(port, None, _OLD),
        "nobody, TLS 1.3": lambda port: handshake(port, None, _NEW),
        "stranger, TLS 1.2": lambda port: handshake(port, other, _OLD),
        "stranger, TLS 1.3": lambda port: handshake(port, other, _NEW),
    }
    with ThreadPoolExecutor(8) as pool:
        told = {port: [pool.submit(visit, port) for visit in visits.values()] for port in ports}
        return {
            port: dict(zip(visits, (answer.result() for answer in answers), strict=True))
            for port, answers in told.items()
        }


def submit_code(deployed: Deployed, folder: Path) -> tuple[str, dict[str, str]]:
    """Tries, with the administrator's certificate, to bring code to the sites and to run commands.

    Returns what the server's log says of the job, and what it answers to each command.
    """
    shutil.copytree(deployed.folder / "server" / "run" / "job", folder)
    (folder / "app" / "custom").mkdir()
    (folder / "app" / "custom" / "brought.py").write_text("raise SystemExit\n")
    session = new_secure_session(ADMIN_NAME, str(deployed.folder / "server" / ADMIN), timeout=60.0)
    try:
        job = session.submit_job(str(folder))
        wait_for("verdict on the job", lambda: f"the Job ({job})" in deployed.log())
        verdict = next(line for line in deployed.log().splitlines() if f"the Job ({job})" in line)
        commands = ("ls ada", "cat ada fl_app.txt", "head server audit.log", "pwd server")
        return verdict, {command: str(session.api.do_command(command)) for command in commands}
    finally:
        session.close()


def speak_plainly(port: int) -> str:
    """What a listener says to who speaks no TLS: "nothing" and closes, or its bytes."""
    with socket.create_connection(("127.0.0.1", port), _PATIENCE) as plain:
        try:
            plain.sendall(_HTTP2)
            said = plain.recv(1000)
        except ConnectionError:
            return "nothing"
        except TimeoutError:
            return "silence, and an open connection"
    alert = said[:1] == b"\x15"
    return "nothing" if alert or not said else repr(said)


def handshake(port: int, project: Path | None, version: ssl.TLSVersion) -> str:
    """Whether somebody is "let in" or "refused": a project's site ada, or nobody's.

    Before TLS 1.3 the listener looks at the certificate within the handshake; in 1.3 after it: who
    is not told so within a minute is let in.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # whom the listener lets in is looked at here
    context.minimum_version = context.maximum_version = version
    if project is not None:
        kit = project / "sites" / "ada" / ENGINE / "startup"
        context.load_cert_chain(kit / "client.crt", kit / "client.key")
    try:
        with (
            socket.create_connection(("127.0.0.1", port), _PATIENCE) as plain,
            context.wrap_socket(plain) as secure,
        ):
            if version >= _NEW and not secure.recv(1000):
                return "refused"
            return "let in"
    except TimeoutError:
        return "let in"
    except (ssl.SSLError, ConnectionError):
        return "refused"
