"""``zorba watch``: follows a run folder and shows it, redrawn on a terminal, else line by line."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live

from zorba.apps.watch.fields import Event, moment
from zorba.apps.watch.state import Follower, RunState
from zorba.apps.watch.terminal import RunView
from zorba.apps.watch.words import event_line
from zorba.federated.errors import RunFolderError
from zorba.federated.run_folder import RunFolder

_POLL_SECONDS = 0.25


def read_run(path: Path) -> tuple[RunFolder, RunState]:
    """Returns a run's folder, and the state that its events add up to.

    Args:
        path: of the folder, or of its ``events.jsonl``.

    Raises:
        RunFolderError: there is no run, or its events cannot be read.
    """
    folder = RunFolder(path.parent if path.name == "events.jsonl" else path)
    if not folder.events.is_file():
        raise RunFolderError(
            f"there is no run at {path}: expected a folder with events.jsonl, as a server writes it"
        )
    return folder, Follower(folder.events).update()


def watch_run(path: Path, console: Console | None = None, once: bool = False) -> None:
    """Shows a run until it ends or Ctrl-C is pressed.

    Args:
        path: of the folder.
        console: to show it on; None for the standard output.
        once: show the state of now, and return.

    Raises:
        RunFolderError: there is no run, or its events cannot be read.
    """
    console = console or Console()
    folder, state = read_run(path)
    if once:
        console.print(RunView(state, rows=len(state.clients) or None))
        return
    try:
        with LiveView(folder.events, console) as view:
            view.ended.wait()
        if view.error is not None:
            raise view.error
    except KeyboardInterrupt:
        console.print("no longer watching; the run goes on", highlight=False)


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
        self.error: Exception | None = None
        self._console = console
        self._every = every
        self._follower = Follower(events)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="zorba live view", daemon=True)
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
            if self._live is not None:
                # What happened before somebody looked shapes the view, and leaves no lines.
                self._faults = len(self._follower.update().faults)
            stopping = False
            while not stopping:
                # Asked before the events are read: whatever came before the stop is shown.
                stopping = self._stop.is_set()
                self._update()
                self._stop.wait(_POLL_SECONDS)
        except Exception as error:  # a view must not end the run that it shows
            self.error = error
            text = f"the view of the run stopped: {error}"
            self._console.print(text, markup=False, highlight=False)
            self.ended.set()

    def _update(self) -> None:
        for event in self._follower.events():
            at = moment(event)
            clock = f"{at.astimezone():%H:%M:%S} " if at else ""
            for line in self._lines(event):
                self._console.print(clock + line, markup=False, highlight=False)
        state = self._follower.state
        if self._live is not None:
            self._live.update(RunView(state), refresh=True)
        if state.end is not None:
            self.ended.set()

    def _lines(self, event: Event) -> Iterator[str]:
        """Yields the lines that an event leaves: on a terminal above the view, else all."""
        state, kind = self._follower.state, event["event"]
        for fault in state.faults[self._faults :]:
            yield f"round {fault.rounds[-1]}: {fault.words}"
        self._faults = len(state.faults)
        if self._live is None and kind == "round":
            if time.monotonic() < self._next_line:
                return
            self._next_line = time.monotonic() + self._every
        line = event_line(event, state)
        if line is not None and (kind == "evaluation" or self._live is None):
            yield line
