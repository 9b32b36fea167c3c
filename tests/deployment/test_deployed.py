"""The engine itself: a server and three sites as processes, over TLS, with kills and strangers.

Everything here shares one run, since starting the engine takes many seconds.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from zorba.deployment.build import build_client, build_server
from zorba.deployment.config import ServerConfig
from zorba.deployment.control import parties
from zorba.deployment.project import init_project
from zorba.deployment.provision import ADMIN, ENGINE
from zorba.federated import LocalTransport, RoundLog, RunFolder, run_federation
from zorba.federated.events import EventReader

from tests.deployment.conftest import SITES, describe

ROUNDS = 150
_WHO = ("plain", "stranger", "other", "member")
_PATIENCE = 240.0  # seconds after which a run hangs: a failure, never a verdict on speed

# In every process of the run: notes what is unpickled, by the audit event that names the class.
_WATCHER = """
import os, sys
def _note(event, arguments):
    if event == "pickle.find_class":
        with open(os.environ["ZORBA_TEST_PICKLES"], "a") as file:
            file.write(f"{sys.argv[:3]} {arguments}\\n")
sys.addaudithook(_note)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(what: str, reached: Callable[[], Any]) -> Any:
    began = time.monotonic()
    while not (value := reached()):
        if time.monotonic() - began > _PATIENCE:
            raise TimeoutError(f"no {what} within {_PATIENCE} s")
        time.sleep(0.1)
    return value


def federate(*arguments: object, **environment: str) -> str:
    command = [sys.executable, "-m", "zorba.cli", "federate", *map(str, arguments)]
    run = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, timeout=_PATIENCE
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@dataclass
class Deployed:
    """A run, and what was seen while it went on."""

    folder: Path
    port: int
    listeners: dict[int, list[str]] = field(default_factory=dict)  # port: who
    status: str = ""
    killed: list[str] = field(default_factory=list)
    answers: dict[tuple[int, str], str] = field(default_factory=dict)

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder / "server" / "run")

    def rounds(self) -> int:
        events = EventReader(self.run.events).poll()
        return max((event["round"] for event in events if event["event"] == "round"), default=0)

    def processes(self) -> list[psutil.Process]:
        """All of the run: supervisors, engines, and the processes of the job."""
        mine = []
        for process in psutil.process_iter(["cmdline"]):
            if str(self.folder) in " ".join(process.info["cmdline"] or []):
                mine.append(process)
        return mine

    def job_process(self, party: str) -> psutil.Process:
        module = "server.runner_process" if party == "server" else "client.worker_process"
        folder = str(self.folder / ("server" if party == "server" else f"sites/{party}"))
        (found,) = [
            p
            for p in self.processes()
            if any(module in part for part in p.cmdline()) and f"{folder}/{ENGINE}" in p.cmdline()
        ]
        return found

    def kill(self, party: str) -> None:
        """Kills the process that holds the server or a client, and waits for more rounds."""
        os.kill(self.job_process(party).pid, signal.SIGKILL)
        self.killed.append(party)
        before = self.rounds()
        wait_for(f"round after {party} was killed", lambda: self.rounds() > before + 1)

    def note_listeners(self) -> None:
        for process in self.processes():
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    who = self.listeners.setdefault(connection.laddr.port, [])
                    who.append(f"{connection.laddr.ip} {process.pid}")


