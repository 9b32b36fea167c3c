"""A picture of a plan: who activates what, and the front that it was picked from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from zorba.apps.plan.budgets import show_bytes
from zorba.planning.plan import BlockPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ACTIVE, _IDLE, _MARK, _TEXT = "#3b6fa0", "#eef1f4", "#c8553d", "#333333"
# More labels than this on an axis run into each other.
_MAX_LABELS = 24
# A front over a wider range of F1 than this is drawn on a logarithmic axis.
_WIDE = 4.0
_FRONT_ASPECT = 1.2


def draw_plan(plan: BlockPlan, path: str | Path) -> None:
    """Writes a picture of the plan; the file's extension sets the format (PNG, SVG, PDF)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = min(max(2.2, 0.28 * len(plan.clients)), 9.0)
    columns = min(max(3.5, 0.24 * len(plan.blocks)), 9.0)
    figure = Figure(figsize=(columns + 6.2, rows + 2.0), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 3, width_ratios=[columns, 1.7, 3.0], height_ratios=[0.9, rows])
    share = grid[1, 0]
    active = figure.add_subplot(share)
    _draw_map(active, plan)
    _draw_coverage(figure.add_subplot(grid[0, 0], sharex=active), plan)
    _draw_memory(figure.add_subplot(grid[1, 1], sharey=active), plan)
    _draw_front(figure.add_subplot(grid[:, 2]), plan)
    figure.savefig(path, dpi=150)


def _draw_map(axes: Axes, plan: BlockPlan) -> None:
    from matplotlib.colors import ListedColormap

    axes.pcolormesh(
        plan.mask.astype(float),
        cmap=ListedColormap([_IDLE, _ACTIVE]),
        vmin=0,
        vmax=1,
        edgecolors="white",
        linewidth=0.8,
    )
    axes.invert_yaxis()
    axes.set_yticks([n + 0.5 for n in _labelled(len(plan.clients))])
    axes.set_yticklabels([plan.clients[n] for n in _labelled(len(plan.clients))])
    axes.set_xticks([b + 0.5 for b in _labelled(len(plan.blocks))])
    axes.set_xticklabels([str(b) for b in _labelled(len(plan.blocks))])
    axes.set_xlabel(f"block ({plan.blocks[0]} to {plan.blocks[-1]}); dark = active")
    _strip(axes, keep=())


def _draw_coverage(axes: Axes, plan: BlockPlan) -> None:
    axes.bar([b + 0.5 for b in range(len(plan.blocks))], plan.coverage, color=_ACTIVE, width=0.8)
    axes.set_ylim(0, max(plan.coverage) * 1.1)
    axes.set_yticks([0, max(plan.coverage)])
    axes.set_ylabel("clients")
    axes.set_title("coverage", fontsize=9, color=_TEXT, loc="left")
    _strip(axes, keep=("left",))
    axes.tick_params(axis="x", labelbottom=False, length=0)


def _draw_memory(axes: Axes, plan: BlockPlan) -> None:
    shares = [100 * used / limit for used, limit in zip(plan.memory, plan.budgets, strict=True)]
    axes.barh([n + 0.5 for n in range(len(shares))], shares, color=_ACTIVE, height=0.6)
    axes.axvline(100, color=_MARK, linewidth=1)
    if len(shares) <= _MAX_LABELS:
        for n, limit in enumerate(plan.budgets):
            axes.text(104, n + 0.5, show_bytes(limit), va="center", fontsize=7, color=_TEXT)
    axes.set_xlim(0, 105)
    axes.set_xticks([0, 50, 100])
    axes.set_xlabel("% of budget")
    _strip(axes, keep=("bottom",))
    axes.tick_params(axis="y", labelleft=False, length=0)


def _draw_front(axes: Axes, plan: BlockPlan) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    share = 100 / len(plan.clients)
    f1, f2 = [p.f1 for p in plan.front], [share * p.f2 for p in plan.front]
    axes.plot(f1, f2, color=_ACTIVE, linewidth=0.8, marker="o", markersize=4)
    chosen = plan.point.f1, share * plan.point.f2
    axes.plot(*chosen, "o", color=_MARK, markersize=8, label="this plan")
    if f1[-1] > _WIDE * f1[0]:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("F1, lower converges faster")
    axes.set_ylabel("memory, mean % of the budgets (F2)")
    axes.set_title("Pareto front", fontsize=9, color=_TEXT, loc="left")
    axes.margins(0.12)
    axes.set_box_aspect(_FRONT_ASPECT)
    axes.set_anchor("N")
    axes.legend(frameon=False, loc="upper right", fontsize=8)
    _strip(axes, keep=("left", "bottom"))


def _labelled(count: int) -> range:
    return range(0, count, -(-count // _MAX_LABELS))


def _strip(axes: Axes, keep: tuple[str, ...]) -> None:
    for side, spine in axes.spines.items():
        spine.set_visible(side in keep)
    axes.tick_params(length=0 if not keep else 2.5, labelsize=8, colors=_TEXT)
    axes.xaxis.label.set(size=8, color=_TEXT)
    axes.yaxis.label.set(size=8, color=_TEXT)
