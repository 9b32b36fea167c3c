"""Pictures of a run: each draws a state on axes and returns a caption, empty for no picture."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from zorba.apps.watch.events import Status
from zorba.apps.watch.state import RunState
from zorba.apps.watch.words import decimal, metric
from zorba.planning.picture import IDLE, MARK, draw_coverage, draw_mask, draw_memory
from zorba.sizes import show_bytes

MOST_ROWS = 200  # clients in a picture, and blocks
_MOST_COLUMNS = 384
# From pale to dark as the status gets worse: colours alone are not for every eye.
_STATUS_COLOURS = (IDLE, "#a9cbe4", "#63b491", "#e8bb5f", MARK, "#7d1128")


@contextmanager
def plain_text() -> Iterator[None]:
    """Draws texts as they are: names are no formulas, and rare letters are no warnings."""
    # A client's name between dollar signs would be parsed as mathematics, and could fail there.
    with rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        yield


def write_curves(path: Path, state: RunState) -> None:
    """Writes a picture of loss and scores; the extension of the path is its format."""
    with plain_text():
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        loss_picture(left, state)
        scores_picture(right, state)
        left.set_title("Loss of the clients' batches", pad=28)
        right.set_title("Evaluation", pad=28)
        figure.savefig(path, dpi=120)


def loss_picture(axes: Axes, state: RunState) -> str:
    """Draws the clients' loss over the rounds, and the evaluations' loss."""
    seen = [(r.round, r.loss) for r in state.rounds if r.loss is not None]
    if not seen:
        return ""
    numbers, losses = (np.array(values) for values in zip(*seen, strict=True))
    # One absurd loss must neither flatten the curve nor move the mean: it is cut first.
    limit = 10 * np.quantile(np.abs(losses), 0.95, method="lower")
    shown, width = np.clip(losses, -limit, limit), max(1, len(losses) // 10)
    means = np.convolve(shown, np.full(width, 1 / width), mode="valid")
    axes.plot(numbers, shown, ".-", color="0.7", ms=2, lw=1, label="round")
    _curve(axes, numbers[width - 1 :], means, "-", f"mean of {width}")
    _score(axes, state, "loss", "evaluation")
    _finish(axes, state)
    words, outside = "Mean of the clients' batches, weighted by their examples.", losses != shown
    return words + (f" {outside.sum()} rounds lie outside of the picture." if outside.any() else "")


def scores_picture(axes: Axes, state: RunState) -> str:
    """Draws the scores of the evaluations, except the loss."""
    names = dict.fromkeys(n for _, scores in state.evaluations for n in scores if n != "loss")
    for name in names:
        _score(axes, state, name, short(metric(name)))
    if names:
        _finish(axes, state)
    return "On the evaluation data." if names else ""


def traffic_picture(axes: Axes, state: RunState) -> str:
    """Draws the bytes of all clients over the rounds."""
    if not state.rounds:
        return ""
    numbers = [r.round for r in state.rounds]
    axes.plot(numbers, [r.bytes_down for r in state.rounds], ".-", ms=2, label="down")
    axes.plot(numbers, [r.bytes_up for r in state.rounds], ".-", ms=2, label="up")
    # A client that comes back after a month gets a month's log; a round without messages is 0.
    axes.set_yscale("symlog", base=2, linthresh=64)
    axes.yaxis.set_major_formatter(lambda value, _: show_bytes(value))
    _finish(axes, state)
    return "Encoded messages of all clients: down to them, up to the server."


def activation_picture(axes: Axes, state: RunState) -> str:
    """Draws who activates which block under the plan in force, with coverage and memory beside."""
    plan = state.plan
    clients, blocks = plan.clients[:MOST_ROWS], plan.blocks[:MOST_ROWS]
    if not clients or not blocks:
        return ""
    place: Any = axes.get_subplotspec()
    grid = place.subgridspec(2, 2, width_ratios=[6, 1], height_ratios=[3, len(clients)])
    axes.set_subplotspec(grid[1, 0])
    active = np.array([[c == "1" for c in row[:MOST_ROWS]] for row in plan.mask])
    draw_mask(axes, list(map(short, clients)), list(map(short, blocks)), active[:MOST_ROWS])
    for mesh in axes.collections:
        mesh.set_rasterized(True)  # a path for each of 40,000 cells would make 5 MB of SVG
    # An earlier start may have had another plan.
    done = [state.clients[name].history[state.rounds_before_start :] for name in plan.clients]
    shares = [history.count(Status.MEASURED) / max(1, len(history)) for history in done]
    above = axes.figure.add_subplot(grid[0, 0], sharex=axes)
    draw_coverage(above, active.sum(axis=0).tolist(), (np.array(shares) @ active).tolist())
    words = "Bars: coverage of the plan. Marks: mean coverage of the rounds since the last start."
    budgets, memory = [count or 0 for count in plan.budgets[:MOST_ROWS]], plan.memory[:MOST_ROWS]
    if memory and all(budgets):
        draw_memory(axes.figure.add_subplot(grid[1, 1], sharey=axes), memory, budgets)
        words += " At the right: memory, as predicted."
    return words + _cut(plan.clients, "clients") + _cut(plan.blocks, "blocks")


def status_picture(axes: Axes, state: RunState) -> str:
    """Draws what each client did over the rounds."""
    if not state.rounds or not state.clients:
        return ""
    names, count = list(state.clients)[:MOST_ROWS], len(state.rounds)
    history = np.array([np.frombuffer(state.clients[name].history, np.uint8) for name in names])
    columns = min(count, _MOST_COLUMNS)
    begins = [count * column // columns for column in range(columns)]
    worst = np.maximum.reduceat(history, begins, axis=1)
    edges = (state.rounds[0].round - 0.5, state.rounds[-1].round + 0.5, len(names) - 0.5, -0.5)
    colours = ListedColormap(_STATUS_COLOURS)
    image = axes.imshow(worst, colours, aspect="auto", interpolation="none", extent=edges)
    image.set_clim(-0.5, len(Status) - 0.5)
    there = [Status(value) for value in np.unique(history)]
    _finish(axes, state, [Patch(color=_STATUS_COLOURS[s], label=s.words) for s in there])
    axes.set_xlim(edges[:2])
    axes.set_yticks(range(len(names)), list(map(short, names)))
    words = f" Each column is the worst of about {round(count / columns)} rounds."
    words = "What each client did in each round." + (words if columns < count else "")
    return words + _cut(state.clients, "clients")


def short(text: str, length: int = 18) -> str:
    """Returns text that fits beside a picture."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _score(axes: Axes, state: RunState, name: str, label: str) -> None:
    points = {at: scores[name] for at, scores in state.evaluations if name in scores}
    if points:
        _curve(axes, list(points), list(points.values()), "o-", label)


def _curve(axes: Axes, rounds: Any, values: Any, style: str, label: str) -> None:
    (line,) = axes.plot(rounds, values, style, ms=4, label=label)
    note, end, colour = decimal(values[-1]), (rounds[-1], values[-1]), line.get_color()
    axes.annotate(note, end, (6, -3), textcoords="offset points", color=colour)


def _finish(axes: Axes, state: RunState, handles: list[Patch] | None = None) -> None:
    """Labels the axis of rounds, marks where the server started again, and adds a legend."""
    for start in state.starts[1:]:
        axes.axvline(start.round + 0.5, color="0.6", lw=1, ls="--")
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    # In a line above the axes, where it hides nothing.
    place: dict[str, Any] = {"bbox_to_anchor": (0, 1), "ncols": len(Status), "handles": handles}
    axes.legend(loc="lower left", handlelength=1.2, frameon=False, **place)


def _cut(names: Sized, what: str) -> str:
    told = f" Only the first {MOST_ROWS} of {len(names):,} {what} are shown."
    return told if len(names) > MOST_ROWS else ""
