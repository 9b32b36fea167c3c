"""Runs a party's engine in the background: ``python -m zorba.apps.deploy.supervisor FOLDER``.

A process of its own for the server or a site, small, that outlives the terminal it was started
from, starts the engine again when it died, and for the server keeps the engine's job going.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zorba.apps.deploy.config import SERVER_FILE, ServerConfig, SiteConfig
from zorba.apps.deploy.engine import EngineProcess
from zorba.apps.deploy.jobs import JobKeeper
from zorba.files import write_whole

_STEP_SECONDS = 0.5
_SAID = 20  # sentences that are kept


class PartyFolder:
    """Files of a party that runs here.

    Args:
        path: of the server's or a site's folder.

    Attributes:
        is_server: whether it is the server's.
        run: folder for what is written while it runs.
        log: of engine and supervisor.
        state: ``supervisor.json``, what the supervisor sees.
        lock: held while a supervisor runs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.is_server = (path / SERVER_FILE).exists()
        self.run = self.path / "run"
        self.log = self.run / "engine.log"
        self.state = self.run / "supervisor.json"
        self.lock = self.run / "supervisor.lock"

    @property
    def name(self) -> str:
        """The site's name, or "server"."""
        return "server" if self.is_server else self.path.name

    def pid(self) -> int | None:
        """Returns the supervisor's process id; None when none runs."""
        try:
            with self.lock.open("r+") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return None
                except OSError:
                    return int(file.read() or 0) or None
        except FileNotFoundError:
            return None

    def read_state(self) -> dict[str, Any]:
        """Returns what the supervisor last wrote; empty where none ever ran."""
        try:
            state: dict[str, Any] = json.loads(self.state.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return state


class Supervisor:
    """Keeps a party running until it is told to stop, or the server's rounds are done."""

    def __init__(self, folder: PartyFolder) -> None:
        self._folder = folder
        self._stop = threading.Event()
        self._said: list[str] = []
        self._written: dict[str, Any] = {}
        self._keeper: JobKeeper | None = None
        site: str | None = None
        if folder.is_server:
            self._config = ServerConfig.read(folder.path)
            self._keeper = JobKeeper(folder.path, self._config, self._say)
        else:
            site = SiteConfig.read(folder.path).name
        self._log = folder.log.open("ab")
        self._engine = EngineProcess(folder.path, site, self._log)

    def run(self) -> None:
        """Returns when it was told to stop, or when the rounds are done."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        try:
            while not self._stop.is_set() and not self._done():
                before = self._engine.starts
                self._engine.step()
                if self._engine.starts != before:
                    code = self._engine.code
                    ended = "" if code is None else f", after it ended with code {code}"
                    self._say(f"started the engine, process {self._engine.pid}{ended}")
                if self._keeper is not None:
                    self._keeper.step()
                self._write(running=True)
                self._stop.wait(_STEP_SECONDS)
        finally:
            if self._keeper is not None:
                self._keeper.close()
            self._engine.stop()
            self._say("stopped" if self._stop.is_set() else "all rounds are done")
            self._write(running=False)

    def _done(self) -> bool:
        """Whether the server's last round is behind it, with the end told to the sites."""
        if self._keeper is None:
            return False
        try:
            summary = json.loads((self._folder.run / "summary.json").read_text())
        except (FileNotFoundError, ValueError):
            return False
        return bool(summary.get("final_round", 0) >= self._config.rounds)

    def _say(self, text: str) -> None:
        stamp = time.strftime("%H:%M:%S")
        self._said = [*self._said, f"{stamp} {text}"][-_SAID:]
        self._log.write(f"{stamp} supervisor: {text}\n".encode())
        self._log.flush()

    def _write(self, *, running: bool) -> None:
        keeper = self._keeper
        state = {
            "running": running,
            "engine": self._engine.pid,
            "starts": self._engine.starts,
            "connected": keeper.connected if keeper else None,
            "job": keeper.job if keeper else None,
            "said": self._said,
        }
        if state != self._written:
            text = json.dumps(state, indent=2) + "\n"
            write_whole(self._folder.state, text)
            self._written = state


@contextmanager
def only_one(folder: PartyFolder) -> Iterator[None]:
    """Holds the folder's lock, or exits with a sentence where another supervisor has it."""
    folder.run.mkdir(exist_ok=True)
    with folder.lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(f"{folder.path} runs already")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def main() -> None:
    """Runs the party whose folder is the argument."""
    folder = PartyFolder(Path(sys.argv[1]))
    with only_one(folder):
        Supervisor(folder).run()


if __name__ == "__main__":
    main()
