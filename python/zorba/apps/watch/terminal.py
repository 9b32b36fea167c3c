"""The state of a run as a terminal shows it: a head of facts, and a table of the clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from zorba.apps.watch.records import ClientState, Status
from zorba.apps.watch.state import RunState
from zorba.apps.watch.words import decimal, duration, facts, status, usual_range
from zorba.sizes import show_bytes

_STYLES = ("dim", "green", "cyan", "yellow", "red", "bold red")  # of a client's status
_MOODS = {"good": "green", "warn": "yellow", "bad": "red"}
_RAMP = "▁▂▃▄▅▆▇█"


class RunView:
    """Shows a state; rich renders it for the width and height that are there.

    Every text is a ``Text`` of rich: markup in names and reasons means nothing.

    Args:
        state: of the run.
        now: that ages are counted to; None for the present.
        rows: clients to show at most; None for what fits on the screen.
    """

    def __init__(
        self, state: RunState, now: datetime | None = None, rows: int | None = None
    ) -> None:
        self._state = state
        self._now = now or datetime.now(timezone.utc)
        self._rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the head and the table."""
        head = self._head(options.max_width)
        yield head
        yield Text()
        # The head, a line on each side of the table's header, and one for the clients left out.
        fitting = max(3, console.size.height - head.row_count - 4)
        yield from self._clients(options.max_width, self._rows or fitting)

    def _head(self, width: int) -> Table:
        state = self._state
        head = Table.grid(padding=(0, 2))
        head.add_column(style="bold", no_wrap=True)
        head.add_column()
        total = max(1, state.last_round, state.round)
        head.add_row(
            Text(state.job or "run"),
            ProgressBar(total, state.round, width=max(5, width - 40), complete_style="cyan"),
        )
        mood, words = status(state, self._now)
        head.add_row("state", _line(words, _MOODS[mood]))
        losses = [r.loss for r in state.rounds if r.loss is not None]
        if losses:
            head.add_row("course", _line(sparkline(losses, max(8, width - 30)), "cyan"))
        for name, figure, note in facts(state):
            head.add_row(name, _line(figure).append(f"  {note}", "dim"))
        return head

    def _clients(self, width: int, rows: int) -> RenderResult:
        state = self._state
        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        wide, show_map = width >= 78, 0 < len(state.plan.blocks) <= width // 4
        grid.add_column("client", no_wrap=True, overflow="ellipsis", max_width=24)
        if show_map:
            grid.add_column("blocks", no_wrap=True)
        for name in ("last round", "seen", *(("loss", "up", "down") if wide else ())):
            grid.add_column(name, justify="right", no_wrap=True)
        grid.add_column("state")  # the one that gives way
        masks = dict(zip(state.plan.clients, state.plan.mask, strict=True))
        # Whoever failed comes first: the rest may not fit on the screen.
        ranked = sorted(state.clients.items(), key=lambda item: item[1].status < Status.NOT_USED)
        shown = ranked if len(ranked) <= rows else ranked[: rows - 1]
        for name, client in shown:
            cells = [Text(name)]
            if show_map:
                cells.append(Text("".join("·█"[int(on)] for on in masks.get(name, ()))))
            cells += [Text(str(client.last_round or "-")), Text(self._age(client.last_seen))]
            if wide:
                loss = "" if client.loss is None else decimal(client.loss)
                traffic = (show_bytes(client.bytes_up), show_bytes(client.bytes_down))
                cells += [Text(loss), *map(Text, traffic)]
            grid.add_row(*cells, _state_of(client) if state.rounds else Text("waiting", "dim"))
        yield grid
        rest = Counter(client.status for _, client in ranked[len(shown) :])
        if rest:
            words = ", ".join(f"{count} {status.words}" for status, count in sorted(rest.items()))
            yield _line(f"and {rest.total()} more: {words}", "dim")

    def _age(self, seen: datetime | None) -> str:
        if seen is None:
            return "never"
        seconds = round((self._now - seen).total_seconds())
        return "now" if seconds < 1 else duration(seconds).replace(".00 s", " s")


def sparkline(values: Sequence[float], width: int) -> str:
    """Returns a line of at most ``width`` block characters: means of stretches of the values."""
    if not values:
        return ""
    shown = np.clip(values, *usual_range(values))
    means = np.array([part.mean() for part in np.array_split(shown, min(width, len(values)))])
    levels = 7 * (means - means.min()) / (np.ptp(means) or 1.0)
    return "".join(_RAMP[round(level)] for level in levels.tolist())


def _line(text: str, style: str = "") -> Text:
    """Text that is cut at the edge of its column."""
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def _state_of(client: ClientState) -> Text:
    text = _line(client.status.words, _STYLES[client.status])
    return text.append(f": {client.reason}") if client.reason else text
