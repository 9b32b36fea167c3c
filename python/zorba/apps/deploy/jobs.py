"""JobKeeper: keeps a job of the engine running while there are rounds to run.

The engine's jobs are disposable: the log holds the state, so any job continues where the last one
ended. A new job is started when there is none, after the server's machine was away for example,
and when a site is connected that has no part in the running one.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zorba.apps.deploy.backoff import Backoff
from zorba.apps.deploy.config import ServerConfig
from zorba.apps.deploy.provision import ADMIN, ADMIN_NAME, CLASSES

ASK_SECONDS = 0.05
"""How often a site asks for work: most of what a round costs besides the measuring."""

_CONNECT_SECONDS = 5.0
_GATHER_SECONDS = 20.0  # how long the first job waits for sites beyond the quorum
_GONE_LOOKS = 3  # in a row: a job that starts or ends just now has no process either
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
        self._folder = folder
        self._config = config
        self._say = say
        self._session: Any = None
        self._backoff = Backoff(first=1.0)
        self._resume = 0.0  # no job is submitted before that
        self._submitted = 0.0
        self._connected_since = 0.0
        self._outside: set[str] = set()  # connected sites without a part in the job
        self._gone = 0
        self._ended: set[str] = set()  # jobs; the engine may still believe that they run
        self._problem = ""
        self.connected: list[str] = []
        self.job = ""

    def step(self) -> None:
        """Looks at the engine once, and does what is needed."""
        try:
            self._look()
        except Exception as error:  # the engine is away, or still starting: looked at again later
            # A session does not recover from a lost connection, so the next look makes a new one.
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
        # Forgotten first: a session that cannot even be closed is not used again.
        session, self._session = self._session, None
        if session is not None:
            with contextlib.suppress(Exception):
                session.close()

    def _look(self) -> None:
        session = self._session = self._session or self._connect()
        info = session.get_system_info()
        connected = sorted(c.name for c in info.client_info if c.name in self._config.sites)
        if connected != self.connected:
            self._say(f"connected: {', '.join(connected) or 'no site'}")
            self.connected = connected
            self._connected_since = time.monotonic()
        status = self._status(session)
        if status == "RUNNING" and self._is_gone({job.job_id for job in info.job_info}):
            status = "its process is gone"
        if status == "RUNNING":
            self._replace_job_of_few(session)
        elif status not in _ACTIVE:
            if self.job:
                self._note_end(status)
            if self._may_submit():
                self._submit(session)

    def _connect(self) -> Any:
        from nvflare.fuel.flare_api.flare_api import new_secure_session

        kit = str(self._folder / ADMIN)
        return new_secure_session(ADMIN_NAME, kit, timeout=_CONNECT_SECONDS)

    def _status(self, session: Any) -> str:
        """Returns the status of the job, or of one that an earlier keeper left running."""
        if self.job:
            return str(session.get_job_status(self.job))
        # A supervisor that was killed left its job running: it is taken over.
        for job in session.list_jobs():
            if job.get("status") in _ACTIVE and job["job_id"] not in self._ended:
                self.job = job["job_id"]
                return str(job["status"])
        return ""

    def _is_gone(self, running: set[str]) -> bool:
        """Whether a job that is said to run has no process: its engine was killed."""
        self._gone = 0 if self.job in running else self._gone + 1
        return self._gone >= _GONE_LOOKS

    def _note_end(self, status: str) -> None:
        self._say(f"the engine's job ended: {status}")
        now = time.monotonic()
        # A job that ends at once, for a full disk say, must not be started twice a second.
        self._resume = now + self._backoff.pause(now - self._submitted)
        self._ended.add(self.job)
        self.job, self._gone = "", 0

    def _may_submit(self) -> bool:
        count, sites = len(self.connected), len(self._config.sites)
        now = time.monotonic()
        if count < (self._config.quorum or sites) or now < self._resume:
            return False
        # With a quorum the others get a while to come: a later site costs a new job.
        return count == sites or now - self._connected_since > _GATHER_SECONDS

    def _submit(self, session: Any) -> None:
        folder = self._folder / "run" / "job"
        write_job(folder, self._config)
        self.job = session.submit_job(str(folder))
        self._submitted = time.monotonic()
        self._outside = set()
        self._say(f"started the engine's job {self.job}")

    def _replace_job_of_few(self, session: Any) -> None:
        """Ends a job that a connected site is not in: the next one has it."""
        if time.monotonic() - self._submitted < self._config.rejoin_seconds:
            return
        busy = {
            entry["client_name"]
            for entry in session.get_client_job_status() or []
            if entry.get("job_id") == self.job
        }
        # Twice in a row: a site that was just told of the job has not started it yet.
        outside = {name for name in self.connected if name not in busy}
        lasting = sorted(outside & self._outside)
        self._outside = outside
        if lasting:
            self._say(f"{', '.join(lasting)} came back: starting the engine's job again")
            self._submitted = time.monotonic()  # that job has time to end
            session.abort_job(self.job)


def write_job(folder: Path, config: ServerConfig) -> None:
    """Writes the engine's job: names of classes that every party has, no code and no settings."""
    shutil.rmtree(folder, ignore_errors=True)
    inner = folder / "app" / "config"
    inner.mkdir(parents=True)
    files: dict[Path, dict[str, Any]] = {
        folder / "meta.json": {
            "name": config.job,
            "resource_spec": {},
            # The rounds have a quorum of their own: the engine ends no job for a site that is away.
            "min_sites": 1,
            "deploy_map": {"app": ["@ALL"]},
        },
        inner / "config_fed_server.json": {
            "format_version": 2,
            "server": {"task_request_interval": ASK_SECONDS},
            "workflows": [{"id": "federation", "path": CLASSES["controller"]}],
        },
        inner / "config_fed_client.json": {
            "format_version": 2,
            # No arguments: a site takes its settings from its own file alone.
            "executors": [{"tasks": ["zorba"], "executor": {"path": CLASSES["executor"]}}],
            # A server that is killed leaves the questions of its sites without an answer.
            "get_task_timeout": config.ask_timeout,
            "submit_task_result_timeout": config.ask_timeout,
            "task_check_interval": 0.5,
        },
    }
    for path, content in files.items():
        path.write_text(json.dumps(content, indent=2) + "\n")
