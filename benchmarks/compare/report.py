"""The table and the pictures of the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.compare.loop import ROWS, Row
from benchmarks.compare.settings import PLANS, SHARES
from benchmarks.experiment import picture

MIB = 2**20


def label_of(row: Row) -> str:
    title = PLANS[row.method].title
    if row.method == "zorba":
        return f"{title}, {SHARES[row.client]:.0%} of the blocks"
    return ", ".join([title, *(name for name, _ in row.options)])


def print_table(console: Console, data: dict[str, Any]) -> None:
    table = Table(title="SmolLM2-135M, SST-2, 8 clients that are not alike")
    table.add_column("client of", no_wrap=True)
    for name in ("accuracy", "AUC", "rounds", "peak MiB", "of DeComFL", "up", "down", "s"):
        table.add_column(name, justify="right")
    methods, clients = data["methods"], data["clients"]
    full = clients.get(Row("decomfl").key)
    for row in ROWS:
        run, seen = methods.get(row.method), clients.get(row.key)
        cells = ["-"] * 8
        if run and not row.options:  # other options were measured, not trained with
            end = max(run["scores"], key=lambda score: score["sentences"])  # on the whole set
            cells[:3] = [f"{end['accuracy']:.3f}", f"{end['auc']:.3f}", str(len(run["rounds"]))]
        if seen:
            cells[3] = f"{seen['peak_bytes'] / MIB:,.0f}"
            cells[4] = f"{seen['peak_bytes'] / full['peak_bytes']:.2f}" if full else "-"
            cells[7] = f"{seen['seconds_round']:.1f}"
        if run:
            cells[5:7] = [_traffic(run, way) for way in ("up", "down")]
        table.add_row(label_of(row), *cells)
    table.caption = "up, down: bytes of a client and round (as encoded); s: seconds of a round"
    if start := data["start"]:
        table.caption += f"\nbefore: accuracy {start['accuracy']:.3f}, AUC {start['auc']:.3f}"
    console.print(table)


def mean_of(run: dict[str, Any], key: str) -> float:
    """Returns the mean of a round's figure, the first round left out where there are more."""
    values = [r[key] for r in run["rounds"]]
    values = values[1:] or values
    return sum(values) / len(values)


def draw_accuracy(path: Path, data: dict[str, Any]) -> None:
    with picture(path, 9.5, 3.8, 2) as (left, right):
        for name, run in data["methods"].items():
            sentences = min(score["sentences"] for score in run["scores"])
            points = [score for score in run["scores"] if score["sentences"] == sentences]
            at, color = [p["round"] for p in points], PLANS[name].color
            accuracies = [p["accuracy"] for p in points]
            left.plot(at, accuracies, "o-", markersize=4, color=color, label=PLANS[name].title)
            losses = _smooth([r["loss"] for r in run["rounds"]])
            right.plot(range(1, len(losses) + 1), losses, linewidth=1.6, color=color)
        left.set(xlabel="round", title="SST-2 accuracy")
        right.set(xlabel="round", title="loss of the clients' batches (mean of 5 rounds)")


def draw_costs(path: Path, data: dict[str, Any]) -> None:
    rows = [row for row in ROWS if row.key in data["clients"]][::-1]
    seen = [data["clients"][row.key] for row in rows]
    labels, colors = [label_of(row) for row in rows], [PLANS[row.method].color for row in rows]
    moved = [
        (f"{PLANS[name].title.split(' (')[0]}, {way}", mean_of(run, way), PLANS[name].color)
        for name, run in list(data["methods"].items())[::-1]
        if mean_of(run, "up") > 0
        for way in ("down", "up")
    ]
    names, heights, tints = ([row[k] for row in moved] for k in range(3))
    with picture(path, 12.5, 4.2, 3, width_ratios=[1.25, 1, 1]) as (left, right, last):
        _bars(left, labels, [c["peak_bytes"] / MIB for c in seen], colors, "{:,.0f}")
        left.set(title="peak memory of a client, MiB")
        _bars(right, [""] * len(rows), [c["seconds_round"] for c in seen], colors, "{:.1f}")
        right.set(title="time of a client and round, s")
        _bars(last, names, heights, tints, "{:,.0f}")
        last.set(xscale="log", title="bytes of a client and round")
        last.set_xlim(1, 30 * max(heights, default=1))


def _traffic(run: dict[str, Any], way: str) -> str:
    numbers, encoded = mean_of(run, way), mean_of(run, f"{way}_encoded")
    return f"{numbers:,.0f}" + (f" ({encoded:,.0f})" if encoded != numbers else "")


def _bars(
    axes: Any, labels: list[str], values: list[float], colors: list[str], pattern: str
) -> None:
    axes.barh(range(len(labels)), values, color=colors, height=0.65)
    axes.grid(visible=False, axis="y")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.bar_label(axes.containers[0], [pattern.format(v) for v in values], padding=4, fontsize=8)
    axes.margins(x=0.15)


def _smooth(values: list[float], width: int = 5) -> list[float]:
    recent = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [sum(some) / len(some) for some in recent]
