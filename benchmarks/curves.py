"""Pictures of experiments, all alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any


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
