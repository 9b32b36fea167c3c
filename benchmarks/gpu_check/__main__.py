"""Proves and measures everything that needs a GPU, in under 8 minutes, and writes one JSON file.

    python3 -m benchmarks.gpu_check [--rehearse] [--out FOLDER] [--seconds N] [STAGE ...]

Needs torch, triton, transformers, numpy, pytest, nvcc and a C++ compiler; the package is built in
the source tree and need not be installed. Ends with 0 if every check passed, 1 if one failed, 2 if
there is no GPU. No timing decides. ``--rehearse`` goes through all stages in small on the CPU: it
tests the check itself, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import summary
from benchmarks.gpu_check.report import write_json
from benchmarks.gpu_check.stages import ROOT, STAGES, environment, run_all, run_stage

SECONDS = 460.0


def main() -> int:
    """Returns the exit status."""
    head = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu_check", description=head)
    names = [stage.name for stage in STAGES]
    parser.add_argument("stage", nargs="*", help=f"only these, of {', '.join(names)}")
    parser.add_argument("--rehearse", action="store_true", help="in small, on the CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all stages together")
    given = parser.parse_args()
    unknown = sorted(set(given.stage) - set(names))
    if unknown:
        parser.error(f"there is no stage {', '.join(unknown)}; there are {', '.join(names)}")
    chosen = [stage for stage in STAGES if not given.stage or stage.name in given.stage]

    start = time.monotonic()
    gpu = {"device": "rehearsal"} if given.rehearse else probe()
    if "why_not" in gpu:
        print(f"gpu-check needs a GPU, and there is none to use: {gpu['why_not']}.")
        return 2
    today = datetime.date.today().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", gpu["device"].lower()).strip("-")
    path = given.out / f"gpu-{slug}-{today}.json"
    result: dict[str, Any] = {"device": gpu["device"], "date": today, **commit()}

    def record(rows: list[dict[str, Any]]) -> None:
        whole = len(rows) == len(chosen)
        good = all(row["good"] for row in rows)
        taken = round(time.monotonic() - start, 1)
        result.update(complete=whole, passed=whole and good, seconds=taken, stages=rows)
        write_json(path, result)

    with tempfile.TemporaryDirectory() as folder:
        run = run_stage("cpu" if given.rehearse else "cuda")
        run_all(chosen, run, record, Path(folder), given.seconds)
    print("\n".join([*summary.lines(result), str(path)]))
    return 0 if result["passed"] else 1


def probe() -> dict[str, str]:
    """The GPU's name, or why there is none."""
    command = [sys.executable, "-m", "benchmarks.gpu_check.probe"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    try:
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"why_not": f"looking for one failed: {done.stderr.strip()[-500:]}"}
    return found


def commit() -> dict[str, Any]:
    """The commit that is measured, and whether files differ from it."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    return {"commit": git("rev-parse", "HEAD"), "changed_files": git("status", "--porcelain")}


if __name__ == "__main__":
    sys.exit(main())
