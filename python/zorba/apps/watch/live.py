"""LiveView: follows a run folder and shows it, redrawn on a terminal and line by line elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live

from zorba.apps.watch.fields import moment
from zorba.apps.watch.state import Follower
from zorba.apps.watch.terminal import RunView, event_line

_POLL_SECONDS = 0.25


class LiveView:
    """Shows a run from a thread of its own, until the block is left.

    On a terminal the view is redrawn in place; evaluations and new faults leave a line above it.
    Elsewhere everything is a line.

    Args:
        events: path of ``events.jsonl``; it need not exist yet.
        console: to show it on.
        every: seconds between two lines of rounds, where it is no terminal; 0 for all rounds.

    Attributes:
        ended: set when the run has ended, or the view has failed.
        error: why the view failed, which the run does not notice; None where it did not.
    """

    def __init__(self, events: Path, console: Console, every: float = 0.0) -> None:
        self.ended = threading.Event()
        self._console = console
        self._every = every
        self._follower = Follower(events)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="zorba live view", daemon=True)
        self.error: Exception | None = None
        self._faults = 0
        self._next_line = 0.0
        self._live = (
            Live(console=console, auto_refresh=False, vertical_overflow="crop")
            if console.is_interactive
            else None
        )

    def __enter__(self) -> LiveView:
        """Starts to show."""
        if self._live is not None:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Shows the last state and stops."""
        self._stop.set()
        self._thread.join()
        if self._live is not None:
            self._live.stop()

    def _run(self) -> None:
        try:
            first = True
            while not self._stop.is_set():
                self._update(first)
                first = False
                self._stop.wait(_POLL_SECONDS)
            self._update(first)
        except Exception as error:  # a view must not end the run that it shows
            self.error = error
            text = f"the view of the run stopped: {error}"
            self._console.print(text, markup=False, highlight=False)
            self.ended.set()

    def _update(self, first: bool) -> None:
        """Takes new events; on a terminal, those that were there before it only shape the view."""
        follower = self._follower
        for event in follower.events():
            lines = list(self._lines(event))
            if not (first and self._live is not None):
                at = moment(event)
                clock = f"{at.astimezone():%H:%M:%S} " if at else ""
                for line in lines:
                    self._console.print(clock + line, markup=False, highlight=False)
        if self._live is not None:
            self._live.update(RunView(follower.state), refresh=True)
        if follower.state.end is not None:
            self.ended.set()

    def _lines(self, event: Mapping[str, Any]) -> Iterator[str]:
        """Yields what an event leaves above the view, or is told by where there is no view."""
        state, kind = self._follower.state, event["event"]
        for fault in state.faults[self._faults :]:
            who = f"{fault.client} " if fault.client else ""
            yield f"round {fault.rounds[-1]}: {who}{fault.kind}: {fault.text}"
        self._faults = len(state.faults)
        line = event_line(event, state)
        if kind == "round" and self._live is None:
            if time.monotonic() < self._next_line:
                return
            self._next_line = time.monotonic() + self._every
        if line is not None and (kind == "evaluation" or self._live is None):
            yield line
