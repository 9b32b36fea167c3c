"""Run folders as a server writes them, without the server."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zorba.federated import EventWriter

HOSTILE = (
    '<script>alert("1")</script>',
    "<img src=x onerror=alert(2)>",
    "'\"><svg onload=alert(3)>",
    "[bold red]markup[/bold red]",
    "\x1b[31mred\x1b]0;title\x07",
    "\u202eesrever",
    "two\nlines\r\n",
    "\ud800 \x00 \ufffe",
    "$\\frac{1}{$ $x^2$",
    '_nolegend_ id="figure_1"',
    "{{ 7 * 7 }} {% raw %} ]]> <!-- &amp; </style></title>",
)
"""What a client might call itself, or say of its failure."""


class Run:
    """Writes the events of a made-up run of some clients, with a mask and losses that are drawn."""

    def __init__(
        self, path: Path, names: Iterable[str], blocks: int, rounds: int, draw: random.Random
    ) -> None:
        self.path, self.names, self.rounds, self.draw = path, list(names), rounds, draw
        path.mkdir(parents=True, exist_ok=True)
        self.writer = EventWriter(path / "events.jsonl")
        self.mask = [[b == 0 or draw.random() < 0.6 for b in range(blocks)] for _ in self.names]
        self.plan: dict[str, Any] = {
            "clients": self.names,
            "blocks": [f"layers.{b}" for b in range(blocks)],
            "mask": ["".join("01"[a] for a in row) for row in self.mask],
            "budgets": [2**30 * (n % 4 + 1) for n in range(len(self.names))],
            "memory": [2**29 * (n % 4 + 1) for n in range(len(self.names))],
        }
        self.start(0)

    def start(self, after: int, **more: Any) -> None:
        fields = {
            **{"job": "reviews", "round": after, "last_round": self.rounds, "plan": self.plan},
            "settings": {"lr": 0.1, "clip": None, "num_perturbations": 5},
            "machine": {"cpu": "a processor", "torch": "2.13"},
        }
        self.writer.write("start", fields | more)

    def round(self, number: int, away: Iterable[str] = (), **more: Any) -> None:
        """A round in which everyone measures who is not named, in failures and refusals too."""
        failures, refusals = more.get("failures", {}), more.get("refusals", {})
        asked = [name for name in self.names if name not in away]
        there = [name for name in asked if name not in failures]
        used = [name for name in there if name not in refusals]
        losses = {name: self.draw.gauss(0.7, 0.05) for name in used}
        fields = {
            **{"round": number, "seconds": 0.5, "clients": used, "losses": losses},
            "loss": sum(losses.values()) / len(losses) if losses else None,
            "bytes_up": dict.fromkeys(there, 82),
            "bytes_down": dict.fromkeys(asked, 234),
        }
        self.writer.write("round", fields | more)

    def end(self, **more: Any) -> None:
        fields: dict[str, Any] = {"round": self.rounds, "replicas_identical": True}
        fields |= {"fingerprints": dict.fromkeys(self.names, "00ab" * 4)}
        self.writer.write("end", fields | more)
        self.writer.close()
