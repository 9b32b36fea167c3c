"""The folders of the server and of sites, and which of them run on this machine."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zorba.apps.deploy.config import SERVER_FILE, SITE_FILE, ConfigError


class PartyFolder:
    """Files of the server or of a site.

    Attributes:
        path: of the folder.
        is_server: whether it is the server's.
        run: folder for everything that is written while it runs.
        log: of engine and supervisor.
        state: ``supervisor.json``: the supervisor's view, and its last sentences.
        lock: held while a supervisor runs; it holds the process id.
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
        # The lock decides, not the number in the file: a killed supervisor leaves its number, and
        # another process may have that number by now.
        try:
            with self.lock.open("r+") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return None
                except OSError:
                    return int(file.read() or 0) or None
        except FileNotFoundError:
            return None

    @contextmanager
    def only_one(self) -> Iterator[None]:
        """Holds the lock, or exits with a sentence where another supervisor has it."""
        self.run.mkdir(exist_ok=True)
        # Opened for appending: until the lock is held, the number in the file is of another.
        with self.lock.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                sys.exit(f"{self.path} runs already")
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def read_state(self) -> dict[str, Any]:
        """Returns what the supervisor last wrote; empty where none ever ran."""
        return read_json(self.state) or {}


def parties(path: Path, only: Sequence[str] = ()) -> list[PartyFolder]:
    """Returns the parties of a project, the server first, or the one whose folder this is.

    Args:
        path: of a project, the server's folder or a site's.
        only: names to choose: "server" and sites; all where there are none.

    Raises:
        ConfigError: there is no such folder or party.
    """
    # The server comes first, so that it starts first: sites look for it again and again.
    folders = [path, path / "server", *sorted((path / "sites").glob("*"))]
    files = (SERVER_FILE, SITE_FILE)
    found = [PartyFolder(f) for f in folders if any((f / name).exists() for name in files)]
    if not found:
        raise ConfigError(
            f"{path} is no project, nor a server's or site's folder: zorba federate init makes one"
        )
    names = [party.name for party in found]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise ConfigError(f"there is no {unknown[0]} in {path}; there is {', '.join(names)}")
    return [party for party in found if not only or party.name in only]


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the object in a file; None where it is not there, or not whole yet."""
    # Files of a run are written whole, but people copy folders while they run.
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return content


def finished(run: Path, rounds: int) -> dict[str, Any] | None:
    """Returns the summary in a run's folder where so many rounds are done, else None."""
    content = read_json(run / "summary.json")
    return content if content and content.get("final_round", 0) >= rounds else None
