"""The end of a run, out of its events: ``summary.json``, and the table that people see."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from zorba.apps.watch.events import Event
from zorba.apps.watch.state import RunState
from zorba.apps.watch.words import Fact, facts


def summarise(state: RunState) -> dict[str, Any]:
    """Returns the content of ``summary.json``, over all starts of the server."""
    end = state.end or Event()
    return {
        "job": state.job,
        "final_round": end.round or state.round,
        "replicas_identical": end.replicas_identical,
        "fingerprints": end.fingerprints,
        "failures": end.failures,
        "privacy": end.privacy,
        "server_starts": len(state.starts),
        "round_seconds": sum(r.seconds for r in state.rounds) / max(1, len(state.rounds)),
        "sites": {
            name: {"rounds_measured": c.rounds_measured, "rounds_failed": c.rounds_failed}
            for name, c in state.clients.items()
        },
        "settings": state.settings,
        "machine": state.machine,
    }


def rows(state: RunState) -> list[Fact]:
    """Returns the rows of the table: the figures of every run, and each private site's epsilon."""
    privacy = state.end.privacy if state.end else {}
    spent = [
        (
            f"{name} has told",
            f"epsilon {told['epsilon']:.3g}",
            f"at delta {told['delta']:g}, of each {told['unit']}",
        )
        for name, told in privacy.items()
    ]
    return [*facts(state), *spent]


def show_summary(state: RunState, console: Console) -> None:
    """Prints the table."""
    table = Table(title=f"Federated fine-tune {state.job}", show_header=False)
    table.add_column(style="bold")
    for row in rows(state):
        table.add_row(*row)
    console.print(table)
