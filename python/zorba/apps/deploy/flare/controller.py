"""FederationController: the server, as a workflow of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.signal import Signal

from zorba.apps.deploy.build import build_server
from zorba.apps.deploy.config import ServerConfig
from zorba.apps.deploy.flare.transport import RunStoppedError, TaskTransport
from zorba.apps.deploy.summary import summarise
from zorba.apps.watch import Follower
from zorba.federated import RunFolder, RunRecorder, run_federation

_CHECK_SECONDS = 0.05  # how often the engine clears tasks that are done


class FederationController(Controller):  # type: ignore[misc]
    """Runs the rounds that are left of a job.

    It takes no arguments from the engine's job: its settings are in ``server.yaml``, in the folder
    above the engine's. The log is in that folder as well, so it does not matter which of the
    engine's jobs wrote a round.
    """

    def __init__(self) -> None:
        super().__init__(task_check_period=_CHECK_SECONDS)
        # Set while rounds run: sites ask for work before and after that as well.
        self._transport: TaskTransport | None = None

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Called by the engine; nothing is needed before ``control_flow``."""

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Called by the engine at the end."""

    def process_result_of_unknown_task(
        self, client: Any, task_name: str, client_task_id: str, result: Any, fl_ctx: FLContext
    ) -> None:
        """Drops an answer that came after its round."""
        self.log_warning(fl_ctx, f"{client.name} answered too late; the answer was dropped")

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Follows which sites are there."""
        super().handle_event(event_type, fl_ctx)
        if self._transport is None:
            return
        if event_type == EventType.BEFORE_PROCESS_TASK_REQUEST:
            peer = fl_ctx.get_peer_context()
            if peer is not None:
                self._transport.heard(peer.get_identity_name())
        elif event_type == EventType.CLIENT_DISCONNECTED:
            self._transport.lost(fl_ctx.get_prop(FLContextKey.DISCONNECTED_CLIENT_NAME))

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Runs the rounds; called by the engine in a thread of its own."""
        folder = Path(fl_ctx.get_engine().get_workspace().get_root_dir()).resolve().parent
        # Read anew by every job of the engine: an edited file counts from the next start on.
        config = ServerConfig.read(folder)
        run = RunFolder(folder / "run")
        server = build_server(config, run)
        quorum = config.quorum or len(config.sites)
        try:
            self._transport = TaskTransport(self, fl_ctx, abort_signal, config.sites, quorum)
            # A server that was killed after the last round has only the last exchange to do.
            rounds = max(0, config.rounds - server.log.last)
            with RunRecorder(run, server, rounds) as recorder:
                result = run_federation(
                    server, self._transport, rounds, recorder.round, timeout=config.timeout
                )
                recorder.end(result)
            # The supervisor waits for this file: by now every site has the whole log.
            run.write_summary(summarise(Follower(run.events).update()))
        except RunStoppedError:
            self.log_info(fl_ctx, "the run was stopped; it continues where the log ends")
        finally:
            self._transport = None
            server.close()
