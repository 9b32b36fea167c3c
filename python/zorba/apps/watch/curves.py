"""Pictures of a run over its rounds: loss, scores, traffic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from zorba.apps.watch.fields import decimal, metric, size, unit, usual_range
from zorba.apps.watch.state import RunState
from zorba.apps.watch.svg import Plot, Point, stretches

_MOST_POINTS = 300
"""Points of a curve; more rounds than this are drawn in stretches, as a band and means."""


def loss_picture(state: RunState) -> tuple[Markup, str]:
    """Returns the clients' loss over the rounds, and what there is to read of it."""
    rounds = [(r.number, r.loss) for r in state.rounds]
    there = [(float(x), y) for x, y in rounds if y is not None]
    low, high = usual_range([y for _, y in there] or [0.0])
    outside = sum(not low <= y <= high for _, y in there)
    there = [(x, min(max(y, low), high)) for x, y in there]
    tests = [(float(at), scores["loss"]) for at, scores in state.evaluations if "loss" in scores]
    if not there:
        return Markup(), ""
    values = [y for _, y in there] + [y for _, y in tests]
    plot = Plot("loss over rounds", [x for x, _ in there + tests], values, "loss")
    _mark_starts(plot, state)
    if len(rounds) <= _MOST_POINTS:
        plot.curve(_with_gaps(rounds, there), "raw")
    else:
        plot.band(_band(there), "band")
    width = max(1, len(there) // 20)
    plot.curve(_moving_mean(there, width), "a")
    plot.dots(tests, "dot b", "evaluation loss")
    mean = sum(y for _, y in there[-width:]) / width
    labels = [(mean, decimal(mean), "a")]
    if tests:
        plot.curve(tests, "b")
        labels.append((tests[-1][1], decimal(tests[-1][1]), "b"))
    plot.label(labels)
    words = "Mean of the clients' batches, by their examples"
    words += ": each round and " if len(rounds) <= _MOST_POINTS else ": range and "
    words += f"mean of {width} rounds." if width > 1 else "its course."
    if tests:
        words += " Dots: loss on the evaluation data."
    silent = len(rounds) - len(there)
    words += f" In {silent} rounds nobody replied." if silent else ""
    words += f" {outside} rounds lie outside of the picture." if outside else ""
    return plot.markup(), words


def scores_picture(state: RunState) -> tuple[Markup, str]:
    """Returns the scores of the evaluations but the loss, and what there is to read of them."""
    names = list(dict.fromkeys(n for _, scores in state.evaluations for n in scores if n != "loss"))
    names = names[:4]
    curves = {n: [(float(at), s[n]) for at, s in state.evaluations if n in s] for n in names}
    if not names:
        return Markup(), ""
    points = [point for curve in curves.values() for point in curve]
    plot = Plot("scores over rounds", [x for x, _ in points], [y for _, y in points], "score")
    _mark_starts(plot, state)
    labels = []
    for name, colour in zip(names, "abcd", strict=False):
        plot.curve(curves[name], colour)
        plot.dots(curves[name], f"dot {colour}", metric(name))
        last = curves[name][-1][1]
        labels.append((last, decimal(last), colour))
    plot.label(labels)
    return plot.markup(), legend([(metric(n), c) for n, c in zip(names, "abcd", strict=False)])


def traffic_picture(state: RunState) -> tuple[Markup, str]:
    """Returns the bytes of all clients over the rounds, and what there is to read of them."""
    if not state.rounds:
        return Markup(), ""
    most = max(max(r.bytes_down, r.bytes_up) for r in state.rounds)
    ways = ([r.bytes_down for r in state.rounds], [r.bytes_up for r in state.rounds])
    top = max(usual_range(counts, reach=3.0)[1] for counts in ways)
    one, name = unit(top)
    up = [(float(r.number), min(r.bytes_up, top) / one) for r in state.rounds]
    down = [(float(r.number), min(r.bytes_down, top) / one) for r in state.rounds]
    plot = Plot(
        "bytes over rounds",
        [x for x, _ in up],
        [0.0, *(y for _, y in up), *(y for _, y in down)],
        f"{name} a round",
        zero=True,
    )
    _mark_starts(plot, state)
    labels = []
    for points, colour in ((down, "a"), (up, "b")):
        width = max(1, len(points) // _MOST_POINTS)
        if width > 1:
            plot.band(_band(points), f"band {colour}")
        plot.curve(_moving_mean(points, width), colour)
        last = points[-1][1]
        labels.append((last, f"{last:,.0f}" if one == 1 else f"{last:,.1f}", colour))
    plot.label(labels)
    words = legend([("down to the clients", "a"), ("up to the server", "b")])
    words += Markup(" Encoded messages of all clients.")
    if top < most:
        largest = max(state.rounds, key=lambda r: max(r.bytes_down, r.bytes_up))
        words += Markup(
            " A client that comes back gets all that it missed: rounds like {:,}, with {}, are cut "
            "here."
        ).format(largest.number, size(most))
    return plot.markup(), words


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """Returns names with the marks of their classes."""
    return Markup(" ").join(
        Markup('<span class="key"><i class="{}"></i>{}</span>').format(colour, name)
        for name, colour in entries
    )


def _mark_starts(plot: Plot, state: RunState) -> None:
    for _, after in state.starts[1:]:
        plot.mark(after, f"the server started again after round {after}")


def _with_gaps(
    rounds: Sequence[tuple[int, float | None]], there: Sequence[tuple[float, float]]
) -> list[Point]:
    """Returns a value for each round, None where there is none."""
    values = iter(there)
    return [(float(x), None if y is None else next(values)[1]) for x, y in rounds]


def _moving_mean(points: Sequence[tuple[float, float]], width: int) -> list[Point]:
    """Means of each point and those before it, ``width`` in all, at some of the points."""
    values = np.array([y for _, y in points])
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = [end for _, end in stretches(len(points), _MOST_POINTS)]
    return [
        (points[end - 1][0], float((sums[end] - sums[max(0, end - width)]) / min(width, end)))
        for end in ends
    ]


def _band(points: Sequence[tuple[float, float]]) -> list[tuple[float, float, float]]:
    """Smallest and largest value of each stretch, at its middle."""
    values = np.array([y for _, y in points])
    return [
        (points[(a + b) // 2][0], float(values[a:b].min()), float(values[a:b].max()))
        for a, b in stretches(len(points), _MOST_POINTS)
    ]
