"""SiteExecutor: a site's client, which stays loaded between the engine's tasks."""

from __future__ import annotations

from pathlib import Path

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from zorba.apps.deploy.build import build_client
from zorba.apps.deploy.flare.transport import FRAME, PROBLEM
from zorba.federated import Client, FederationError

_MAX_TEXT = 500


class SiteExecutor(Executor):  # type: ignore[misc]
    """Answers the server's messages with those of the site's client.

    It takes no arguments from the job: model, data and prompt stand in ``site.yaml``, in the folder
    above the engine's. A site whose files are wrong stays in the job, and says what is wrong to
    every message, so that the others go on. Of an error that is not the federation's own only the
    kind is told to the server: its text might quote the site's data. The site's log has it all.
    """

    def __init__(self) -> None:
        super().__init__()
        self._client: Client | None = None
        self._problem = "the site has not started"

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Loads the client at the start, and saves its replica at the end."""
        if event_type == EventType.START_RUN:
            self._start(fl_ctx)
        elif event_type == EventType.END_RUN and self._client is not None:
            self._save(self._client, fl_ctx)

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Answers one message; called by the engine."""
        frame = shareable.get(FRAME)
        if self._client is None:
            return self._refuse(self._problem)
        if not isinstance(frame, bytes):
            return self._refuse("the task holds no message")
        try:
            answer = self._client.handle(frame)
        except FederationError as error:
            self.log_warning(fl_ctx, str(error))
            return self._refuse(str(error))
        except Exception as error:
            self.log_exception(fl_ctx, f"the message was not answered: {error}")
            return self._refuse(f"{type(error).__name__}; the site's log tells more")
        reply = make_reply(ReturnCode.OK)
        reply[FRAME] = answer
        return reply

    def _start(self, fl_ctx: FLContext) -> None:
        folder = Path(fl_ctx.get_engine().get_workspace().get_root_dir()).resolve().parent
        try:
            self._client = build_client(folder)
        except FederationError as error:
            self._problem = str(error)
            self.log_error(fl_ctx, self._problem)
        except Exception as error:
            self._problem = f"the site cannot start: {type(error).__name__}; its log tells more"
            self.log_exception(fl_ctx, f"the site cannot start: {error}")

    def _save(self, client: Client, fl_ctx: FLContext) -> None:
        try:
            client.save()
        except (FederationError, OSError) as error:
            self.log_error(fl_ctx, f"the last checkpoint was not written: {error}")

    @staticmethod
    def _refuse(problem: str) -> Shareable:
        reply = make_reply(ReturnCode.OK)  # the engine's codes may end its job
        reply[PROBLEM] = problem[:_MAX_TEXT]
        return reply
