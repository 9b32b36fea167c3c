"""A federation on the engine: a server and three sites as processes, and what is seen of them."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from zorba.apps.deploy.config import ServerConfig
from zorba.federated import RunFolder
from zorba.federated.events import EventReader
from zorba.files import write_whole

from tests.apps.deploy.conftest import change_server, make_project
from tests.command import zorba

PATIENCE = 900.0  # seconds after which a run hangs: a failure, never a verdict on speed
_STRETCH = 2  # rounds, of which a kill takes three stretches

# For a sitecustomize.py: the client of one site measures as far as the gate is open.
GATE = """
import os, sys
_held = os.environ["ZORBA_TEST_HELD"] in sys.orig_argv
if _held and any("worker_process" in word for word in sys.orig_argv):
    import time
    from zorba.apps.deploy import build
    class Held(build.ModelObjective):
        def __call__(self, round_number, step):
            while round_number > int(open(os.environ["ZORBA_TEST_GATE"]).read()):
                time.sleep(0.01)
            return super().__call__(round_number, step)
    build.ModelObjective = Held
"""


def wait_for(what: str, reached: Callable[[], Any]) -> Any:
    began = time.monotonic()
    while not (value := reached()):
        if time.monotonic() - began > PATIENCE:
            raise TimeoutError(f"no {what} within {PATIENCE} s")
        time.sleep(0.1)
    return value


def federate(name: str, *arguments: object, **environment: str) -> str:
    result = zorba("federate", name, *arguments, **environment)
    assert result.exit_code == 0, result.output
    return result.output


def init(base: Path, folder: Path, rounds: int) -> int:
    """Writes a project that notices quickly who is away; returns the server's port."""
    with socket.socket() as probe:  # for a port that is free
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    make_project(base, folder, rounds=rounds, address=f"localhost:{port}", timeout=PATIENCE)
    change_server(folder / "server", ask_timeout=5.0, rejoin_seconds=5.0)
    return port


class Gate:
    """How many rounds cleo measures: however quick the machine, no round after them ends."""

    def __init__(self, path: Path, rounds: int) -> None:
        self.path = path  # a file that the client looks at before it measures
        self.open(rounds)

    def open(self, rounds: int) -> None:
        self.rounds = rounds
        write_whole(self.path, str(rounds))


class Deployed:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = RunFolder(folder / "server" / "run")

    def party(self, name: str) -> Path:
        return self.folder / "server" if name == "server" else self.folder / "sites" / name

    def rounds(self) -> int:
        events = EventReader(self.run.events).poll()
        return max((event["round"] for event in events if event["event"] == "round"), default=0)

    def log(self, party: str = "server") -> str:
        return (self.party(party) / "run" / "engine.log").read_text()

    def processes(self) -> list[psutil.Process]:
        """All of the project: supervisors, engines, processes of the job, and their children."""
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter(["cmdline"]):
            if any(str(self.folder) in part for part in process.info["cmdline"] or ()):
                with suppress(psutil.NoSuchProcess):
                    family = [process, *process.children(recursive=True)]
                    found.update((member.pid, member) for member in family)
        return list(found.values())

    @staticmethod
    def command(process: psutil.Process) -> str:
        with suppress(psutil.NoSuchProcess):
            return " ".join(process.cmdline())
        return ""

    def process(self, party: str, module: str) -> psutil.Process:
        """A process of a party: of ``server_train`` or ``client_train``, which stay between jobs,
        or of ``runner_process`` or ``worker_process``, which hold the server and a client."""
        home = str(self.party(party) / "engine")

        def look() -> list[psutil.Process]:
            seen = [(p, p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
            return [p for p, words in seen if home in words and module in " ".join(words)]

        return wait_for(f"process {module} of {party}", look)[0]

    def kill(self, gate: Gate, *processes: psutil.Process) -> None:
        """Kills processes in the middle of the run, and waits for rounds that need them again."""
        assert gate.rounds + 3 * _STRETCH < ServerConfig.read(self.folder / "server").rounds
        gate.open(gate.rounds + 2 * _STRETCH)
        wait_for("rounds before the kill", lambda: self.rounds() >= gate.rounds - _STRETCH)
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        # The round that the gate holds may have all other replies already, those after it do not.
        gate.open(gate.rounds + _STRETCH)
        wait_for(f"rounds after the kill of {processes}", lambda: self.rounds() == gate.rounds)

    def end(self) -> None:
        try:
            federate("stop", self.folder)
        finally:
            for process in self.processes():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
