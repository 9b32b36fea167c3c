"""The end of the output of ``make gpu-check``: what passed, and which targets are met."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from benchmarks.record import short


def lines(whole: dict[str, Any]) -> Iterator[str]:
    """Yields the summary of a run. The tables of measures were printed by each stage."""
    yield ""
    yield "targets, for an H200; none decides whether the run passed"
    for row in whole["stages"].values():
        for test in row.get("tests", []):
            for t in test.get("targets", []):
                met = "met    " if t["met"] else "NOT MET"
                figure = f"{short(t['figure'])} {t['unit']}, wanted {t['wanted']}"
                yield f"  {met} {t['name']}: {figure}"
    yield ""
    yield f"{'stage':<11}{'seconds':>8}{'passed':>8}{'failed':>8}{'skipped':>8}  outcome"
    for name, row in whole["stages"].items():
        tests = row.get("tests", [])
        count = Counter(test["outcome"] for test in tests)
        counts = "".join(f"{count[kind]:>8}" for kind in ("passed", "failed", "skipped"))
        yield f"{name:<11}{row['seconds']:>8.1f}{counts}  {row['outcome']}"
        if "running" in row:
            yield f"    ended in {row['running']}"
        yield from (f"    FAILED {t['test']}" for t in tests if t["outcome"] == "failed")
        for reason in dict.fromkeys(t["reason"] for t in tests if t["outcome"] == "skipped"):
            yield f"    skipped: {reason}"
    yield ""
    yield f"{'PASSED' if whole['passed'] else 'FAILED'} in {whole['seconds']:.0f} s"
