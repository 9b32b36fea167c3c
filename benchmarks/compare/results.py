"""The results file: every run puts its part in, so that methods can be run one by one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zorba import machine

from benchmarks.compare.settings import Settings


class Results:
    """What was measured so far, in one JSON file.

    Args:
        path: of the file; read where it exists.

    Attributes:
        data: its content: ``start`` (the score of the original weights), ``methods`` by name,
            ``clients`` by row (``apart.ROWS``).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"start": {}, "methods": {}, "clients": {}}
        if path.exists():
            self.data |= json.loads(path.read_text())

    def add(self, part: str, key: str, value: dict[str, Any], settings: Settings) -> None:
        """Puts a result in the place of an earlier one, with its machine, and writes the file."""
        common = {k: v for k, v in asdict(settings).items() if k not in ("methods", "out", "cache")}
        self.data[part][key] = {**value, "machine": describe(), "settings": common}
        self._write()

    def add_start(self, accuracy: float, auc: float) -> None:
        """Puts the score of the original weights in."""
        self.data["start"] = {"accuracy": accuracy, "auc": auc}
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")


def describe() -> dict[str, Any]:
    """Returns machine and versions, PEFT's among them."""
    return machine.describe() | {"peft": machine.version_of("peft")}
