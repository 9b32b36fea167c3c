"""A party, the server or a site: its folder, and the process that keeps its engine running.

``python -m zorba.apps.deploy.party FOLDER`` outlives the terminal, starts the engine again when
that has died, and keeps the job of the server's engine going. It loads no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from zorba.apps.deploy.config import ConfigError, ServerConfig, SiteConfig
from zorba.apps.deploy.jobs import Backoff, JobKeeper
from zorba.apps.deploy.provision import ENGINE, place_server
from zorba.files import write_whole

_STEP_SECONDS, _KILL_SECONDS = 0.5, 5.0


class PartyFolder:
    """Files of the server or of a site."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.is_server = (path / ServerConfig.file).exists()
        self.name = "server" if self.is_server else self.path.name
        self.run = self.path / "run"  # everything that is written while it runs
        self.log = self.run / "engine.log"  # of engine and supervisor
        self.state = self.run / "supervisor.json"  # what the supervisor said
        self._lock = self.run / "supervisor.lock"  # held while one runs; it holds the process id

    def pid(self) -> int | None:
        """Returns the supervisor's process id; None when none runs."""
        # The lock decides, not the number in the file: a killed supervisor leaves its number, and
        # another process may have that number by now.
        try:
            with self._lock.open("r+") as file:
                return None if _take(file) else int(file.read() or 0) or None
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def only_one(self) -> Iterator[None]:
        """Holds the lock, or exits with a sentence where another supervisor has it."""
        self.run.mkdir(exist_ok=True)
        # Opened for appending: until the lock is held, the number in the file is of another.
        with self._lock.open("a+") as file:
            if not _take(file):
                sys.exit(f"{self.path} runs already")
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def said(self) -> list[str]:
        """Returns the last sentences of the supervisor, with times."""
        return list(_read(self.state).get("said", []))

    def summary(self, rounds: int) -> dict[str, Any] | None:
        """Returns the summary of the server's run once so many rounds are done, else None."""
        content = _read(self.run / "summary.json")
        return content if content.get("final_round", 0) >= rounds else None


def spawn(command: list[str], log: IO[bytes], **more: Any) -> subprocess.Popen[bytes]:
    """Starts a process that writes to a log; the terminal's end and Ctrl-C do not reach it."""
    streams: Any = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, start_new_session=True, **streams, **more)


def _read(path: Path) -> dict[str, Any]:
    # Files of a run are written whole, but people copy folders while they run.
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def _take(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def parties(path: Path, only: Sequence[str] = ()) -> list[PartyFolder]:
    """Returns the parties in a folder, all or those named: a project's, or the one whose it is."""
    # The server comes first, so that it starts first: sites look for it again and again.
    folders = [path, path / "server", *sorted((path / "sites").glob("*"))]
    files = (ServerConfig.file, SiteConfig.file)
    found = [PartyFolder(f) for f in folders if any((f / name).exists() for name in files)]
    if not found:
        raise ConfigError(
            f"{path} is no project, nor a server's or site's folder: zorba federate init makes one"
        )
    names = [party.name for party in found]
    for name in only:
        if name not in names:
            raise ConfigError(f"there is no {name} in {path}; there is {', '.join(names)}")
    return [party for party in found if not only or party.name in only]


class Supervisor:
    """Keeps a party running until it is told to stop, or the server's rounds are done."""

    def __init__(self, party: PartyFolder) -> None:
        self._party, self._log = party, party.log.open("ab")
        self._stop = threading.Event()
        self._said: list[str] = []
        self._keeper: JobKeeper | None = None
        self._settings = ["secure_train=true", "org=zorba", "config_folder=config"]  # the engine's
        if party.is_server:
            config = ServerConfig.read(party.path)
            self._rounds = config.rounds
            self._keeper = JobKeeper(party.path, config, self._say)
        else:
            self._settings.append(f"uid={SiteConfig.read(party.path).name}")
        self._engine: subprocess.Popen[bytes] | None = None
        self._backoff = Backoff()
        self._started = self._resume = 0.0  # the engine is not started before the second

    def run(self) -> None:
        """Returns when it was told to stop, or when the rounds are done."""
        # The handler only sets a flag: the engine is ended by the thread that started it.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        try:
            # The summary is written after the last exchange: by then every site has the whole log.
            while not self._stop.is_set() and (
                self._keeper is None or self._party.summary(self._rounds) is None
            ):
                self._keep_engine()
                if self._keeper is not None:
                    self._keeper.step()
                self._stop.wait(_STEP_SECONDS)
        finally:
            if self._keeper is not None:
                self._keeper.close()
            # Whatever happened, no engine stays behind without a supervisor.
            self._end_engine()
            self._say("stopped" if self._stop.is_set() else "all rounds are done")

    def _keep_engine(self) -> None:
        """Starts the engine where it does not run."""
        now = time.monotonic()
        if self._engine is not None:
            if (code := self._engine.poll()) is None:
                return
            self._say(f"the engine ended with code {code}")
            self._engine = None
            self._resume = now + self._backoff.pause(now - self._started)
        if now < self._resume:
            return
        home, side = self._party.path / ENGINE, "server" if self._party.is_server else "client"
        if self._party.is_server:
            place_server(home)  # the folder may have been moved since the last start
        self._started = now
        module, files = f"nvflare.private.fed.app.{side}.{side}_train", f"fed_{side}.json"
        arguments = (module, "-m", str(home), "-s", files, "--set", *self._settings)
        self._engine = spawn([sys.executable, "-u", "-m", *arguments], self._log, cwd=home)
        self._say(f"started the engine, process {self._engine.pid}")

    def _end_engine(self) -> None:
        """Ends the engine and all processes that it started."""
        if self._engine is None:
            return
        # The children are listed first: without their parent they are not found any more. An engine
        # that has ended is found too, as long as nobody asked for its code.
        engine = psutil.Process(self._engine.pid)
        processes = [engine, *engine.children(recursive=True)]
        for end in (psutil.Process.terminate, psutil.Process.kill):
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    end(process)
            psutil.wait_procs(processes, _KILL_SECONDS)

    def _say(self, text: str) -> None:
        if self._said and self._said[-1].endswith(text):
            return  # nothing has changed since
        stamp = time.strftime("%H:%M:%S")
        self._log.write(f"{stamp} supervisor: {text}\n".encode())
        self._log.flush()
        self._said = [*self._said, f"{stamp} {text}"][-20:]
        write_whole(self._party.state, json.dumps({"said": self._said}) + "\n")


if __name__ == "__main__":
    this = PartyFolder(Path(sys.argv[1]))
    with this.only_one():
        Supervisor(this).run()
