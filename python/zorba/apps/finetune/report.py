"""The report of a fine-tune: metrics.json, a picture, and a table on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Metrics = dict[str, Any]
"""Content of metrics.json: ``losses`` of the steps, ``evaluations``, and single figures."""


def write_report(folder: Path, metrics: Metrics) -> list[Path]:
    """Writes metrics.json and loss.png, and returns their paths."""
    paths = [folder / "metrics.json", folder / "loss.png"]
    paths[0].write_text(json.dumps(metrics, indent=2, default=str) + "\n")
    _draw(paths[1], metrics["losses"], metrics["evaluations"])
    return paths


def _draw(path: Path, losses: list[float], evaluations: list[dict[str, Any]]) -> None:
    """Draws loss, and accuracy where there is one, over the steps."""
    from matplotlib.figure import Figure

    has_accuracy = bool(evaluations) and evaluations[0]["accuracy"] is not None
    figure = Figure(figsize=(9 if has_accuracy else 5, 3.6), layout="constrained")
    panels = figure.subplots(1, 2 if has_accuracy else 1, squeeze=False)[0]
    panels[0].plot(range(1, len(losses) + 1), losses, color="#cccccc", label="batch")
    # Single batches are too noisy to see a trend in: a mean over a twentieth of the run shows it.
    width = max(1, len(losses) // 20)
    ends = range(width, len(losses) + 1)
    means = [sum(losses[end - width : end]) / width for end in ends]
    panels[0].plot(ends, means, color="#1f77b4", linewidth=2, label=f"mean of {width}")
    steps = [entry["step"] for entry in evaluations]
    for axes, name in zip(panels, ("loss", "accuracy"), strict=False):
        if evaluations:
            values = [entry[name] for entry in evaluations]
            axes.plot(steps, values, "o-", color="#d62728", markersize=4, label="evaluation")
        axes.set(xlabel="step", title=name.capitalize())
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def lines(metrics: Metrics) -> list[tuple[str, str]]:
    """Returns name and value of each line of the summary table."""
    rows = []
    if metrics["evaluations"]:
        first, last = metrics["evaluations"][0], metrics["evaluations"][-1]
        if first["accuracy"] is not None:
            both = f"{first['accuracy']:.3f} before, {last['accuracy']:.3f} after"
            rows.append(("accuracy", both))
        rows.append(("evaluation loss", f"{first['loss']:.4f} before, {last['loss']:.4f} after"))
    losses = metrics["losses"]
    tenth = max(1, len(losses) // 10)
    start, end = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    rows.append(("training loss", f"{start:.4f} in the first tenth, {end:.4f} in the last"))
    step, passes = 1e3 * metrics["step_seconds"], 1e3 * metrics["kernel_seconds"]
    rows.append(("a step", f"{step:.0f} ms, {passes:.1f} ms of it passes over weights"))
    if metrics["skipped"]:
        rows.append(("skipped", f"{metrics['skipped']} steps, whose loss was not finite"))
    peak = metrics["peak_memory_bytes"] / 2**20
    rows.append(("peak memory", f"{peak:,.0f} MiB of the process"))
    if "trajectory_bytes" in metrics:
        size = metrics["trajectory_bytes"]
        rows.append(("trajectory", f"{size:,} bytes for {metrics['steps']} steps"))
    return rows
