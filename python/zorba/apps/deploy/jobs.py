"""JobKeeper: keeps a job of the engine running while there are rounds to run.

The engine's jobs are disposable: the log holds the state, so any job continues where the last one
ended. A new one starts when there is none, and for a site that has no part in the running one.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zorba.apps.deploy.config import ServerConfig
from zorba.apps.deploy.provision import ADMIN, ADMIN_NAME, CONTROLLER, EXECUTOR, write_json

ASK_SECONDS = 0.05  # between a site's questions: most of what a round costs beside the measuring
_CONNECT_SECONDS = 5.0
_GATHER_SECONDS = 20.0  # how long the first job waits for sites beyond the quorum
_GONE_LOOKS = 3  # in a row: a job that starts or ends just now has no process either
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
_ACTIVE = ("SUBMITTED", "APPROVED", "DISPATCHED", "RUNNING")


class Backoff:
    """Pauses between starts that double up to a minute: what dies at once leaves cores free."""

    _next = _FIRST_PAUSE

    def pause(self, lasted: float) -> float:
        """Returns the seconds to wait, given how long the last start lasted."""
        if lasted > _LONGEST_PAUSE:  # it had recovered
            self._next = _FIRST_PAUSE
        pause, self._next = self._next, min(2 * self._next, _LONGEST_PAUSE)
        return pause


class JobKeeper:
    """Submits, watches and replaces the engine's job; ``step`` is called again and again."""

    def __init__(self, folder: Path, config: ServerConfig, say: Callable[[str], None]) -> None:
        self._folder, self._config, self._say = folder, config, say
        self._session: Any = None
        self._backoff = Backoff()
        self._submitted = self._resume = 0.0  # no job is submitted before the second
        self._connected: list[str] = []
        self._connected_since = 0.0
        self._job = ""  # its id in the engine; empty where there is none
        self._outside: set[str] = set()  # connected sites without a part in the job
        self._gone = 0  # looks in a row at which it had no process
        self._ended: set[str] = set()  # jobs; the engine may still believe that they run

    def step(self) -> None:
        """Looks at the engine once, and does what is needed."""
        try:
            self._look()
        except Exception as error:  # the engine is away, or still starting: looked at again later
            # A session does not recover from a lost connection, so the next look makes a new one.
            self.close()
            self._connected = []
            self._say(f"cannot reach the engine: {type(error).__name__}: {error}")

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
        now = time.monotonic()
        if connected != self._connected:
            self._say(f"connected: {', '.join(connected) or 'no site'}")
            self._connected, self._connected_since = connected, now
        statuses = {job["job_id"]: job.get("status", "") for job in session.list_jobs()}
        if not self._job:
            # A supervisor that was killed left its job running: it is taken over.
            active = [job for job, status in statuses.items() if status in _ACTIVE]
            self._job = next((job for job in active if job not in self._ended), "")
        status = statuses.get(self._job, "it is unknown")
        # A job that is said to run without a process: its engine was killed.
        lost = status == "RUNNING" and self._job not in {job.job_id for job in info.job_info}
        self._gone = self._gone + 1 if lost else 0
        if self._job and (status not in _ACTIVE or self._gone >= _GONE_LOOKS):
            self._say(f"the engine's job ended: {'its process is gone' if lost else status}")
            # A job that ends at once, for a full disk say, must not be started twice a second.
            self._resume = now + self._backoff.pause(now - self._submitted)
            self._ended.add(self._job)
            self._job, self._gone = "", 0
        if self._job and status == "RUNNING":
            self._replace_job_of_few(session)
        elif not self._job and now >= self._resume and self._enough():
            folder = self._folder / "run" / "job"
            write_job(folder, self._config)
            self._job = session.submit_job(str(folder))
            self._submitted, self._outside = now, set()
            self._say(f"started the engine's job {self._job}")

    def _connect(self) -> Any:
        from nvflare.fuel.flare_api.flare_api import new_secure_session

        return new_secure_session(ADMIN_NAME, str(self._folder / ADMIN), timeout=_CONNECT_SECONDS)

    def _enough(self) -> bool:
        count, sites = len(self._connected), len(self._config.sites)
        # With a quorum the others get a while to come: a later site costs a new job.
        waited = time.monotonic() - self._connected_since > _GATHER_SECONDS
        return count == sites or (waited and count >= (self._config.quorum or sites))

    def _replace_job_of_few(self, session: Any) -> None:
        """Ends a job that a connected site is not in: the next one has it."""
        if time.monotonic() - self._submitted < self._config.rejoin_seconds:
            return
        jobs = session.get_client_job_status() or []
        busy = {job["client_name"] for job in jobs if job.get("job_id") == self._job}
        before, self._outside = self._outside, set(self._connected) - busy
        # Twice in a row: a site that was just told of the job has not started it yet.
        if lasting := sorted(before & self._outside):
            self._say(f"{', '.join(lasting)} came back: starting the engine's job again")
            self._submitted = time.monotonic()  # that job has time to end
            session.abort_job(self._job)


def write_job(folder: Path, config: ServerConfig) -> None:
    """Writes the engine's job: names of classes that every party has, no code and no settings."""
    shutil.rmtree(folder, ignore_errors=True)
    inner = folder / "app" / "config"
    inner.mkdir(parents=True)
    # The rounds have a quorum of their own: the engine ends no job for a site that is away.
    meta = {"name": config.job, "resource_spec": {}, "min_sites": 1}
    write_json(folder / "meta.json", {**meta, "deploy_map": {"app": ["@ALL"]}})
    server = {
        "format_version": 2,
        "server": {"task_request_interval": ASK_SECONDS},
        "workflows": [{"id": "federation", "path": CONTROLLER}],
    }
    site = {
        "format_version": 2,
        # No arguments: a site takes its settings from its own file alone.
        "executors": [{"tasks": ["zorba"], "executor": {"path": EXECUTOR}}],
        # A server that is killed leaves the questions of its sites without an answer.
        **dict.fromkeys(("get_task_timeout", "submit_task_result_timeout"), config.ask_timeout),
        "task_check_interval": 0.5,
    }
    write_json(inner / "config_fed_server.json", server)
    write_json(inner / "config_fed_client.json", site)
