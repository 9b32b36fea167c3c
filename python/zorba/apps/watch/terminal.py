"""The state of a run as a terminal shows it: a head of lines, and a table of the clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from zorba.apps.watch.fields import clean, decimal, duration, metric, size, table, usual_range
from zorba.apps.watch.records import ClientState, Status
from zorba.apps.watch.state import RunState

_STYLES = ("dim", "green", "cyan", "yellow", "red", "bold red")
_RAMP = "▁▂▃▄▅▆▇█"
_HEAD_LINES = 13
"""Lines of a screen that are not rows of clients."""


class RunView:
    """Shows a state; rich renders it for the width and height that are there.

    Texts that came from clients are shown as they are: rich's markup in them means nothing.

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
        rows = self._rows or max(3, console.size.height - _HEAD_LINES)
        yield Group(self._head(options.max_width), Text(), self._clients(options.max_width, rows))

    def _head(self, width: int) -> Table:
        state = self._state
        head = Table.grid(padding=(0, 2))
        head.add_column(style="bold", no_wrap=True)
        head.add_column()
        head.add_row(Text(state.job or "run"), self._progress(width))
        if state.rounds:
            losses = [r.loss for r in state.rounds if r.loss is not None]
            text = _line(sparkline(losses, min(40, max(8, width - 30))), "cyan")
            text.append(f"  {decimal(losses[-1])}" if losses else "no client replied", style="bold")
            head.add_row("loss", text)
        if state.evaluations:
            head.add_row("evaluation", _line(evaluation_words(state)))
        if state.rounds and len(state.plan.blocks):
            head.add_row("coverage", self._coverage(width - 16))
        if state.rounds:
            up = sum(r.bytes_up for r in state.rounds)
            down = sum(r.bytes_down for r in state.rounds)
            head.add_row("traffic", f"{size(up)} up, {size(down)} down so far")
        silence = state.silence(self._now)
        if silence is not None:
            words = f"no event for {duration(silence)}: the server waits for clients, or was killed"
            head.add_row("quiet", _line(words, "yellow"))
        if state.faults:
            last = max(state.faults, key=lambda fault: str(fault.last))
            who = f"{last.client} " if last.client else ""
            count = sum(len(fault.rounds) for fault in state.faults)
            text = _line(f"{count}, the last in round {last.rounds[-1]}: ")
            head.add_row("faults", text.append(f"{who}{last.kind}: {last.text}", style="yellow"))
        return head

    def _progress(self, width: int) -> Table | Text:
        state = self._state
        done, total = state.round, max(state.last_round, state.round)
        if state.problem:
            text = _line(f"round {done} of {total}, ")
            return text.append(f"stopped: {state.problem}", style="red")
        if state.end is not None:
            return _line(f"{done} rounds done, ").append_text(fingerprint_words(state))
        words = f"round {done} of {total}"
        if state.pace is not None:
            left = duration(state.pace * (total - done))
            words += f", {duration(state.pace)} a round, {left} left"
        bar = ProgressBar(
            total=max(1, total),
            completed=done,
            width=min(30, max(5, width - 62)),
            complete_style="cyan",
            finished_style="green",
        )
        grid = Table.grid(padding=(0, 1))
        grid.add_row(bar, _line(words))
        return grid

    def _coverage(self, width: int) -> Text:
        """One mark a block: the share of clients that covered it in the last round."""
        coverage, blocks = self._state.rounds[-1].coverage, self._state.plan.blocks
        most = int(coverage.max(initial=0))
        text = _line("")
        for part in np.array_split(coverage, min(len(coverage), max(8, width - 30))):
            count = int(part.min())
            if count:
                text.append(_RAMP[round(7 * count / most)], style="green")
            else:
                text.append("·", style="bold red")
        low = int(coverage.min(initial=most))
        counts = f"{low}" if low == most else f"{low} to {most}"
        ends = blocks[0] if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}"
        return text.append(f"  {counts} clients a block; {ends}", style="dim")

    def _clients(self, width: int, rows: int) -> Table | Group:
        state = self._state
        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        show_map = 0 < len(state.plan.blocks) <= width // 4
        wide = width >= 78
        grid.add_column("client", no_wrap=True, overflow="ellipsis", max_width=24)
        if show_map:
            grid.add_column("blocks", no_wrap=True)
        grid.add_column("last round", justify="right", no_wrap=True)
        grid.add_column("seen", justify="right", no_wrap=True)
        if wide:
            grid.add_column("loss", justify="right", no_wrap=True)
            grid.add_column("up", justify="right", no_wrap=True)
            grid.add_column("down", justify="right", no_wrap=True)
        grid.add_column("state")  # the one that gives way
        ranked = sorted(state.clients.items(), key=lambda item: item[1].status < Status.UNUSED)
        shown = ranked if len(ranked) <= rows else ranked[: rows - 1]
        for name, client in shown:
            cells: list[Text | str] = [Text(name)]
            if show_map:
                row = state.plan.row(name)
                cells.append("" if row is None else "".join("█" if a else "·" for a in row))
            cells.append(str(client.last_round or "-"))
            cells.append(self._age(client.last_seen))
            if wide:
                loss = "" if client.loss is None else decimal(client.loss)
                cells += [loss, size(client.bytes_up), size(client.bytes_down)]
            grid.add_row(*cells, _status(client, bool(state.rounds)))
        rest = Counter(client.status for _, client in ranked[len(shown) :])
        if rest:
            words = ", ".join(f"{count} {status.words}" for status, count in sorted(rest.items()))
            return Group(grid, _line(f"and {rest.total()} more: {words}", "dim"))
        return grid

    def _age(self, seen: datetime | None) -> str:
        if seen is None:
            return "never"
        seconds = (self._now - seen).total_seconds()
        return "now" if seconds < 1 else duration(round(seconds)).replace(".00 s", " s")


