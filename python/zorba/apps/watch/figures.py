"""Pictures of a run over its rounds. The page shows them as SVG, the demo writes two as PNG.

A picture is a function that draws a state on axes and returns a caption, which is empty where
there is nothing to draw.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zorba.apps.watch.state import RunState
from zorba.apps.watch.words import decimal, metric, usual_range
from zorba.sizes import show_bytes

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

Picture = Callable[["Axes", RunState], str]

_COLOURS = ("#2a6a9e", "#c2542f", "#2b7d57", "#7a5aa6")
_QUIET = "#98a2ad"


@contextmanager
def plain_text() -> Iterator[None]:
    """Draws texts as they are: names are no formulas, and rare letters are no warnings."""
    from matplotlib import rc_context

    # A client's name between dollar signs would be parsed as mathematics, and could fail there.
    with rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        yield


def write_curves(path: Path, state: RunState) -> None:
    """Writes a picture of loss and scores; the extension of the path is its format."""
    from matplotlib.figure import Figure

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
    seen = [(r.number, r.loss) for r in state.rounds if r.loss is not None]
    if not seen:
        return ""
    numbers, losses = (np.array(values) for values in zip(*seen, strict=True))
    # One absurd loss must neither flatten the curve nor move the mean: it is cut first.
    shown, width = np.clip(losses, *usual_range(losses.tolist())), max(1, len(losses) // 10)
    means = np.convolve(shown, np.full(width, 1 / width), mode="valid")
    axes.plot(numbers, shown, marker=_marker(len(shown)), color=_QUIET, lw=1, label="round")
    axes.plot(numbers[width - 1 :], means, color=_COLOURS[0], lw=2, label=f"mean of {width}")
    _mark_value(axes, (numbers[-1], means[-1]), _COLOURS[0])
    tests = [(at, scores["loss"]) for at, scores in state.evaluations if "loss" in scores]
    if tests:
        axes.plot(*zip(*tests, strict=True), "o-", color=_COLOURS[1], ms=4, label="evaluation")
        _mark_value(axes, tests[-1], _COLOURS[1])
    _finish(axes, state, "loss")
    words = "Mean of the clients' batches, weighted by their examples."
    silent, outside = len(state.rounds) - len(seen), int((losses != shown).sum())
    words += f" In {silent} rounds nobody replied." if silent else ""
    return words + (f" {outside} rounds lie outside of the picture." if outside else "")


def scores_picture(axes: Axes, state: RunState) -> str:
    """Draws the scores of the evaluations, except the loss."""
    names = list(dict.fromkeys(n for _, scores in state.evaluations for n in scores if n != "loss"))
    for name, colour in zip(names, _COLOURS, strict=False):
        points = [(at, scores[name]) for at, scores in state.evaluations if name in scores]
        axes.plot(*zip(*points, strict=True), "o-", color=colour, ms=4, label=short(metric(name)))
        _mark_value(axes, points[-1], colour)
    if not names:
        return ""
    _finish(axes, state, "score")
    more = len(names) - len(_COLOURS)
    return "On the evaluation data." + (f" {more} more are not drawn." if more > 0 else "")


def traffic_picture(axes: Axes, state: RunState) -> str:
    """Draws the bytes of all clients over the rounds."""
    if not state.rounds:
        return ""
    numbers = [r.number for r in state.rounds]
    ways = {"down": [r.bytes_down for r in state.rounds], "up": [r.bytes_up for r in state.rounds]}
    for (way, values), colour in zip(ways.items(), _COLOURS, strict=False):
        axes.plot(numbers, values, marker=_marker(len(numbers)), color=colour, label=way)
    _finish(axes, state, "all clients, a round")
    top = max(usual_range(values, reach=3.0)[1] for values in ways.values())
    axes.set_ylim(0, 1.05 * max(1.0, top))
    axes.yaxis.set_major_formatter(lambda value, _: show_bytes(value))
    words = "Encoded messages: down to the clients, up to the server."
    most, number = max((max(r.bytes_down, r.bytes_up), r.number) for r in state.rounds)
    if most > top:
        words += " A client that comes back gets everything that it missed: rounds such as "
        words += f"{number:,}, with {show_bytes(most)}, are cut here."
    return words


def short(text: str, length: int = 18) -> str:
    """Returns text that fits beside a picture."""
    return text if len(text) <= length else text[: length - 1] + "…"


def finish_rounds(axes: Axes, state: RunState) -> None:
    """Labels the axis of rounds, and marks where the server started again."""
    from matplotlib.ticker import MaxNLocator

    for _, after in state.starts[1:]:
        axes.axvline(after + 0.5, color=_QUIET, lw=1, ls="--")
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def legend_above(axes: Axes, handles: Sequence[Artist] | None = None) -> None:
    """Writes the legend in a line above the axes, where it hides nothing."""
    handles = handles or axes.get_legend_handles_labels()[0]
    corner = {"bbox_to_anchor": (0, 1), "ncols": len(handles), "frameon": False}
    axes.legend(handles=handles, loc="lower left", handlelength=1.2, **corner)


def _finish(axes: Axes, state: RunState, title: str) -> None:
    finish_rounds(axes, state)
    axes.set_ylabel(title)
    axes.margins(x=0.08)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    legend_above(axes)


def _mark_value(axes: Axes, point: tuple[float, float], colour: str) -> None:
    axes.annotate(decimal(point[1]), point, (6, -3), textcoords="offset points", color=colour)


def _marker(count: int) -> str:
    return "." if count < 3 else ""  # one point makes no line