@pytest.fixture(scope="module")
def other_project(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the same names, of another authority."""
    folder = tmp_path_factory.mktemp("other") / "project"
    init_project(describe(base, folder))
    return folder


@pytest.fixture(scope="module")
def deployed(
    base: Path, other_project: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployed]:
    home = tmp_path_factory.mktemp("deployed")
    (home / "sitecustomize.py").write_text(_WATCHER)
    made = Deployed(home / "project", free_port())
    init_project(
        describe(base, made.folder, rounds=ROUNDS, address=f"localhost:{made.port}", timeout=120.0)
    )
    server = made.folder / "server" / "server.yaml"
    server.write_text(server.read_text().replace("ask_timeout: 20.0", "ask_timeout: 5.0"))
    path = os.pathsep.join([str(home), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        notes = {"PYTHONPATH": path, "ZORBA_TEST_PICKLES": str(home / "pickles")}
        federate("start", made.folder, "--detach", **notes)
        wait_for("first rounds", lambda: made.rounds() >= 3)
        made.note_listeners()
        ways: dict[str, Callable[[int], str]] = {
            "plain": _speak_plainly,
            "stranger": lambda port: _handshake(port, None),
            "other": lambda port: _handshake(port, other_project),
            "member": lambda port: _handshake(port, made.folder),
        }
        with ThreadPoolExecutor(8) as pool:
            pairs = [(port, who) for port in made.listeners for who in _WHO]
            said = pool.map(lambda pair: ways[pair[1]](pair[0]), pairs)
            made.answers = dict(zip(pairs, said, strict=True))
        made.kill("bob")
        made.kill("server")
        made.status = federate("status", made.folder)
        wait_for("end", made.run.summary.exists)
        (server,) = parties(made.folder, ["server"])
        wait_for("server to stop", lambda: server.pid() is None)
        yield made
    finally:
        federate("stop", made.folder)
        for process in made.processes():
            process.kill()


def _speak_plainly(port: int) -> str:
    """Returns what a listener says to somebody who does not speak TLS."""
    with socket.create_connection(("127.0.0.1", port), 10) as plain:
        plain.settimeout(2)
        plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(64))
        try:
            said = plain.recv(1000)
        except (ConnectionError, TimeoutError) as error:
            return type(error).__name__
    return "an alert of TLS" if said[:1] == b"\x15" else repr(said)


def _handshake(port: int, project: Path | None) -> str:
    """Returns what becomes of a TLS connection with the certificate of a project's site."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # whom the listener lets in is looked at here
    if project is not None:
        kit = project / "sites" / "ada" / ENGINE / "startup"
        context.load_cert_chain(kit / "client.crt", kit / "client.key")
    try:
        with (
            socket.create_connection(("127.0.0.1", port), 10) as plain,
            context.wrap_socket(plain) as secure,
        ):
            # With TLS 1.3 a client hears only afterwards that its certificate was refused.
            secure.settimeout(2)
            try:
                said = secure.recv(1000)
            except TimeoutError:
                return f"{secure.version()}: let in"
            return f"{secure.version()}: let in" if said else "closed"
    except (ssl.SSLError, ConnectionError) as error:
        return type(error).__name__


def test_run_ends_where_the_undisturbed_run_ends(
    deployed: Deployed, base: Path, tmp_path: Path
) -> None:
    assert deployed.killed == ["bob", "server"]
    init_project(describe(base, tmp_path / "p", rounds=ROUNDS))
    clients = {site: build_client(tmp_path / "p" / "sites" / site) for site in SITES}
    config = ServerConfig.read(tmp_path / "p" / "server")
    server = build_server(config, RunFolder(tmp_path / "run"))
    result = run_federation(server, LocalTransport(clients), ROUNDS)
    summary = json.loads(deployed.run.summary.read_text())
    assert summary["replicas_identical"]
    assert summary["final_round"] == ROUNDS
    told = {name: f"{value:016x}" for name, value in result.fingerprints.items()}
    assert summary["fingerprints"] == told
    assert deployed.run.log.read_bytes() == (tmp_path / "run" / "federation.log").read_bytes()
    server.close()


def test_every_round_had_every_site(deployed: Deployed) -> None:
    events = EventReader(deployed.run.events).poll()
    rounds = [event for event in events if event["event"] == "round"]
    assert [event["round"] for event in rounds] == list(range(1, ROUNDS + 1))
    assert all(event["clients"] == list(SITES) for event in rounds)
    assert sum(event["event"] == "start" for event in events) == 2
    with RoundLog(deployed.run.log) as log:
        assert log.last_round == ROUNDS


def test_status_tells_who_runs(deployed: Deployed) -> None:
    for name in ("server", *SITES):
        assert name in deployed.status
    assert f"of {ROUNDS}" in deployed.status
    assert "stopped" not in deployed.status
    assert "stopped" in federate("status", deployed.folder, "--only", "server")


def test_nothing_listens_without_tls_and_a_certificate_of_the_project(deployed: Deployed) -> None:
    assert deployed.port in deployed.listeners
    assert len(deployed.listeners) >= 5, "the server's, and those between processes of a machine"
    for port in deployed.listeners:
        told = {who: deployed.answers[port, who] for who in _WHO}
        assert told["plain"] in ("an alert of TLS", "ConnectionResetError", "b''", "TimeoutError")
        assert told["member"] in ("TLSv1.3: let in", "TLSv1.2: let in"), told
        for who in ("stranger", "other"):
            assert told[who] in ("SSLError", "ConnectionResetError", "closed"), told


def test_nothing_is_unpickled(deployed: Deployed) -> None:
    pickles = deployed.folder.parent / "pickles"
    assert not pickles.exists(), pickles.read_text()[:2000]


def test_site_in_the_name_of_another_is_refused(base: Path, tmp_path: Path) -> None:
    """A member of the project that says it is another one, with its own certificate."""
    folder = tmp_path / "p"
    init_project(describe(base, folder, address=f"localhost:{free_port()}"))
    folder.joinpath("sites", "bob", "site.yaml").write_text(
        folder.joinpath("sites", "bob", "site.yaml").read_text().replace("name: bob", "name: ada")
    )
    try:
        federate("start", folder, "--detach", "--only", "server", "--only", "bob")
        log = folder / "server" / "run" / "engine.log"
        refusal = "authenticated as 'bob' but claimed endpoint 'ada'"
        wait_for("refusal", lambda: refusal in log.read_text())
        state = json.loads((folder / "server" / "run" / "supervisor.json").read_text())
        assert state["connected"] == []
    finally:
        federate("stop", folder)


def test_admin_kit_is_not_with_the_sites(deployed: Deployed) -> None:
    for site in SITES:
        assert not (deployed.folder / "sites" / site / ADMIN).exists()
