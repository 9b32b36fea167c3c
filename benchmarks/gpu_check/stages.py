"""Runs stages one after the other, each in a process with a time limit, and records them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
OUTPUT_LINES = 300  # of a stage that did not pass; the last ones


class Stage(NamedTuple):
    """A module of this package with ``run(report, device, sizes)``."""

    name: str
    about: str
    limit: float  # seconds
    least: float  # with less time left the stage is left out
    optional: bool = False  # only a failed check of it fails the run


# What proves comes first, and what may be left out last.
STAGES = (
    Stage("build", "build, versions, device", 200, 30),
    Stage("identity", "equal noise at all counters", 80, 40),
    Stage("weights", "equal weights and fingerprints", 90, 20),
    Stage("suites", "tests on the GPU", 150, 30),
    Stage("passes", "speed of a pass and of a step", 75, 20),
    Stage("seeds", "64 seeds in a pass", 60, 20),
    Stage("offload", "steps with idle blocks on the host", 45, 20),
    Stage("peers", "speed against others", 60, 20, optional=True),
    Stage("sanitizer", "compute-sanitizer", 90, 20, optional=True),
)

Run = Callable[[Stage, Path, float], tuple[str, list[str]]]


def run_all(
    stages: Sequence[Stage],
    run: Run,
    record: Callable[[list[dict[str, Any]]], None],
    folder: Path,
    seconds: float,
) -> list[dict[str, Any]]:
    """Runs the stages within ``seconds`` and calls ``record`` with what there is after each.

    Args:
        stages: in order.
        run: starts one, given where it must report and its limit; returns "passed", "failed" or
            "timed out", and its output.
        record: writes the results.
        folder: for the reports.
        seconds: for all stages together.
    """
    end = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    for stage in stages:
        left = end - time.monotonic()
        print(f"== {stage.name}: {stage.about} ({left:.0f} s left)", flush=True)
        if left < stage.least:
            why = f"{left:.0f} s were left, and it needs at least {stage.least:.0f}"
            print(f"   skipped: {why}", flush=True)
            rows.append(row_of(stage, "skipped", 0.0, {}) | {"reason": why})
        else:
            report = folder / f"{stage.name}.json"
            start = time.monotonic()
            outcome, output = run(stage, report, min(stage.limit, left))
            taken = time.monotonic() - start
            found = json.loads(report.read_text()) if report.is_file() else {}
            row = row_of(stage, outcome, taken, found)
            if outcome != "passed":
                row["output"] = output[-OUTPUT_LINES:]
            rows.append(row)
            print(f"   {outcome} in {taken:.1f} s", flush=True)
        record(rows)
    return rows


def row_of(stage: Stage, outcome: str, seconds: float, found: dict[str, Any]) -> dict[str, Any]:
    """What is recorded of a stage."""
    broken = any(not check["passed"] for check in found.get("checks", []))
    good = outcome == "passed" or (stage.optional and not broken)
    row = {"name": stage.name, "about": stage.about, "outcome": outcome, "good": good}
    return row | {"optional": stage.optional, "seconds": round(seconds, 1), **found}


def run_stage(device: str) -> Run:
    """Returns what runs a stage on the device."""

    def run(stage: Stage, report: Path, limit: float) -> tuple[str, list[str]]:
        command = [sys.executable, "-m", "benchmarks.gpu_check.child", stage.name]
        deadline = time.monotonic() + 0.93 * limit  # a clock that all processes share
        command += ["--report", str(report), "--deadline", str(deadline), "--device", device]
        return run_process(command, limit)

    return run


def run_process(
    command: list[str], limit: float, variables: dict[str, str] | None = None
) -> tuple[str, list[str]]:
    """Runs a command in the source tree and shows what it prints: outcome, and lines."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment() | (variables or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: deque[str] = deque(maxlen=2 * OUTPUT_LINES)

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            print(line, end="", flush=True)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        status = process.wait(limit)
        outcome = "passed" if status == 0 else "failed"
        if status not in (0, 1):
            lines.append(f"ended with status {status}")
    except subprocess.TimeoutExpired:
        outcome = "timed out"
        lines.append(f"stopped after {limit:.0f} s")
    except BaseException:
        stop(process)
        raise
    stop(process)
    reader.join(5)
    return outcome, list(lines)


def stop(process: subprocess.Popen[str]) -> None:
    """Ends a stage and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment() -> dict[str, str]:
    """The caller's, less what would force a backend, with the source tree to import from."""
    forcing = ("ZORBA_BACKEND", "ZORBA_CPU_ISA", "TRITON_INTERPRET")
    kept = {name: value for name, value in os.environ.items() if name not in forcing}
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
