"""``zorba watch``: follows a run folder and shows it, redrawn on a terminal, else line by line."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from zorba.apps.cli import WatchSettings
from zorba.apps.watch.events import Event, Status
from zorba.apps.watch.state import ClientState, Follower, RunState
from zorba.apps.watch.words import decimal, duration, event_line, facts, fault_line, status, tally
from zorba.federated.errors import RunFolderError
from zorba.federated.run_folder import RunFolder
from zorba.sizes import show_bytes

_POLL_SECONDS = 0.25
_STYLES = ("dim", "green", "cyan", "yellow", "red", "bold red")  # of a client's status
_MOODS = {"good": "green", "warn": "yellow", "bad": "red"}


def read_run(path: Path) -> tuple[RunFolder, RunState]:
    """Returns a run's folder, and what its events add up to; RunFolderError where there is none."""
    folder = RunFolder(path)
    if not folder.events.is_file():
        raise RunFolderError(
            f"there is no run at {path}: expected a folder with events.jsonl, as a server writes it"
        )
    return folder, Follower(folder.events).update()


def run_watch(settings: WatchSettings) -> None:
    """Shows a run until it ends or Ctrl-C is pressed; with ``once`` only its state of now."""
    console = Console()
    folder, state = read_run(settings.run)
    if settings.once:
        console.print(view_run(state, console, every_client=True))
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
    Elsewhere everything is a line, of rounds at most one ``every`` seconds. ``events`` is the path
    of ``events.jsonl``, which need not exist yet.
    """

    def __init__(self, events: Path, console: Console, every: float = 0.0) -> None:
        self.ended = threading.Event()  # set when the run has ended, or the view has failed
        self.error: Exception | None = None  # why it failed, which the run does not notice
        self._console, self._every = console, every
        self._say = partial(console.print, markup=False, highlight=False)
        self._follower = Follower(events)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="zorba live view", daemon=True)
        self._faults, self._next_line = 0, 0.0  # faults that were told; time of the next line
        self._live = Live(console=console, auto_refresh=False) if console.is_interactive else None

    def __enter__(self) -> LiveView:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with self._live or nullcontext() as live:
                # What happened before somebody looked shapes the view, and leaves no lines.
                self._faults = len(self._follower.update().faults) if live else 0
                stopping = False
                while not stopping:
                    # Asked before the events are read: whatever came before the stop is shown.
                    stopping = self._stop.is_set()
                    for event in self._follower.events():
                        self._tell(event, self._follower.state)
                    if live is not None:
                        live.update(view_run(self._follower.state, self._console), refresh=True)
                    if self._follower.state.end is not None:
                        self.ended.set()
                    self._stop.wait(_POLL_SECONDS)
        except Exception as error:  # a view must not end the run that it shows
            self.error = error
            self._say(f"the view of the run stopped: {error}")
            self.ended.set()

    def _tell(self, event: Event, state: RunState) -> None:
        """Prints the lines that an event leaves: on a terminal above the view, else all."""
        lines = [fault_line(fault) for fault in list(state.faults.values())[self._faults :]]
        self._faults = len(state.faults)
        due = event.event != "round" or time.monotonic() >= self._next_line
        if event.event == "round" and due:
            self._next_line = time.monotonic() + self._every
        if due and (self._live is None or event.event == "evaluation"):
            lines.append(event_line(event, state) or "")
        for line in filter(None, lines):
            self._say(f"{event.time.astimezone():%H:%M:%S} {line}")


# Every text is a Text of rich: markup in names and reasons means nothing.
def view_run(
    state: RunState, console: Console, now: datetime | None = None, every_client: bool = False
) -> Group:
    """Returns facts and clients of a run: those that fit on the console, or all of them."""
    now = now or datetime.now(timezone.utc)
    head = Table.grid(padding=(0, 2))
    head.add_column(style="bold", no_wrap=True)
    head.add_column()
    width = max(5, console.width - 40)
    bar = ProgressBar(max(1, state.last_round), state.round, width, complete_style="cyan")
    head.add_row(Text(state.job or "run"), bar)
    mood, words = status(state, now)
    head.add_row("state", _line(words, _MOODS[mood]))
    for name, figure, note in facts(state):
        head.add_row(Text(name), _line(figure).append(f"  {note}", "dim"))
    # The head, a line on each side of the table's header, and one for the clients left out.
    most = len(state.clients) if every_client else max(3, console.height - head.row_count - 4)
    # Whoever failed comes first: the rest may not fit on the screen.
    ranked = sorted(state.clients.items(), key=lambda item: item[1].status < Status.NOT_USED)
    shown = ranked if len(ranked) <= most else ranked[: most - 1]
    rest = [client.status for _, client in ranked[len(shown) :]]
    more = [_line(f"and {len(rest)} more: {tally(rest)}", "dim")] if rest else []
    return Group(head, Text(), _client_table(state, shown, console.width, now), *more)


def _client_table(
    state: RunState, clients: list[tuple[str, ClientState]], width: int, now: datetime
) -> Table:
    wide, masked = width >= 78, 0 < len(state.plan.blocks) <= width // 4
    masks = dict(zip(state.plan.clients, state.plan.mask, strict=True))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("client", no_wrap=True, overflow="ellipsis", max_width=24)
    if masked:
        table.add_column("blocks", no_wrap=True)
    for name in ("last round", "seen", *(("loss", "up", "down") if wide else ())):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state")  # the one that gives way
    for name, client in clients:
        cells, seen = [name], client.last_seen
        if masked:
            cells.append(masks.get(name, "").translate(str.maketrans("01", "·█")))
        cells.append(str(client.last_round or "-"))
        cells.append("never" if seen is None else duration((now - seen).total_seconds()))
        if wide:
            cells.append("" if client.loss is None else decimal(client.loss))
            cells += [show_bytes(client.bytes_up), show_bytes(client.bytes_down)]
        did = _line(client.status.words if state.rounds else "waiting", _STYLES[client.status])
        table.add_row(*map(Text, cells), did.append(f": {client.reason}" if client.reason else ""))
    return table


def _line(text: str, style: str = "") -> Text:
    """Text that is cut at the edge of its column."""
    return Text(text, style, no_wrap=True, overflow="ellipsis")
