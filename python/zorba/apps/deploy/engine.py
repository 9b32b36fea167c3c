"""What the engine runs of ours: the server as a controller, a site's client as an executor.

Messages are tasks of the engine, which sites ask for and answer. Neither class takes arguments from
the engine's job: settings and log are in the folder above the engine's, whatever the job.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nvflare.apis.controller_spec import Task
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from zorba.apps.deploy.build import build_client, build_server
from zorba.apps.deploy.config import ServerConfig
from zorba.apps.watch.state import Follower
from zorba.federated import Client, FederationError, RunFolder, RunRecorder, run_federation

FRAME = "frame"  # key of a message's bytes in a task and in its result
PROBLEM = "problem"  # key of the sentence that a site sends where it has no answer
_CHECK_SECONDS = 0.05  # how often the engine clears tasks that are done
_WAKE_SECONDS = 1.0  # between two looks at whether the engine wants the run to stop


class RunStoppedError(FederationError):
    """The engine was asked to stop the run; the log has all rounds that ended."""


class FederationController(Controller):  # type: ignore[misc]
    """Runs the rounds that are left of a job, and is their ``Transport``.

    A site can be reached from when it asks for work until it misses a deadline.
    """

    def __init__(self) -> None:
        super().__init__(task_check_period=_CHECK_SECONDS)
        self._here: set[str] = set()
        # Guards all that the engine's threads change, and wakes the thread of the rounds.
        self._changed = threading.Condition()

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Called by the engine, as ``stop_controller``; the work is in ``control_flow``."""

    stop_controller = start_controller

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Runs the rounds; called by the engine in a thread of its own."""
        folder = _folder(fl_ctx)
        # Read anew by every job of the engine: an edited file counts from the next start on.
        self._config = config = ServerConfig.read(folder)
        self._abort, self._context = abort_signal, fl_ctx
        run = RunFolder(folder / "run")
        server = build_server(config, run)
        try:
            # A server that was killed after the last round has only the last exchange to do.
            rounds = max(0, config.rounds - server.log.last)
            with RunRecorder(run, server, rounds) as recorder:
                result = run_federation(server, self, rounds, recorder.round, None, config.timeout)
                recorder.end(result)
            # The supervisor waits for this file: by now every site has the whole log.
            run.write_summary(summarise(run))
        except RunStoppedError:
            self.log_info(fl_ctx, "the run was stopped; it continues where the log ends")
        finally:
            server.close()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Follows which sites are there; called from the engine's threads."""
        super().handle_event(event_type, fl_ctx)
        if event_type == EventType.BEFORE_PROCESS_TASK_REQUEST:
            peer = fl_ctx.get_peer_context()
            # Twenty times a second for each site: not worth the lock.
            if peer is not None and peer.get_identity_name() not in self._here:
                with self._changed:
                    self._here.add(peer.get_identity_name())
                    self._changed.notify_all()
        elif event_type == EventType.CLIENT_DISCONNECTED:
            with self._changed:
                self._here.discard(fl_ctx.get_prop(FLContextKey.DISCONNECTED_CLIENT_NAME))

    def nodes(self) -> Sequence[str]:
        """Returns the sites that can be reached, once they are a quorum; or RunStoppedError."""
        sites = self._config.sites.keys()
        with self._changed:
            # No deadline: a round with too few sites would only be spent.
            quorum = self._config.quorum or len(sites)
            self._wait_for(lambda: len(self._here & sites) >= quorum, None)
            return sorted(self._here & sites)

    def exchange(
        self, plans: Mapping[str, bytes], timeout: float | None = None
    ) -> tuple[dict[str, bytes], dict[str, str]]:
        """See ``Transport``; a site that comes back in time gets its message again."""
        replies, failures = dict[str, bytes](), dict[str, str]()

        def received(site: str, client_task: Any, fl_ctx: Any) -> None:
            result = client_task.result
            frame, problem = result.get(FRAME), result.get(PROBLEM)
            with self._changed:
                # The first answer counts: after the deadline its site is among the failures.
                if site in replies or site in failures:
                    return
                if isinstance(frame, bytes):
                    replies[site] = frame
                elif isinstance(problem, str):
                    failures[site] = problem
                else:
                    failures[site] = f"the site's engine answered {result.get_return_code()}"
                self._changed.notify_all()

        tasks = []
        for site, frame in plans.items():
            data, answered = Shareable({FRAME: bytes(frame)}), partial(received, site)
            tasks.append(Task("zorba", data=data, result_received_cb=answered))
            self.send(tasks[-1], self._context, [site])
        # This machine's monotonic clock: no clock that jumps, here or on a site, ends a round.
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            with self._changed:
                self._wait_for(lambda: len(replies) + len(failures) == len(plans), deadline)
                for site in plans.keys() - replies.keys() - failures.keys():
                    failures[site] = f"no answer within {timeout:.3g} s"
                    self._here.discard(site)
                return dict(replies), dict(failures)
        finally:
            for task in tasks:
                if task.completion_status is None:
                    self.cancel_task(task)

    def process_result_of_unknown_task(
        self, client: Any, task_name: str, client_task_id: str, result: Any, fl_ctx: FLContext
    ) -> None:
        """Drops an answer that came after its round."""
        self.log_warning(fl_ctx, f"{client.name} answered too late; the answer was dropped")

    def _wait_for(self, reached: Callable[[], bool], deadline: float | None) -> None:
        """Waits, with the lock held, until something is reached or the deadline has passed."""
        while not reached():
            if self._abort.triggered:
                raise RunStoppedError("the run was stopped")
            left = _WAKE_SECONDS if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return
            self._changed.wait(min(left, _WAKE_SECONDS))


