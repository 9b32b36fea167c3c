"""A plugin of pytest that writes outcomes and findings into one JSON file while tests run.

    python -m pytest -p benchmarks.record --record FILE benchmarks/bench_passes.py

A run that is cut off, or whose process dies, leaves all that it found before: the file is written
anew when a test begins. Other processes may have put stages of their own into it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("record")
    group.addoption("--record", type=Path, help="JSON file for outcomes and findings")
    group.addoption("--stage", default="all", help="name that the tests stand under in it")
    group.addoption("--deadline", type=float, help="of time.monotonic(), for all of them")
    group.addoption("--rehearse", action="store_true", help="in small, on the CPU")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("record"):
        recorder = Recorder(config.getoption("record"), config.getoption("stage"))
        config.pluginmanager.register(recorder)


class Recorder:
    """Writes the tests of one stage."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage
        self.tests: list[dict[str, Any]] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._add(report, 0.0)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Names the test that runs, so that a crash tells where it was."""
        self.write(running=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps the outcome of a test; of its set-up and end only what is no success."""
        if report.when == "call" or not report.passed:
            self._add(report, report.duration, **dict(report.user_properties))

    def pytest_sessionfinish(self) -> None:
        self.write()

    def write(self, **more: Any) -> None:
        whole = read_results(self.path)
        row = whole.setdefault("stages", {}).setdefault(self.stage, {})
        row.pop("running", None)
        row.update(tests=self.tests, **more)
        write_results(self.path, whole)

    def _add(self, report: Any, seconds: float, **found: Any) -> None:
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(seconds, 3)}
        if report.failed:
            row["error"] = report.longreprtext
        elif report.skipped:
            row["reason"] = report.longrepr[2].removeprefix("Skipped: ")
        self.tests.append(row | {key: value for key, value in found.items() if value})


def read_results(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def write_results(path: Path, whole: dict[str, Any]) -> None:
    """Replaces the file in one step. A power cut may lose it, a kill of this process cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(whole, indent=1, default=str) + "\n")
    draft.replace(path)


def lines(measures: list[dict[str, Any]]) -> Iterator[str]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in measures:
        groups.setdefault(row["group"], []).append(row)
    for group, rows in groups.items():
        keys = [key for key in rows[0] if key not in ("group", "name")]
        wide = max(len(row["name"]) for row in rows)
        yield f"\n{group}\n  " + " " * wide + "".join(f"  {key:>10}" for key in keys)
        for row in rows:
            cells = (f"  {short(row.get(key, '')):>{max(len(key), 10)}}" for key in keys)
            yield f"  {row['name']:<{wide}}" + "".join(cells)
    if any(row.get("of_limit") == "noise" for row in measures):
        yield "noise: faster than the limit, which is not possible: a neighbour disturbed it."


def short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
