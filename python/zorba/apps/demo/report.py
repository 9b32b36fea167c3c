"""What the demo shows at its end: a table, a JSON file and two pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from zorba.apps.watch import Follower
from zorba.apps.watch.figures import write_curves
from zorba.federated import RunFolder
from zorba.planning import BlockPlan, draw_plan


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """Prints the summary as a table."""
    table = Table(title="Federated zeroth-order fine-tune of SmolLM2-135M", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, words in lines(summary):
        table.add_row(name, words)
    console.print(table)


def lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns name and value of each line of the summary's table."""
    s = summary
    step, forward, passes = (1e3 * s[f"{part}_seconds"] for part in ("step", "forward", "kernel"))
    up, scalars = s["bytes_up_per_client_round"], s["scalar_bytes_up_per_client_round"]
    peak, model = s["peak_memory_bytes"] / 2**20, s["model_bytes"] / 2**20
    same = "equal" if s["replicas_identical"] else "DIFFERENT"
    return [
        ("SST-2 accuracy", f"{s['accuracy_before']:.3f} before, {s['accuracy_after']:.3f} after"),
        ("SST-2 AUC", f"{s['auc_before']:.3f} before, {s['auc_after']:.3f} after"),
        # A result without its conditions says more than was shown.
        ("conditions", s["conditions"]),
        ("training", f"{s['train_seconds']:.0f} s, {s['settings']['rounds']} rounds"),
        (
            "a client's step",
            f"{step:.0f} ms: {forward:.0f} ms forward, {passes:.0f} ms weight passes",
        ),
        ("up, a client and round", f"{up:.0f} B as encoded, {scalars:.0f} B of them scalars"),
        ("down, a client and round", f"{s['bytes_down_per_client_round']:.0f} B as encoded"),
        ("largest message down", f"{s['largest_bytes_down']:,} B (to the client that came back)"),
        (
            "peak memory",
            f"{peak:,.0f} MiB for all {len(s['clients'])} clients in one process; "
            f"the model is {model:,.0f} MiB",
        ),
        ("catch-up", s["catch_up"]),
        ("fingerprints", f"{same}: " + ", ".join(sorted(set(s["fingerprints"].values())))),
        ("machine", f"{s['machine']['cpu']}, {s['machine']['threads']} threads"),
    ]


def write_files(folder: RunFolder, summary: dict[str, Any], plan: BlockPlan) -> list[Path]:
    """Writes summary.json, curves.png and plan.png into a run's folder, and returns their paths."""
    paths = [folder.summary, folder.path / "curves.png", folder.path / "plan.png"]
    paths[0].write_text(json.dumps(summary, indent=2, default=str) + "\n")
    write_curves(paths[1], Follower(folder.events).update())
    draw_plan(plan, paths[2])
    return paths
