"""Runs of an experiment in one JSON file, so that it can be stopped and goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zorba import machine


class KeptRuns:
    """What an experiment has run so far.

    Args:
        path: of the file; read where it exists.
        settings: of the experiment, as JSON has them: all that runs have in common.

    Attributes:
        runs: results by name.

    Raises:
        SystemExit: the file is of an experiment with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._settings = json.loads(json.dumps(settings))
        self.runs: dict[str, dict[str, Any]] = {}
        if path.exists():
            content = json.loads(path.read_text())
            if content["settings"] != self._settings:
                raise SystemExit(f"{path} has runs with other settings: move it away")
            self.runs = content["runs"]

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns a run, made and written down where it is missing."""
        if name not in self.runs:
            print(name, flush=True)
            self.runs[name] = _finite(make())
            self._write()
        return self.runs[name]

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        content = {"settings": self._settings, "machine": machine.describe(), "runs": self.runs}
        self._path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """Returns results with None for what is no finite number, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
