"""The engine's process of a party, and the processes that it starts."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import psutil

from zorba.apps.deploy.provision import ENGINE, settle

_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 60.0
_KILL_SECONDS = 5.0


class EngineProcess:
    """Keeps the engine of the server or of a site running.

    Args:
        folder: of the party, with the engine's folder in it.
        site: name of the site; None for the server.
        log: where it writes what it has to say.

    Attributes:
        starts: how often it was started.
        code: that its last process ended with; None before one did.
    """

    def __init__(self, folder: Path, site: str | None, log: IO[bytes]) -> None:
        self._home = (folder / ENGINE).resolve()
        self._site = site
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._pause = _FIRST_PAUSE
        self._started = 0.0
        self.starts = 0
        self.code: int | None = None

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        return None if self._process is None else self._process.pid

    def step(self) -> None:
        """Starts the process where there is none, after a pause that grows with each failure."""
        now = time.monotonic()
        if self._process is not None:
            self.code = self._process.poll()
            if self.code is None:
                return
            self._process = None
            if now - self._started > _LONGEST_PAUSE:
                self._pause = _FIRST_PAUSE
        if self.starts and now - self._started < self._pause:
            return
        self._pause = min(2 * self._pause, _LONGEST_PAUSE) if self.starts else self._pause
        self._started = now
        self.starts += 1
        if self._site is None:
            settle(self._home)
        self._process = subprocess.Popen(
            self._command(),
            cwd=self._home,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def stop(self) -> None:
        """Ends the process and all that it started."""
        if self._process is None:
            return
        processes = []
        try:
            engine = psutil.Process(self._process.pid)
            processes = [engine, *engine.children(recursive=True)]
        except psutil.NoSuchProcess:
            pass
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, left = psutil.wait_procs(processes, _KILL_SECONDS)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._process = None

    def _command(self) -> list[str]:
        common = ["--set", "secure_train=true", "org=zorba", "config_folder=config"]
        python = [sys.executable, "-u", "-m"]
        if self._site is None:
            module, settings = "nvflare.private.fed.app.server.server_train", "fed_server.json"
            return [*python, module, "-m", str(self._home), "-s", settings, *common]
        module, settings = "nvflare.private.fed.app.client.client_train", "fed_client.json"
        mine = [*common, f"uid={self._site}"]
        return [*python, module, "-m", str(self._home), "-s", settings, *mine]
