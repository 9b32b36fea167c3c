"""The picture of a plan, in parts that a report draws too; only functions import matplotlib."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

from zorba.planning.plan import BlockPlan
from zorba.sizes import show_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACTIVE, IDLE, MARK, TEXT = "#3b6fa0", "#eef1f4", "#c8553d", "#333333"
"""Colours of active and idle blocks, of what stands out, and of letters."""

# More labels than this on an axis run into each other.
_MAX_LABELS = 24
# A front over a wider range of F1 than this is drawn on a logarithmic axis.
_WIDE = 4.0


def draw_plan(plan: BlockPlan, path: str | Path) -> None:
    """Writes a picture of the plan; the file's extension sets the format (PNG, SVG, PDF)."""
    from matplotlib.figure import Figure

    rows = min(max(2.2, 0.28 * len(plan.clients)), 9.0)
    columns = min(max(3.5, 0.24 * len(plan.blocks)), 9.0)
    # A figure without pyplot: no global state, and no window where there is a display.
    figure = Figure(figsize=(columns + 6.2, rows + 2.0), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=[columns, 1.7, 3.0], height_ratios=[0.9, rows])
    active = figure.add_subplot(grid[1, 0])
    draw_mask(active, plan.clients, plan.blocks, plan.mask)
    draw_coverage(figure.add_subplot(grid[0, 0], sharex=active), plan.coverage)
    draw_memory(figure.add_subplot(grid[1, 1], sharey=active), plan.memory, plan.budgets)
    _draw_front(figure.add_subplot(grid[:, 2]), plan)
    figure.savefig(path, dpi=150)


def draw_mask(axes: Axes, clients: Sequence[str], blocks: Sequence[str], mask: ArrayLike) -> None:
    """Draws who activates what, bool [N, B]: client n is between y = n and n + 1, downwards."""
    from matplotlib.colors import ListedColormap

    colours = ListedColormap([IDLE, ACTIVE])
    # With a range: a mask of ones alone would be drawn in the colour of idle blocks.
    axes.pcolormesh(mask, cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=0.8)
    axes.invert_yaxis()
    rows, columns = _labelled(len(clients)), _labelled(len(blocks))
    axes.set_yticks([n + 0.5 for n in rows], [clients[n] for n in rows])
    axes.set_xticks([b + 0.5 for b in columns], [str(b) for b in columns])
    axes.set_xlabel(f"block ({blocks[0]} to {blocks[-1]}); dark = active")
    _strip(axes, keep=())


def draw_coverage(axes: Axes, coverage: Sequence[int], seen: Sequence[float] | None = None) -> None:
    """Draws coverage as bars above ``draw_mask``; with marks at means over rounds, if ``seen``."""
    places = [b + 0.5 for b in range(len(coverage))]
    most = max([*coverage, 1])
    axes.bar(places, coverage, color=ACTIVE, width=0.8)
    if seen is not None:
        axes.plot(places, seen, "_", color=MARK, markersize=7, markeredgewidth=2)
    axes.set(ylim=(0, most * 1.1), yticks=[0, most], ylabel="clients")
    axes.set_title("coverage", fontsize=9, color=TEXT, loc="left")
    _strip(axes, keep=("left",))
    axes.tick_params(axis="x", labelbottom=False, length=0)


def draw_memory(axes: Axes, memory: Sequence[int], budgets: Sequence[int]) -> None:
    """Draws the shares of the budgets, both in bytes, as bars beside the rows of ``draw_mask``."""
    shares = [100 * used / limit for used, limit in zip(memory, budgets, strict=True)]
    axes.barh([n + 0.5 for n in range(len(shares))], shares, color=ACTIVE, height=0.6)
    axes.axvline(100, color=MARK, linewidth=1)
    if len(shares) <= _MAX_LABELS:
        for n, limit in enumerate(budgets):
            axes.text(104, n + 0.5, show_bytes(limit), va="center", fontsize=7, color=TEXT)
    axes.set(xlim=(0, 105), xticks=[0, 50, 100], xlabel="% of budget")
    _strip(axes, keep=("bottom",))
    axes.tick_params(axis="y", labelleft=False, length=0)


def _draw_front(axes: Axes, plan: BlockPlan) -> None:
    """Draws the Pareto front, and the point that the plan is."""
    from matplotlib.ticker import LogLocator

    f1, f2 = [p.f1 for p in plan.front], [100 / len(plan.clients) * p.f2 for p in plan.front]
    axes.plot(f1, f2, color=ACTIVE, linewidth=0.8, marker="o", markersize=4)
    axes.plot(f1[plan.chosen], f2[plan.chosen], "o", color=MARK, markersize=8, label="this plan")
    if f1[-1] > _WIDE * f1[0]:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    axes.set(xlabel="F1, lower converges faster", ylabel="memory, mean % of the budgets (F2)")
    axes.set(xmargin=0.12, ymargin=0.12, box_aspect=1.2, anchor="N")
    axes.set_title("Pareto front", fontsize=9, color=TEXT, loc="left")
    axes.legend(frameon=False, loc="upper right", fontsize=8)
    _strip(axes, keep=("left", "bottom"))


def _labelled(count: int) -> range:
    return range(0, count, -(-count // _MAX_LABELS))


def _strip(axes: Axes, keep: Collection[str]) -> None:
    """Removes the frame but for some sides, and makes letters small."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in keep)
    axes.tick_params(length=2.5 if keep else 0, labelsize=8, colors=TEXT)
    axes.xaxis.label.set(size=8, color=TEXT)
    axes.yaxis.label.set(size=8, color=TEXT)
