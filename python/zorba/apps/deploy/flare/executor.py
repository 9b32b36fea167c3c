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

    It takes no arguments from the engine's job: model, data and prompt are in ``site.yaml``, in the
    folder above the engine's. A site whose files are wrong stays in the job, and answers every
    message with the problem, so that the others go on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._client: Client | None = None
        self._problem = "the site has not started"

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Loads the client at the start, and saves its replica at the end."""
        if event_type == EventType.START_RUN:
            # Before the first message: loading a model may take longer than a round waits.
            self._start(fl_ctx)
        elif event_type == EventType.END_RUN and self._client is not None:
            try:
                self._client.save()
            except (FederationError, OSError) as error:
                self.log_error(fl_ctx, f"the last checkpoint was not written: {error}")

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Answers one message; called by the engine."""
        frame = shareable.get(FRAME)
        if self._client is None:
            return _reply(PROBLEM, self._problem)
        if not isinstance(frame, bytes):
            return _reply(PROBLEM, "the task holds no message")
        try:
            return _reply(FRAME, self._client.handle(frame))
        except FederationError as error:
            self.log_warning(fl_ctx, str(error))
            return _reply(PROBLEM, str(error))
        except Exception as error:
            # The text of any other error might quote the site's data: the server is told its kind
            # alone, and the site's own log has the rest.
            self.log_exception(fl_ctx, f"the message was not answered: {error}")
            return _reply(PROBLEM, f"{type(error).__name__}; the site's log tells more")

    def _start(self, fl_ctx: FLContext) -> None:
        folder = Path(fl_ctx.get_engine().get_workspace().get_root_dir()).resolve().parent
        try:
            self._client = build_client(folder)
        except FederationError as error:
            self._problem = str(error)
            self.log_error(fl_ctx, self._problem)
        except Exception as error:  # as above
            self._problem = f"the site cannot start: {type(error).__name__}; its log tells more"
            self.log_exception(fl_ctx, f"the site cannot start: {error}")


def _reply(key: str, value: bytes | str) -> Shareable:
    reply = make_reply(ReturnCode.OK)  # for a problem too: other codes may end the engine's job
    reply[key] = value[:_MAX_TEXT] if isinstance(value, str) else value
    return reply
