"""What the demo shows at its end: a table, a JSON file and two pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from zorba.apps.reviews.task import Score
from zorba.planning import BlockPlan, draw_plan


@dataclass
class Curves:
    """What was seen over the rounds."""

    losses: list[float] = field(default_factory=list)
    scores: list[tuple[int, Score]] = field(default_factory=list)


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """Prints the summary as a table."""
    table = Table(title="Federated zeroth-order fine-tune of SmolLM2-135M", show_header=False)
    table.add_column(style="bold")
    table.add_column()

    def row(name: str, text: str) -> None:
        table.add_row(name, text)

    s = summary
    row("SST-2 accuracy", f"{s['accuracy_before']:.3f} before, {s['accuracy_after']:.3f} after")
    row("SST-2 AUC", f"{s['auc_before']:.3f} before, {s['auc_after']:.3f} after")
    row("training", f"{s['train_seconds']:.0f} s, {s['settings']['rounds']} rounds")
    row(
        "a client's step",
        f"{1e3 * s['step_seconds']:.0f} ms: {1e3 * s['forward_seconds']:.0f} ms forward, "
        f"{1e3 * s['kernel_seconds']:.0f} ms weight passes",
    )
    row(
        "up, a client and round",
        f"{s['bytes_up_per_client_round']:.0f} B as encoded, "
        f"{s['scalar_bytes_up_per_client_round']:.0f} B of them scalars",
    )
    row("down, a client and round", f"{s['bytes_down_per_client_round']:.0f} B as encoded")
    row("largest message down", f"{s['largest_bytes_down']:,} B (to the client that came back)")
    row(
        "peak memory",
        f"{s['peak_memory_bytes'] / 2**20:,.0f} MiB for all 8 clients in one process; "
        f"the model is {s['model_bytes'] / 2**20:,.0f} MiB",
    )
    row("catch-up", s["catch_up"])
    same = "equal" if s["replicas_identical"] else "DIFFERENT"
    row("fingerprints", f"{same}: " + ", ".join(sorted(set(s["fingerprints"].values()))))
    row("machine", f"{s['machine']['cpu']}, {s['machine']['threads']} threads")
    console.print(table)


def write_files(
    folder: Path, summary: dict[str, Any], curves: Curves, plan: BlockPlan
) -> list[Path]:
    """Writes summary.json, curves.png and plan.png, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "summary.json", folder / "curves.png", folder / "plan.png"]
    paths[0].write_text(json.dumps(summary, indent=2, default=str) + "\n")
    _draw_curves(paths[1], curves)
    draw_plan(plan, paths[2])
    return paths


def _draw_curves(path: Path, curves: Curves) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    rounds = range(1, len(curves.losses) + 1)
    left.plot(rounds, curves.losses, color="#bbbbbb", linewidth=1, label="round")
    left.plot(rounds, _smooth(curves.losses), color="#1f77b4", linewidth=2, label="mean of 10")
    left.set(xlabel="round", ylabel="training loss", title="Loss of the clients' batches")
    left.legend(frameon=False)
    at = [r for r, _ in curves.scores]
    for name, color in (("accuracy", "#1f77b4"), ("auc", "#d62728")):
        values = [getattr(score, name) for _, score in curves.scores]
        label = "AUC" if name == "auc" else name
        right.plot(at, values, marker="o", markersize=4, color=color, label=label)
        right.annotate(
            f"{values[-1]:.3f}", (at[-1], values[-1]), textcoords="offset points", xytext=(6, -3)
        )
    right.set(xlabel="round", title="SST-2 validation, 872 sentences", ylim=(0.45, 0.95))
    right.margins(x=0.12)
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _smooth(values: list[float], width: int = 10) -> list[float]:
    recent = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [sum(some) / len(some) for some in recent]
