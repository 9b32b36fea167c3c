"""JobKeeper: sees to it that the engine runs a job for as long as there are rounds to run.

The engine's jobs are disposable: the log holds the state, so any job continues where the last one
ended. A new one is started when there is none, after the server's machine was away for example,
and when a site is connected that has no part in the one that runs.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zorba.apps.deploy.config import ServerConfig
from zorba.apps.deploy.provision import ADMIN, ADMIN_NAME

ASK_SECONDS = 0.05
"""How often a site asks for work: most of what a round costs besides the measuring."""

_CONNECT_SECONDS = 5.0
_GATHER_SECONDS = 20.0  # how long the first job waits for sites beyond the quorum
_LONGEST_PAUSE = 60.0
_GONE_LOOKS = 3  # in a row, so that a job which starts or ends now is not mistaken for one
_ACTIVE = ("SUBMITTED", "APPROVED", "DISPATCHED", "RUNNING")


class JobKeeper:
    """Submits, watches and replaces the engine's job; ``step`` is called again and again.

    Args:
        folder: of the server.
        config: of the server.
        say: takes a sentence for people, where something changes.

    Attributes:
        connected: names of the sites that the engine has a connection to.
        job: id of the engine's job; empty where there is none.
    """

    def __init__(self, folder: Path, config: ServerConfig, say: Callable[[str], None]) -> None:
        self._folder = folder.resolve()
        self._config = config
        self._say = say
        self._session: Any = None
        self._submitted = 0.0
        self._connected_since = 0.0
        self._pause = 0.0
        self._apart: set[str] = set()
        self._gone = 0
        self._ended: set[str] = set()  # the engine may still believe that they run
        self._problem = ""
        self.connected: list[str] = []
        self.job = ""

    def step(self) -> None:
        """Looks at the engine once, and does what is needed."""
        try:
            self._look()
        except Exception as error:  # the engine is away, or still starting: looked at again later
            self.close()
            self.connected = []
            problem = f"cannot reach the engine: {type(error).__name__}: {error}"
            if problem != self._problem:
                self._say(problem)
                self._problem = problem
        else:
            self._problem = ""

    def close(self) -> None:
        """Ends the session with the engine; its job goes on."""
        session, self._session = self._session, None
        if session is not None:
            with contextlib.suppress(Exception):
                session.close()

    def _look(self) -> None:
        session = self._session or self._connect()
        info = session.get_system_info()
        connected = sorted(c.name for c in info.client_info if c.name in self._config.sites)
        if connected != self.connected:
            self._say(f"connected: {', '.join(connected) or 'no site'}")
            self.connected = connected
            self._connected_since = time.monotonic()
        status = self._status(session)
        if status == "RUNNING" and self._is_gone({job.job_id for job in info.job_info}):
            status = "its process is gone"
        if status in _ACTIVE:
            if status == "RUNNING":
                self._look_for_sites_apart(session)
            return
        if self.job:
            self._say(f"the engine's job ended: {status}")
            lasted = time.monotonic() - self._submitted
            self._pause = (
                1.0 if lasted > _LONGEST_PAUSE else min(2 * self._pause + 1, _LONGEST_PAUSE)
            )
            self._ended.add(self.job)
            self.job, self._gone = "", 0
        if self._may_submit():
            self._submit(session)

    def _connect(self) -> Any:
        from nvflare.fuel.flare_api.flare_api import new_secure_session

        self._session = new_secure_session(
            ADMIN_NAME, str(self._folder / ADMIN), timeout=_CONNECT_SECONDS
        )
        return self._session

    def _status(self, session: Any) -> str:
        """Returns the status of the job, or of one that an earlier keeper left running."""
        if not self.job:
            for job in session.list_jobs():
                if job.get("status") in _ACTIVE and job["job_id"] not in self._ended:
                    self.job = job["job_id"]
                    return str(job["status"])
            return ""
        return str(session.get_job_status(self.job))

    def _is_gone(self, running: set[str]) -> bool:
        """Whether a job that is said to run has no process: its engine was killed."""
        self._gone = 0 if self.job in running else self._gone + 1
        return self._gone >= _GONE_LOOKS

    def _may_submit(self) -> bool:
        quorum = self._config.quorum or len(self._config.sites)
        now = time.monotonic()
        if len(self.connected) < quorum or now - self._submitted < self._pause:
            return False
        all_there = len(self.connected) == len(self._config.sites)
        return all_there or now - self._connected_since > _GATHER_SECONDS

    def _submit(self, session: Any) -> None:
        self.job = session.submit_job(str(self._write_job()))
        self._submitted = time.monotonic()
        self._apart = set()
        self._say(f"started the engine's job {self.job}")

    def _look_for_sites_apart(self, session: Any) -> None:
        """Ends a job that a connected site is not in: the next one has it."""
        if time.monotonic() - self._submitted < self._config.rejoin_seconds:
            return
        busy = {
            entry["client_name"]
            for entry in session.get_client_job_status() or []
            if entry.get("job_id") == self.job
        }
        apart = {name for name in self.connected if name not in busy}
        lasting = sorted(apart & self._apart)
        self._apart = apart
        if lasting:
            self._say(f"{', '.join(lasting)} came back: starting the engine's job again")
            self._submitted = time.monotonic()  # that job has time to end
            session.abort_job(self.job)

    def _write_job(self) -> Path:
        """Writes the job: names of classes that every party has, and how often to ask for work."""
        folder = self._folder / "run" / "job"
        shutil.rmtree(folder, ignore_errors=True)
        config = folder / "app" / "config"
        config.mkdir(parents=True)
        flare = "zorba.apps.deploy.flare"
        files = {
            folder / "meta.json": {
                "name": self._config.job,
                "resource_spec": {},
                "min_sites": 1,
                "deploy_map": {"app": ["@ALL"]},
            },
            config / "config_fed_server.json": {
                "format_version": 2,
                "server": {"task_request_interval": ASK_SECONDS},
                "workflows": [
                    {"id": "federation", "path": f"{flare}.controller.FederationController"}
                ],
            },
            config / "config_fed_client.json": {
                "format_version": 2,
                "executors": [
                    {"tasks": ["zorba"], "executor": {"path": f"{flare}.executor.SiteExecutor"}}
                ],
                # A server that is killed leaves what was asked of it without an answer.
                "get_task_timeout": self._config.ask_timeout,
                "submit_task_result_timeout": self._config.ask_timeout,
                "task_check_interval": 0.5,
            },
        }
        for path, content in files.items():
            path.write_text(json.dumps(content, indent=2) + "\n")
        return folder
