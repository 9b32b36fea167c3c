"""Starts the engine's job processes, and starts one again that was killed.

The engine ends a job for all sites when the process of one was killed. But a site continues from
its checkpoint and the server from its log, so here a killed process is started again, into the
same job, and the others notice no more than a slow round.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from nvflare.apis.job_launcher_spec import JobHandleSpec
from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher
from nvflare.app_common.job_launcher.server_process_launcher import ServerProcessJobLauncher

from zorba.apps.deploy.backoff import Backoff

_FIRST_PAUSE = 0.5
_log = logging.getLogger(__name__)


class RestartingHandle(JobHandleSpec):  # type: ignore[misc]
    """A job process that is started again whenever a signal ended it.

    A process that exits by itself, with whatever code, has ended.

    Args:
        start: starts the process and returns the engine's handle of it.
    """

    def __init__(self, start: Callable[[], Any]) -> None:
        super().__init__()
        self._start = start
        self._lock = threading.Lock()
        self._terminated = threading.Event()
        self._handle = start()

    def terminate(self) -> None:
        """Kills the process for good."""
        # In this order, so that ``wait`` does not start the process again.
        self._terminated.set()
        with self._lock:
            self._handle.terminate()

    def poll(self) -> Any:
        """Returns the engine's code of the process as it is now."""
        return self._handle.poll()

    def wait(self) -> None:
        """Returns when the process has ended for good."""
        backoff = Backoff(_FIRST_PAUSE)
        while True:
            started = time.monotonic()
            self._handle.wait()
            # The engine's own code does not tell a signal from a failure: this is the process's.
            code = self._handle.adapter.poll()
            if code is None or code >= 0:
                return
            _log.warning("the job process was ended by signal %d; starting it again", -code)
            if self._terminated.wait(backoff.pause(time.monotonic() - started)):
                return
            with self._lock:
                # ``terminate`` may have come in between, and has the old process only.
                if self._terminated.is_set():
                    return
                self._handle = self._start()


class SiteLauncher(ClientProcessJobLauncher):  # type: ignore[misc]
    """Launches the process that holds a site's client."""

    def launch_job(self, job_meta: dict[str, Any], fl_ctx: Any) -> RestartingHandle:
        """Starts the process; called by the engine."""
        launch = super().launch_job
        return RestartingHandle(lambda: launch(job_meta, fl_ctx))


class ServerLauncher(ServerProcessJobLauncher):  # type: ignore[misc]
    """Launches the process that holds the server."""

    def launch_job(self, job_meta: dict[str, Any], fl_ctx: Any) -> RestartingHandle:
        """Starts the process; called by the engine."""
        launch = super().launch_job
        return RestartingHandle(lambda: launch(job_meta, fl_ctx))
