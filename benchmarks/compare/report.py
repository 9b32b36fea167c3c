"""The table and the pictures of the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import curves
from benchmarks.compare.apart import ROWS, Row
from benchmarks.compare.settings import PLANS, SHARES

COLORS = {
    "zorba": "#c8553d",
    "decomfl": "#3b6fa0",
    "fedkseed": "#5b9e6f",
    "mezo": "#888888",
    "fedavg-lora": "#8a63a6",
}
MIB = 2**20


def label_of(row: Row, short: bool = False) -> str:
    """Returns what a measured client is called."""
    plan = PLANS[row.method]
    title = plan.short if short else plan.title
    if row.method == "zorba":
        return f"{title}, {SHARES[row.client]:.0%}" + ("" if short else " of the blocks")
    return title + "".join(f", {name}" for name, _ in row.options)


def print_table(console: Console, data: dict[str, Any]) -> None:
    """Prints what is there: a row for each measured client."""
    table = Table(title="SmolLM2-135M, SST-2, 8 clients that are not alike")
    table.add_column("client of", no_wrap=True)
    for name in ("accuracy", "AUC", "rounds", "peak MiB", "of DeComFL", "up", "down", "s"):
        table.add_column(name, justify="right")
    methods, clients = data["methods"], data["clients"]
    full = clients.get(Row("decomfl").key)
    for row in ROWS:
        run, seen = methods.get(row.method), clients.get(row.key)
        scored = run and not row.options  # other options were measured, not trained with
        cells = [label_of(row, short=True), *(_curve_cells(run) if scored else ["-"] * 3)]
        if seen:
            share = f"{seen['peak_bytes'] / full['peak_bytes']:.2f}" if full else "-"
            cells += [f"{seen['peak_bytes'] / MIB:,.0f}", share]
        else:
            cells += ["-"] * 2
        cells += _traffic_cells(run) if run else ["-"] * 2
        cells.append(f"{seen['seconds_round']:.1f}" if seen else "-")
        table.add_row(*cells)
    table.caption = "up, down: bytes of a client and round (as encoded); s: seconds of a round"
    if data["start"]:
        start = data["start"]
        table.caption += f"\nbefore: accuracy {start['accuracy']:.3f}, AUC {start['auc']:.3f}"
    console.print(table)


def end_of(run: dict[str, Any]) -> dict[str, Any]:
    """Returns the last score, on the whole evaluation set."""
    score: dict[str, Any] = max(run["scores"], key=lambda score: score["sentences"])
    return score


def mean_of(run: dict[str, Any], key: str) -> float:
    """Returns the mean of a round's figure, the first round left out where there are more."""
    values = [r[key] for r in run["rounds"]]
    values = values[1:] or values
    return sum(values) / len(values)


def draw_accuracy(path: Path, data: dict[str, Any]) -> None:
    """Draws accuracy and training loss against rounds."""
    figure, (left, right) = curves.panels(9.5, 3.8, 2)
    for name, run in data["methods"].items():
        sentences = min(score["sentences"] for score in run["scores"])
        points = [score for score in run["scores"] if score["sentences"] == sentences]
        style = {"color": COLORS[name], "label": PLANS[name].title}
        at = [p["round"] for p in points]
        left.plot(at, [p["accuracy"] for p in points], marker="o", markersize=4, **style)
        losses = [r["loss"] for r in run["rounds"]]
        right.plot(range(1, len(losses) + 1), _smooth(losses), linewidth=1.6, **style)
    left.set(xlabel="round", title="SST-2 accuracy")
    right.set(xlabel="round", title="loss of the clients' batches (mean of 5 rounds)")
    left.legend(frameon=False, fontsize=8)
    curves.save(figure, path)


def draw_costs(path: Path, data: dict[str, Any]) -> None:
    """Draws memory and time of a client, and what it sends and gets."""
    figure, (left, right, last) = curves.panels(12.5, 4.2, 3, width_ratios=[1.25, 1, 1])
    rows = [row for row in ROWS if row.key in data["clients"]][::-1]
    seen = [data["clients"][row.key] for row in rows]
    labels, colors = [label_of(row) for row in rows], [COLORS[row.method] for row in rows]
    _bars(left, labels, [c["peak_bytes"] / MIB for c in seen], colors, "{:,.0f}")
    left.set(title="peak memory of a client, MiB", yticks=range(len(labels)))
    left.set_yticklabels(labels, fontsize=8)
    _bars(right, labels, [c["seconds_round"] for c in seen], colors, "{:.1f}")
    right.set(title="time of a client and round, s", yticks=[])
    runs = [(name, run) for name, run in data["methods"].items() if mean_of(run, "up") > 0][::-1]
    names, heights, tints = [], [], []
    for name, run in runs:
        for way in ("down", "up"):
            names.append(f"{PLANS[name].title.split(' (')[0]}, {way}")
            heights.append(mean_of(run, way))
            tints.append(COLORS[name])
    _bars(last, names, heights, tints, "{:,.0f}")
    last.set(xscale="log", title="bytes of a client and round", yticks=range(len(names)))
    last.set_xlim(1, 30 * max(heights, default=1))
    last.set_yticklabels(names, fontsize=8)
    curves.save(figure, path)


def _curve_cells(run: dict[str, Any]) -> list[str]:
    end = end_of(run)
    return [f"{end['accuracy']:.3f}", f"{end['auc']:.3f}", str(len(run["rounds"]))]


def _traffic_cells(run: dict[str, Any]) -> list[str]:
    cells = []
    for way in ("up", "down"):
        numbers, encoded = mean_of(run, way), mean_of(run, f"{way}_encoded")
        more = f" ({encoded:,.0f})" if encoded != numbers else ""
        cells.append(f"{numbers:,.0f}{more}")
    return cells


def _bars(
    axes: Any, labels: list[str], values: list[float], colors: list[str], pattern: str
) -> None:
    axes.barh(range(len(labels)), values, color=colors, height=0.65)
    axes.grid(visible=False, axis="y")
    axes.bar_label(axes.containers[0], [pattern.format(v) for v in values], padding=4, fontsize=8)
    axes.margins(x=0.15)


def _smooth(values: list[float], width: int = 5) -> list[float]:
    recent = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [sum(some) / len(some) for some in recent]
