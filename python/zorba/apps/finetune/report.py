"""What a fine-tune leaves: metrics.json, a picture, and a table on the terminal."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zorba.apps.finetune.objective import Score


@dataclass
class Curves:
    """What was seen over the steps.

    Attributes:
        losses: of each step's batch.
        scores: of the evaluation data, by number of steps done.
        skipped: steps whose loss was not finite.
    """

    losses: list[float] = field(default_factory=list)
    scores: list[tuple[int, Score]] = field(default_factory=list)
    skipped: int = 0


def write_report(folder: Path, summary: dict[str, Any], curves: Curves) -> list[Path]:
    """Writes metrics.json and loss.png, and returns their paths."""
    paths = [folder / "metrics.json", folder / "loss.png"]
    content = {
        **summary,
        "losses": curves.losses,
        "evaluations": [
            {"step": step, "loss": s.loss, "accuracy": s.accuracy} for step, s in curves.scores
        ],
    }
    paths[0].write_text(json.dumps(content, indent=2, default=str) + "\n")
    draw(paths[1], curves)
    return paths


def draw(path: Path, curves: Curves) -> None:
    """Draws loss, and accuracy where there is one, over the steps."""
    from matplotlib.figure import Figure

    accurate = [(step, s.accuracy) for step, s in curves.scores if s.accuracy is not None]
    figure = Figure(figsize=(9 if accurate else 5, 3.6), layout="constrained")
    panels = figure.subplots(1, 2 if accurate else 1, squeeze=False)[0]
    width = max(1, len(curves.losses) // 20)
    steps = range(1, len(curves.losses) + 1)
    left = panels[0]
    left.plot(steps, curves.losses, color="#cccccc", linewidth=1, label="batch")
    smooth = [
        sum(part) / len(part)
        for i in range(len(curves.losses))
        if (part := curves.losses[max(0, i + 1 - width) : i + 1])
    ]
    left.plot(steps, smooth, color="#1f77b4", linewidth=2, label=f"mean of {width}")
    if curves.scores:
        at = [step for step, _ in curves.scores]
        values = [s.loss for _, s in curves.scores]
        left.plot(at, values, "o-", color="#d62728", markersize=4, label="evaluation")
    left.set(xlabel="step", ylabel="loss", title="Loss")
    left.legend(frameon=False)
    if accurate:
        right = panels[1]
        right.plot(*zip(*accurate, strict=True), "o-", color="#d62728", markersize=4)
        right.annotate(
            f"{accurate[-1][1]:.3f}", accurate[-1], textcoords="offset points", xytext=(6, -3)
        )
        right.set(xlabel="step", title="Accuracy on the evaluation data")
        right.margins(x=0.12)
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def lines(summary: dict[str, Any], curves: Curves) -> list[tuple[str, str]]:
    """Returns name and value of each line of the summary table."""
    rows = []
    if curves.scores:
        first, last = curves.scores[0][1], curves.scores[-1][1]
        if first.accuracy is not None and last.accuracy is not None:
            rows.append(("accuracy", f"{first.accuracy:.3f} before, {last.accuracy:.3f} after"))
        rows.append(("evaluation loss", f"{first.loss:.4f} before, {last.loss:.4f} after"))
    tenth = max(1, len(curves.losses) // 10)
    if curves.losses:
        start, end = (
            sum(part) / len(part) for part in (curves.losses[:tenth], curves.losses[-tenth:])
        )
        rows.append(("training loss", f"{start:.4f} in the first tenth, {end:.4f} in the last"))
    s = summary
    rows.append(
        (
            "a step",
            f"{1e3 * s['step_seconds']:.0f} ms, {1e3 * s['kernel_seconds']:.1f} ms of it passes "
            "over weights",
        )
    )
    if curves.skipped:
        rows.append(("skipped", f"{curves.skipped} steps, whose loss was not finite"))
    rows.append(("peak memory", f"{s['peak_memory_bytes'] / 2**20:,.0f} MiB of the process"))
    if "trajectory_bytes" in s:
        rows.append(("trajectory", f"{s['trajectory_bytes']:,} bytes for {s['steps']} steps"))
    return rows
