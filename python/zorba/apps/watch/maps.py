"""Pictures of a run by client and block: activation with memory, coverage, and status."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from zorba.apps.watch.figures import finish_rounds, legend_above, short
from zorba.apps.watch.records import Status
from zorba.apps.watch.state import RunState
from zorba.planning.picture import IDLE, MARK, draw_coverage, draw_mask, draw_memory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

MOST_ROWS = 200
"""Clients in a picture, and blocks."""

_MOST_COLUMNS = 384
# From pale to dark as the status gets worse: colours alone are not for every eye.
_STATUS_COLOURS = (IDLE, "#a9cbe4", "#63b491", "#e8bb5f", MARK, "#7d1128")


def activation_picture(axes: Axes, state: RunState) -> str:
    """Draws who activates which block under the plan in force, with coverage and memory beside."""
    plan = state.plan
    if not plan.clients or not plan.blocks:
        return ""
    clients, blocks = plan.clients[:MOST_ROWS], plan.blocks[:MOST_ROWS]
    mask = plan.mask[: len(clients), : len(blocks)]
    place: Any = axes.get_subplotspec()
    grid = place.subgridspec(2, 2, width_ratios=[6, 1], height_ratios=[3, len(clients)])
    axes.set_subplotspec(grid[1, 0])
    draw_mask(axes, list(map(short, clients)), list(map(short, blocks)), mask)
    for mesh in axes.collections:
        mesh.set_rasterized(True)  # a path for each of 40,000 cells would make 5 MB of SVG
    seen = _coverages(state)[:, : len(blocks)]
    above = axes.figure.add_subplot(grid[0, 0], sharex=axes)
    means = seen.mean(axis=0).tolist() if len(seen) else None
    draw_coverage(above, plan.mask.sum(axis=0)[: len(blocks)].tolist(), means)
    words = "Bars: coverage of the plan. Marks: mean coverage of the rounds."
    memory = [state.memory(name) for name in clients]
    budgets = [plan.budgets.get(name, 0) for name in clients]
    if all(budgets) and None not in memory:
        beside = axes.figure.add_subplot(grid[1, 1], sharey=axes)
        draw_memory(beside, [count or 0 for count in memory], budgets)
        words += " At the right: memory, as measured where a client told it, else as predicted."
    return words + _cut_words(len(plan.clients), "clients") + _cut_words(len(plan.blocks), "blocks")


def coverage_picture(axes: Axes, state: RunState) -> str:
    """Draws how many clients covered each block over the rounds."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    coverages = _coverages(state)
    if not coverages.size:
        return ""
    image, words = _draw_map(axes, state, state.plan.blocks, coverages.T, np.minimum)
    colours = LinearSegmentedColormap.from_list("coverage", ["#cfe1f0", "#1f4e79"])
    image.set(cmap=colours.with_extremes(under=MARK), clim=(0.5, max(1.5, coverages.max())))
    ticks = MaxNLocator(5, integer=True)
    axes.figure.colorbar(image, ax=axes, extend="min", label="clients; red: nobody", ticks=ticks)
    return f"Clients whose scalars were used, for each block.{words}"


def status_picture(axes: Axes, state: RunState) -> str:
    """Draws what each client did over the rounds."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    if not state.rounds or not state.clients:
        return ""
    history = np.array([np.frombuffer(c.history, np.uint8) for c in state.clients.values()])
    image, words = _draw_map(axes, state, list(state.clients), history, np.maximum)
    image.set(cmap=ListedColormap(_STATUS_COLOURS), clim=(-0.5, len(Status) - 0.5))
    there = [Status(value) for value in np.unique(history)]
    legend_above(axes, [Patch(color=_STATUS_COLOURS[s], label=s.words) for s in there])
    return f"What each client did in each round.{words}"


def _draw_map(
    axes: Axes,
    state: RunState,
    names: Sequence[str],
    values: npt.NDArray[np.integer[Any]],
    worst: np.ufunc,
) -> tuple[AxesImage, str]:
    """Draws values, [names, rounds], and returns the image, and words on what is left out.

    Args:
        axes: to draw on.
        state: of the run.
        names: of the rows.
        values: of each row in each round.
        worst: picks one value out of a stretch of rounds.
    """
    count = values.shape[1]
    columns = min(count, _MOST_COLUMNS)
    begins = [count * column // columns for column in range(columns)]
    shown = worst.reduceat(values[:MOST_ROWS], begins, axis=1)
    first, last = state.rounds[0].number - 0.5, state.rounds[-1].number + 0.5
    edges = (first, last, len(shown) - 0.5, -0.5)
    image = axes.imshow(shown, aspect="auto", interpolation="none", extent=edges)
    finish_rounds(axes, state)
    axes.set_xlim(first, last)
    _name_rows(axes, names[:MOST_ROWS])
    words = _cut_words(len(names), "rows")
    if columns < count:
        words = f" Each column is the worst of about {round(count / columns)} rounds.{words}"
    return image, words


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), list(map(short, names)))
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)


def _coverages(state: RunState) -> npt.NDArray[np.int64]:
    """Returns the coverage of the rounds under a plan with the blocks of now, [rounds, blocks]."""
    blocks = len(state.plan.blocks)
    rows = [r.coverage for r in state.rounds if len(r.coverage) == blocks]
    return np.array(rows, dtype=np.int64).reshape(len(rows), blocks)


def _cut_words(count: int, name: str) -> str:
    return (
        f" Only the first {MOST_ROWS} of {count:,} {name} are shown." if count > MOST_ROWS else ""
    )