def sparkline(values: Sequence[float], width: int) -> str:
    """Returns a line of at most ``width`` block characters: means of stretches of the values."""
    if not values:
        return ""
    shown = np.clip(values, *usual_range(values))
    means = [float(part.mean()) for part in np.array_split(shown, min(width, len(values)))]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(_RAMP[round(7 * (mean - low) / span)] for mean in means)


def scores_words(scores: Mapping[str, float]) -> str:
    """Returns scores in words: ``accuracy 0.752, AUC 0.834``."""
    return ", ".join(f"{metric(name)} {decimal(value)}" for name, value in scores.items())


def evaluation_words(state: RunState) -> str:
    """Returns the last evaluation in words, with the first beside it."""
    (at, first), (last_at, last) = state.evaluations[0], state.evaluations[-1]
    words = f"{scores_words(last)} after round {last_at}"
    return words if last_at == at else f"{words}; {scores_words(first)} after round {at}"


def fingerprint_words(state: RunState) -> Text:
    """Returns what the end told of the replicas."""
    end = state.end or {}
    values = sorted(set(map(clean, table(end, "fingerprints").values())))
    if end.get("replicas_identical") and len(values) == 1:
        return Text(f"fingerprints equal: {values[0]}", style="green")
    told = ", ".join(values[:3]) + (", ..." if len(values) > 3 else "")
    return Text(f"replicas NOT all identical: {told or 'none told'}", style="red")


def event_line(event: Mapping[str, Any], state: RunState) -> str | None:
    """Returns an event as a line of text; None for one that has nothing to say.

    Args:
        event: the last that ``state`` took.
        state: of the run.
    """
    kind = event["event"]
    if kind == "start":
        begun = f"{state.job}: rounds {state.starts[-1][1] + 1} to {state.last_round}"
        return f"{begun}, {len(state.clients)} clients, {len(state.plan.blocks)} blocks"
    if kind == "round" and state.rounds:
        last = state.rounds[-1]
        counts = Counter(c.status for c in state.clients.values())
        words = ", ".join(f"{n} {status.words}" for status, n in sorted(counts.items()))
        loss = "no loss" if last.loss is None else f"loss {decimal(last.loss)}"
        traffic = f"{size(last.bytes_up)} up, {size(last.bytes_down)} down"
        bad = int((last.coverage == 0).sum())
        uncovered = f", {bad} of {len(last.coverage)} blocks not covered" if bad else ""
        took = duration(last.seconds)
        return (
            f"round {last.number}/{state.last_round}: {loss}, {words}{uncovered}, {traffic}, {took}"
        )
    if kind == "evaluation" and state.evaluations:
        at, scores = state.evaluations[-1]
        return f"round {at}: {scores_words(scores)}"
    if kind == "end":
        if state.problem:
            return f"stopped after round {state.round}: {state.problem}"
        return f"{state.round} rounds done, {fingerprint_words(state)}"
    return None


def _line(text: str, style: str = "") -> Text:
    """Text that is cut at the edge of its column."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _status(client: ClientState, begun: bool) -> Text:
    if not begun:
        return Text("waiting", style="dim")
    text = _line(client.status.words, _STYLES[client.status])
    return text.append(f": {client.reason}") if client.reason else text
