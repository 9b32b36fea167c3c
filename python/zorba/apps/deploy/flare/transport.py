"""TaskTransport: messages as tasks of the engine, which sites ask for and answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from nvflare.apis.controller_spec import Task
from nvflare.apis.shareable import Shareable

from zorba.federated.errors import FederationError

TASK = "zorba"
FRAME = "frame"
"""Key of the message's bytes: all of ours that a task or its result holds."""
PROBLEM = "problem"
"""Key of the sentence that a site sends where it has no answer."""

_WAKE_SECONDS = 1.0  # between two looks at whether the engine wants the run to stop


class RunStoppedError(FederationError):
    """The engine was asked to stop the run; the log has all rounds that ended."""


class TaskTransport:
    """A ``Transport`` over a controller of the engine.

    A site can be reached once it asks for work, and until it misses a deadline; when it asks
    again, it can be reached again.

    Args:
        controller: of the engine; its ``send`` and ``cancel_task`` are called.
        context: of the engine, for the controller.
        abort: the engine's signal that the run is to stop.
        sites: names to reach; others that ask are ignored.
        quorum: how many sites ``nodes`` waits for.
    """

    def __init__(
        self, controller: Any, context: Any, abort: Any, sites: Collection[str], quorum: int
    ) -> None:
        self._controller = controller
        self._context = context
        self._abort = abort
        self._sites = frozenset(sites)
        self._quorum = quorum
        self._here: set[str] = set()
        # Guards all that the engine's threads change, and wakes the thread of the rounds.
        self._changed = threading.Condition()

    def heard(self, site: str) -> None:
        """Notes that a site asked for work; called from the engine's threads."""
        if site in self._here or site not in self._sites:
            return  # twenty times a second for each site: not worth the lock
        with self._changed:
            self._here.add(site)
            self._changed.notify_all()

    def lost(self, site: str) -> None:
        """Notes that the engine has no connection to a site any more."""
        with self._changed:
            self._here.discard(site)
            self._changed.notify_all()

    def nodes(self) -> Sequence[str]:
        """Returns the sites that can be reached, once they are a quorum.

        Raises:
            RunStoppedError: the engine wants the run to stop.
        """
        with self._changed:
            # No deadline: a round with too few sites would only be spent.
            self._wait_for(lambda: len(self._here) >= self._quorum, None)
            return sorted(self._here)

    def exchange(
        self, plans: Mapping[str, bytes], timeout: float | None = None
    ) -> tuple[dict[str, bytes], dict[str, str]]:
        """See ``Transport``. A site that is killed and comes back in time gets its message again.

        Raises:
            RunStoppedError: the engine wants the run to stop.
        """
        replies: dict[str, bytes] = {}
        failures: dict[str, str] = {}

        def received(client_task: Any, fl_ctx: Any) -> None:
            site = client_task.client.name
            answer, problem = _read(client_task.result)
            with self._changed:
                # The first answer counts: after the deadline its site is among the failures.
                if site in plans and site not in replies and site not in failures:
                    if answer is None:
                        failures[site] = problem
                    else:
                        replies[site] = answer
                    self._changed.notify_all()

        tasks = []
        for site, frame in plans.items():
            data = Shareable()
            data[FRAME] = bytes(frame)
            tasks.append(Task(TASK, data=data, result_received_cb=received))
            self._controller.send(tasks[-1], self._context, [site])
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
                    self._controller.cancel_task(task)

    def _wait_for(self, reached: Callable[[], bool], deadline: float | None) -> None:
        """Waits, with the lock held, until something is reached or the deadline has passed."""
        while not reached():
            if self._abort.triggered:
                raise RunStoppedError("the run was stopped")
            left = _WAKE_SECONDS if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return
            self._changed.wait(min(left, _WAKE_SECONDS))


def _read(result: Any) -> tuple[bytes | None, str]:
    """Returns a result's message, or None and why there is none."""
    if not isinstance(result, Shareable):
        return None, "the site's result is none of ours"
    frame, problem = result.get(FRAME), result.get(PROBLEM)
    if isinstance(frame, bytes):
        return frame, ""
    if isinstance(problem, str):
        return None, problem
    return None, f"the site's engine answered {result.get_return_code()}"
