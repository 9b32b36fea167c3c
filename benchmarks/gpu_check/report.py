"""What a stage finds: checks, measures, targets and notes, on disk from the first one on."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Report:
    """Findings of one stage. The file is rewritten with each, so that a kill loses none.

    Args:
        path: JSON file.
        deadline: of ``time.monotonic()``, when the stage should be through.
    """

    def __init__(self, path: Path, deadline: float) -> None:
        self.path = path
        self._deadline = deadline
        self.checks: list[dict[str, Any]] = []
        self.measures: list[dict[str, Any]] = []
        self.targets: list[dict[str, Any]] = []
        self.notes: dict[str, Any] = {}

    def left(self) -> float:
        """Seconds until the stage should be through; a little later it is stopped."""
        return self._deadline - time.monotonic()

    @property
    def passed(self) -> bool:
        """Whether no check has failed."""
        return all(check["passed"] for check in self.checks)

    @contextmanager
    def check(self, name: str, **facts: Any) -> Iterator[dict[str, Any]]:
        """A check: an exception in its block is a failure, and does not leave the block.

        Yields a dictionary for what should stand beside the result.
        """
        start = time.monotonic()
        error = None
        try:
            yield facts
        except Exception:
            error = traceback.format_exc()
        seconds = round(time.monotonic() - start, 3)
        row = {**facts, "name": name, "passed": error is None, "seconds": seconds}
        self.checks.append(row if error is None else row | {"error": error})
        size = f", {facts['elements']:,} elements" if "elements" in facts else ""
        print(f"  {'ok    ' if error is None else 'FAILED'} {name} ({seconds:.1f} s{size})")
        if error is not None:
            print(error)
        self._write()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A measurement that may be left out, which is noted, when time is short."""
        try:
            yield
        except TimeoutError as short_of:
            self.note(**{f"{name}, left out": str(short_of)})

    def measure(self, group: str, name: str, **figures: Any) -> None:
        """A measured figure; ``figures`` hold numbers with their unit in the key."""
        self.measures.append({"group": group, "name": name, **figures})
        shown = "  ".join(f"{key} {short(value)}" for key, value in figures.items())
        print(f"  {group}: {name}: {shown}")
        self._write()

    def target(self, name: str, figure: float, bound: float, unit: str, *, least: bool) -> None:
        """A figure beside what it should be: at least, or else at most, the bound."""
        met = figure >= bound if least else figure <= bound
        row = {"name": name, "figure": figure, "least" if least else "most": bound}
        self.targets.append(row | {"unit": unit, "met": met})
        self._write()

    def note(self, **facts: Any) -> None:
        """Facts that are neither."""
        self.notes.update(facts)
        for key, value in facts.items():
            print(f"  {key}: {value}")
        self._write()

    def _write(self) -> None:
        content = {
            "checks": self.checks,
            "measures": self.measures,
            "targets": self.targets,
            "notes": self.notes,
        }
        write_json(self.path, content)


def write_json(path: Path, content: object) -> None:
    """Replaces the file in one step: whoever reads it sees the old or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(content, indent=1, default=str) + "\n")
    beside.replace(path)


def short(value: object) -> str:
    """A figure in a few digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
