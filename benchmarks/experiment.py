"""An experiment: results in one JSON file, so that it can be stopped and goes on, and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zorba import machine
from zorba.files import write_whole


class Results:
    """A JSON file, ``data``, that is written anew with each result.

    Runs that are kept in it have all ``settings`` but their own in common.

    Raises:
        SystemExit: the file is of an experiment with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        common = json.loads(json.dumps(settings))
        if settings is not None and self.data.setdefault("settings", common) != common:
            raise SystemExit(f"{path} has runs with other settings: move it away")

    def part(self, name: str) -> dict[str, Any]:
        """Returns a part of the content, an empty one where there is none."""
        return self.data.setdefault(name, {})

    def put(self, part: str, value: Mapping[str, Any]) -> None:
        """Puts results into a part, in the place of earlier ones of the same names."""
        self.part(part).update(finite(value))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(self.data, indent=1, allow_nan=False) + "\n")

    def run(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns a run, made and written down where it is missing."""
        if name not in self.part("runs"):
            print(name, flush=True)
            self.data["machine"] = machine.describe()
            self.put("runs", {name: make()})
        return self.part("runs")[name]


def finite(value: Any) -> Any:
    """Returns results with None for what is no finite number, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def panels(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Any, list[Any]]:
    """Returns a figure of inches by inches, and its axes from left to right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **options)[0]
    for one in axes:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def save(figure: Any, path: Path) -> None:
    """Writes a figure, and its folder where that is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