def _folder(fl_ctx: FLContext) -> Path:
    """Returns the party's folder, in which the engine's is."""
    return Path(fl_ctx.get_engine().get_workspace().get_root_dir()).resolve().parent


def summarise(run: RunFolder) -> dict[str, Any]:
    """Returns the content of ``summary.json``, over all starts of the server."""
    state = Follower(run.events).update()
    told = {"replicas_identical", "fingerprints", "failures", "privacy"}
    counts = ("rounds_measured", "rounds_failed")
    return {
        "job": state.job,
        "final_round": state.round,
        **(state.end.model_dump(include=told) if state.end else {}),
        "server_starts": len(state.starts),
        "round_seconds": sum(r.seconds for r in state.rounds) / max(1, len(state.rounds)),
        "sites": {s: {n: getattr(c, n) for n in counts} for s, c in state.clients.items()},
        "settings": state.settings,
        "machine": state.machine,
    }


class SiteExecutor(Executor):  # type: ignore[misc]
    """Answers messages with those of the site's client, which stays loaded between them.

    A site whose files are wrong answers with the problem instead, so that the others go on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._client: Client | None = None
        self._problem = "the site has not started"

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Loads the client at the start, and saves its replica at the end."""
        if event_type == EventType.START_RUN:
            # Before the first message: loading a model may take longer than a round waits.
            try:
                self._client = build_client(_folder(fl_ctx))
            except Exception as error:
                self._problem = self._told("the site cannot start", error, fl_ctx)
        elif event_type == EventType.END_RUN and self._client is not None:
            try:
                self._client.save()
            except (FederationError, OSError) as error:
                self.log_error(fl_ctx, f"the last checkpoint was not written: {error}")

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Answers one message; called by the engine."""
        reply = make_reply(ReturnCode.OK)  # for a problem too: others may end the engine's job
        try:
            if self._client is None:
                reply[PROBLEM] = self._problem[:500]
            else:
                reply[FRAME] = self._client.handle(shareable.get(FRAME))
        except Exception as error:
            reply[PROBLEM] = self._told("the message was not answered", error, fl_ctx)[:500]
        return reply

    def _told(self, what: str, error: Exception, fl_ctx: FLContext) -> str:
        """Logs an error, and returns what the server is told of it."""
        if isinstance(error, FederationError):
            self.log_warning(fl_ctx, f"{what}: {error}")
            return str(error)
        self.log_exception(fl_ctx, f"{what}: {error}")
        # The text of any other error might quote the site's data: the server is told its kind
        # alone, and the site's own log has the rest.
        return f"{what}: {type(error).__name__}; its log tells more"
