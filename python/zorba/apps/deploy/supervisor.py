"""Runs a party's engine in the background: ``python -m zorba.apps.deploy.supervisor FOLDER``.

A small process that outlives the terminal it was started from. It starts the engine again when that
has died, and for the server it keeps the engine's job going. It loads no torch.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import psutil

from zorba.apps.deploy.backoff import Backoff
from zorba.apps.deploy.config import ServerConfig, SiteConfig
from zorba.apps.deploy.jobs import JobKeeper
from zorba.apps.deploy.party import PartyFolder, finished
from zorba.apps.deploy.provision import ENGINE, place_server
from zorba.files import write_whole

_STEP_SECONDS = 0.5
_KILL_SECONDS = 5.0
_KEPT = 20  # sentences


class Engine:
    """The engine's process of a party, and the processes that it starts.

    Args:
        party: with the engine's folder in its own.
        site: name of the site; None for the server.
        log: of the process.

    Attributes:
        starts: how often it was started.
    """

    def __init__(self, party: PartyFolder, site: str | None, log: IO[bytes]) -> None:
        self._home = party.path / ENGINE
        self._site = site
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._backoff = Backoff(first=1.0)
        self._started = 0.0
        self._resume = 0.0  # no start before that
        self._ended = ""
        self.starts = 0

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        return None if self._process is None else self._process.pid

    def keep_running(self) -> str:
        """Starts the process where there is none; returns a sentence if it did, else nothing."""
        now = time.monotonic()
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return ""
            self._process = None
            self._resume = now + self._backoff.pause(now - self._started)
            self._ended = f", after it ended with code {code}"
        if now < self._resume:
            return ""
        # The folder may have been moved since the last start.
        if self._site is None:
            place_server(self._home)
        self._started = now
        self.starts += 1
        # A session of its own: Ctrl-C in the terminal is not for the engine.
        self._process = subprocess.Popen(
            self._command(),
            cwd=self._home,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return f"started the engine, process {self.pid}{self._ended}"

    def stop(self) -> None:
        """Ends the process and all that it started."""
        if self._process is None:
            return
        processes = []
        with contextlib.suppress(psutil.NoSuchProcess):
            # The children are listed first: without their parent they are not found any more.
            engine = psutil.Process(self._process.pid)
            processes = [engine, *engine.children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(processes, _KILL_SECONDS)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._process = None

    def _command(self) -> list[str]:
        side = "server" if self._site is None else "client"
        module = f"nvflare.private.fed.app.{side}.{side}_train"
        files = ["-m", str(self._home), "-s", f"fed_{side}.json"]
        settings = ["--set", "secure_train=true", "org=zorba", "config_folder=config"]
        name = [] if self._site is None else [f"uid={self._site}"]
        return [sys.executable, "-u", "-m", module, *files, *settings, *name]


class Supervisor:
    """Keeps a party running until it is told to stop, or the server's rounds are done."""

    def __init__(self, party: PartyFolder) -> None:
        self._party = party
        self._stop = threading.Event()
        self._said: list[str] = []
        self._written: dict[str, Any] = {}
        self._keeper: JobKeeper | None = None
        site = None
        if party.is_server:
            config = ServerConfig.read(party.path)
            self._rounds = config.rounds
            self._keeper = JobKeeper(party.path, config, self._say)
        else:
            site = SiteConfig.read(party.path).name
        self._log = party.log.open("ab")
        self._engine = Engine(party, site, self._log)

    def run(self) -> None:
        """Returns when it was told to stop, or when the rounds are done."""
        # The handler only sets a flag: the engine is ended by the thread that started it.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        try:
            while not self._stop.is_set() and not self._done():
                started = self._engine.keep_running()
                if started:
                    self._say(started)
                if self._keeper is not None:
                    self._keeper.step()
                self._write(running=True)
                self._stop.wait(_STEP_SECONDS)
        finally:
            if self._keeper is not None:
                self._keeper.close()
            # Whatever happened, no engine stays behind without a supervisor.
            self._engine.stop()
            self._say("stopped" if self._stop.is_set() else "all rounds are done")
            self._write(running=False)

    def _done(self) -> bool:
        # The summary is written after the last exchange: by then every site has the whole log.
        return self._keeper is not None and finished(self._party.run, self._rounds) is not None

    def _say(self, text: str) -> None:
        stamp = time.strftime("%H:%M:%S")
        self._said = [*self._said, f"{stamp} {text}"][-_KEPT:]
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
        if state != self._written:  # twice a second a write to disk would be too many
            write_whole(self._party.state, json.dumps(state, indent=2) + "\n")
            self._written = state


def main() -> None:
    """Runs the party whose folder is the argument."""
    party = PartyFolder(Path(sys.argv[1]))
    with party.only_one():
        Supervisor(party).run()


if __name__ == "__main__":
    main()
