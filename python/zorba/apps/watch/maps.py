"""Pictures of a run by client and block: activation, coverage, memory, bytes, faults."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from zorba.apps.watch.curves import legend
from zorba.apps.watch.fields import size
from zorba.apps.watch.records import Status
from zorba.apps.watch.state import RunState
from zorba.apps.watch.svg import Svg, short, stretches

MOST_ROWS = 200
"""Clients in a picture, and blocks."""
_WIDTH, _LEFT, _RIGHT = 920.0, 140.0, 908.0
_MOST_COLUMNS = 384  # two units each
_SHADES = 5
_HEIGHTS = (0.2, 0.6, 0.6, 0.6, 1.0, 1.0)
"""Of the marks of each status, as shares of a row: colours alone are not for every eye."""


def activation_picture(state: RunState) -> tuple[Markup, str]:
    """Returns who activates which block under the plan in force, with the coverage above."""
    plan = state.plan
    names, blocks = plan.clients[:MOST_ROWS], plan.blocks
    if not names or not blocks:
        return Markup(), ""
    step = min(28.0, (_RIGHT - 40 - _LEFT) / len(blocks))
    right = _LEFT + step * len(blocks)
    row, top, bars = _row_height(len(names)), 74.0, 44.0
    bottom = top + row * len(names)
    svg = Svg(_WIDTH, bottom + 28, "which client activates which block", fixed=True)
    coverage = plan.coverage
    most = max(1, int(coverage.max()))
    seen = _mean_coverage(state)
    svg.text(_LEFT - 8, 26, "coverage", "tick", "end")
    svg.text(_LEFT - 8, 40, f"of {most} at most", "tick", "end")
    for b, count in enumerate(coverage.tolist()):
        x, width = _LEFT + step * b, max(1.0, step - 1.5)
        hint = f"{blocks[b]}: {count} clients"
        if seen is not None:
            hint += f" in the plan, {seen[b]:.1f} in the mean of the rounds"
        for value, class_ in ((count, "planned"), (seen[b] if seen is not None else 0.0, "seen")):
            height = bars * value / most
            y = top - 14 - height
            svg.add("rect", x=x, y=y, width=width, height=height, class_=class_, hint=hint)
    for n, name in enumerate(names):
        y, active = top + row * n, plan.mask[n]
        svg.add("rect", x=_LEFT, y=y, width=right - _LEFT, height=row - 1.5, class_="idle")
        runs = [(_LEFT + step * a, _LEFT + step * b) for a, b in _runs(active, True)]
        svg.cells(runs, y, row - 1.5, "active")
        _name(svg, name, y, row, f"{name}: {int(active.sum())} of {len(blocks)} blocks")
        svg.text(right + 8, y + row * 0.5 + 4, str(int(active.sum())), "tick")
    if step >= 4:
        for b in range(1, len(blocks)):
            x = _LEFT + step * b
            svg.add("line", x1=x, x2=x, y1=top, y2=bottom, class_="slit")
    for b in range(0, len(blocks), max(1, round(30 / step))):
        svg.text(_LEFT + step * (b + 0.5), bottom + 15, str(b), "tick", "middle")
    words = legend([("active", "active"), ("idle", "idle"), ("coverage of the plan", "planned")])
    if seen is not None:
        words += Markup(" ") + legend([("coverage in the mean of the rounds", "seen")])
    ends = blocks[0] if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}"
    words += Markup(" Blocks: {}.").format(ends)
    return svg.markup(), words + _cut_words(len(plan.clients), "clients")


def coverage_picture(state: RunState) -> tuple[Markup, str]:
    """Returns how many clients covered each block over the rounds."""
    blocks = state.plan.blocks[:MOST_ROWS]
    counts = [r.coverage for r in state.rounds if len(r.coverage) == len(state.plan.blocks)]
    if not counts or not blocks:
        return Markup(), ""
    parts = stretches(len(counts), _MOST_COLUMNS)
    low = np.array([np.min(counts[a:b], axis=0) for a, b in parts])  # [parts, blocks]
    most = max(1, int(low.max()))
    shade = np.where(low == 0, 0, 1 + (low - 1) * _SHADES // most)
    step, row = (_RIGHT - _LEFT) / len(parts), _row_height(len(blocks))
    svg = Svg(_WIDTH, 34 + row * len(blocks), "coverage of each block over the rounds", fixed=True)
    for b, name in enumerate(blocks):
        y = 4 + row * b
        for level in range(_SHADES + 1):
            runs = [(_LEFT + step * i, _LEFT + step * j) for i, j in _runs(shade[:, b], level)]
            svg.cells(runs, y, row - (1.5 if row > 8 else 0.5), f"shade{level}")
        _name(svg, name, y, row, f"{name}: covered by {low[:, b].mean():.1f} clients in the mean")
    _rounds_axis(svg, state, step, parts, 20 + row * len(blocks))
    entries = [("nobody", "shade0"), ("1 client", "shade1"), (f"{most} clients", f"shade{_SHADES}")]
    words = legend(entries[: 2 if most == 1 else 3])
    if len(parts) < len(counts):
        words += Markup(" Each column is the worst of about {} rounds.").format(
            round(len(counts) / len(parts))
        )
    return svg.markup(), words + _cut_words(len(state.plan.blocks), "blocks")


def memory_picture(state: RunState) -> tuple[Markup, str]:
    """Returns budget, predicted and measured memory of each client."""
    plan = state.plan
    measured = {n: c.measured_bytes for n, c in state.clients.items() if c.measured_bytes}
    known = [n for n in state.clients if n in plan.budgets or n in plan.memory or n in measured]
    if not known:
        return Markup(), ""
    names = known[:MOST_ROWS]
    most = max(1, *plan.budgets.values(), *plan.memory.values(), *measured.values())
    row = _row_height(len(names))
    svg = Svg(_WIDTH, 10 + row * len(names), "memory of each client", fixed=True)
    scale = (_RIGHT - 130 - _LEFT) / most
    for n, name in enumerate(names):
        y, height = 4 + row * n, row - 3
        budget, predicted = plan.budgets.get(name), plan.memory.get(name)
        told = measured.get(name)
        facts = [f"{size(predicted)} predicted"] if predicted is not None else []
        facts += [f"{size(told)} measured"] if told is not None else []
        facts += [f"budget {size(budget)}"] if budget is not None else []
        hint = f"{name}: {', '.join(facts)}"
        for value, class_ in ((budget, "idle"), (predicted, "active")):
            if value is not None:
                width = value * scale
                svg.add("rect", x=_LEFT, y=y, width=width, height=height, class_=class_, hint=hint)
        over = budget is not None and max(told or 0, predicted or 0) > budget
        if told is not None:
            x = _LEFT + told * scale - 1.5
            class_ = "over" if over else "told"
            svg.add("rect", x=x, y=y - 1, width=3, height=height + 2, class_=class_, hint=hint)
        _name(svg, name, y, row, hint)
        used = told if told is not None else predicted
        text = size(used) if used is not None else ""
        if used is not None and budget:
            text += f", {used / budget:.0%}"
        svg.text(_RIGHT - 122, y + row * 0.5 + 3, text, "value over" if over else "tick")
    entries = [("budget", "idle"), ("predicted by the plan", "active")]
    entries += [("measured at the client", "told")] if measured else []
    words = legend(entries)
    if not measured:
        words += Markup(" No client told what it takes.")
    return svg.markup(), words + _cut_words(len(known), "clients")


def bytes_picture(state: RunState) -> tuple[Markup, str]:
    """Returns what each client sent and got in the whole run."""
    names = list(state.clients)[:MOST_ROWS]
    most = max((max(c.bytes_up, c.bytes_down) for c in state.clients.values()), default=0)
    if not most:
        return Markup(), ""
    row = max(14.0, _row_height(len(names)))
    svg = Svg(_WIDTH, 10 + row * len(names), "bytes of each client", fixed=True)
    scale = (_RIGHT - 130 - _LEFT) / most
    for n, name in enumerate(names):
        client, y, height = state.clients[name], 4 + row * n, (row - 3) / 2
        hint = f"{name}: {size(client.bytes_down)} down, {size(client.bytes_up)} up"
        for k, (count, class_) in enumerate(((client.bytes_down, "a"), (client.bytes_up, "b"))):
            svg.add(
                "rect", x=_LEFT, y=y + k * height, width=count * scale, height=height,
                class_=f"fill {class_}", hint=hint,
            )  # fmt: skip
        _name(svg, name, y, row, hint)
        text = f"{size(client.bytes_down)} / {size(client.bytes_up)}"
        svg.text(_RIGHT - 122, y + row * 0.5 + 3, text, "tick")
    words = legend([("down to the client", "a"), ("up to the server", "b")])
    words += Markup(" Encoded messages of all rounds, greetings included.")
    return svg.markup(), words + _cut_words(len(state.clients), "clients")


def timeline_picture(state: RunState) -> tuple[Markup, str]:
    """Returns what each client did over the rounds, faults above all."""
    names = list(state.clients)[:MOST_ROWS]
    if not state.rounds or not names:
        return Markup(), ""
    parts = stretches(len(state.rounds), _MOST_COLUMNS)
    begins = [a for a, _ in parts]
    step, row = (_RIGHT - _LEFT) / len(parts), _row_height(len(names))
    svg = Svg(_WIDTH, 34 + row * len(names), "what each client did over the rounds", fixed=True)
    for n, name in enumerate(names):
        client, y, full = state.clients[name], 4 + row * n, row - 2
        worst = np.maximum.reduceat(np.frombuffer(bytes(client.history), dtype=np.uint8), begins)
        for status in Status:
            runs = [(_LEFT + step * i, _LEFT + step * j) for i, j in _runs(worst, status)]
            height = full * _HEIGHTS[status]
            svg.cells(runs, y + full - height, height, f"status{int(status)}")
        hint = f"{name}: measured in {client.rounds_measured} of {len(state.rounds)} rounds"
        _name(svg, name, y, row, f"{hint}, failed or refused in {client.rounds_failed}")
    _rounds_axis(svg, state, step, parts, 20 + row * len(names))
    there = {s for c in state.clients.values() for s in Status if c.history.count(s)}
    words = legend([(s.words, f"status{int(s)}") for s in Status if s in there])
    if len(parts) < len(state.rounds):
        words += Markup(" Each column is the worst of about {} rounds.").format(
            round(len(state.rounds) / len(parts))
        )
    return svg.markup(), words + _cut_words(len(state.clients), "clients")


def _name(svg: Svg, name: str, y: float, row: float, hint: str) -> None:
    svg.add(
        "text", text=short(name), x=_LEFT - 8, y=y + row * 0.5 + 3, text_anchor="end",
        class_="" if row >= 16 else "small", hint=hint,
    )  # fmt: skip


def _rounds_axis(
    svg: Svg, state: RunState, step: float, parts: Sequence[tuple[int, int]], y: float
) -> None:
    """Writes some rounds' numbers below a picture, and marks where the server started again."""
    for i in range(0, len(parts), max(1, round(90 / step))):
        number = state.rounds[parts[i][0]].number
        svg.text(_LEFT + step * (i + 0.5), y, f"{number:,}", "tick", "middle")
    svg.text(_LEFT - 8, y, "round", "tick", "end")
    for _, after in state.starts[1:]:
        at = next((i for i, (a, _) in enumerate(parts) if state.rounds[a].number > after), None)
        if at is not None:
            x, hint = _LEFT + step * at, f"the server started again after round {after}"
            svg.add("line", x1=x, x2=x, y1=0, y2=y - 12, class_="mark", hint=hint)


def _mean_coverage(state: RunState) -> npt.NDArray[np.float64] | None:
    counts = [r.coverage for r in state.rounds if len(r.coverage) == len(state.plan.blocks)]
    return np.mean(counts, axis=0) if counts else None


def _runs(values: npt.NDArray[np.generic], wanted: object) -> list[tuple[int, int]]:
    """Returns [begin, end) of each stretch of a value."""
    found, at = [], 0
    for value, group in groupby(values.tolist()):
        length = sum(1 for _ in group)
        if value == wanted:
            found.append((at, at + length))
        at += length
    return found


def _row_height(rows: int) -> float:
    return 18.0 if rows <= 16 else 14.0 if rows <= 48 else 11.0


def _cut_words(count: int, what: str) -> Markup:
    if count <= MOST_ROWS:
        return Markup()
    return Markup(" Only the first {} of {:,} {} are shown.").format(MOST_ROWS, count, what)
