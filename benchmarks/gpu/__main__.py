"""Checks and measures everything that needs a GPU, in under 8 minutes, and writes one JSON file.

    python3 -m benchmarks.gpu [--rehearse] [--out FOLDER] [STAGE ...]

Needs torch, triton, transformers, numpy, pytest, nvcc and a C++ compiler; the package is built in
the source tree and need not be installed. Ends with 0 if every check passed, 1 if one failed, 2 if
there is no GPU. No timing decides. ``--rehearse`` goes through all stages in small on the CPU: it
tests the check itself, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.stages import ROOT, STAGES, Stage, environment, output_of, run_process, tool
from benchmarks.record import read_results, short, write_results

SECONDS = 460.0  # for all stages together
PROBE = """
import json, torch
from torch import cuda
found = {"why_not": f"torch {torch.__version__} is built for {torch.version.cuda or 'no CUDA'}, "
    f"torch.cuda.is_available() is {cuda.is_available()}"}
if torch.version.cuda and cuda.is_available():
    major, minor = cuda.get_device_capability(0)
    found = {"device": cuda.get_device_name(0), "arch": f"{major}{minor}"}
print(json.dumps(found))
"""


def main() -> int:
    # No tyro: a machine with a GPU need not have it.
    head = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=head)
    names = [stage.name for stage in STAGES]
    parser.add_argument("stage", nargs="*", help=f"only these, of {', '.join(names)}")
    parser.add_argument("--rehearse", action="store_true", help="in small, on the CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    given = parser.parse_args()
    if unknown := sorted(set(given.stage) - set(names)):
        parser.error(f"there is no stage {', '.join(unknown)}; there are {', '.join(names)}")

    start = time.monotonic()
    gpu = {"device": "rehearsal"} if given.rehearse else probe()
    if "why_not" in gpu:
        print(f"gpu-check needs a GPU, and there is none to use: {gpu['why_not']}.")
        return 2
    about = {
        "device": gpu["device"],
        "date": datetime.date.today().isoformat(),
        "commit": output_of("git", "rev-parse", "HEAD"),
        "changed": output_of("git", "status", "--porcelain"),
    }
    slug = re.sub(r"[^a-z0-9]+", "-", gpu["device"].lower()).strip("-")
    path = given.out.resolve() / f"gpu-{slug}-{about['date']}.json"
    write_results(path, {**about, "passed": False, "complete": False, "stages": {}})
    for stage in STAGES:
        if not given.stage or stage.name in given.stage:
            run_stage(stage, path, start + SECONDS - time.monotonic(), gpu.get("arch"))

    whole = read_results(path)
    passed = all(row["good"] for row in whole["stages"].values())
    whole.update(complete=True, passed=passed, seconds=round(time.monotonic() - start, 1))
    write_results(path, whole)
    print("\n".join([*summary(whole), str(path)]))
    return 0 if passed else 1


def probe() -> dict[str, str]:
    """Returns the GPU's name and architecture, or why there is none."""
    # A process of its own asks, so that this one holds no memory of the GPU.
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment(), capture_output=True, text=True
    )
    try:
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"why_not": f"looking for one failed ({last})"}
    return found


def run_stage(stage: Stage, path: Path, left: float, arch: str | None) -> None:
    """Runs a stage in a process of its own, which a broken CUDA context ends with.

    ``left`` are the seconds for it and the stages behind it; ``arch`` is None in a rehearsal.
    """
    print(f"== {stage.name}: {stage.about} ({left:.0f} s left)", flush=True)
    start = time.monotonic()
    if left < stage.least:
        outcome = f"skipped: {left:.0f} s were left, and it needs at least {stage.least:.0f}"
    else:
        limit = min(stage.limit, left)
        variables = {}
        if arch is not None:  # built for this GPU alone, which must work
            variables = {"ZORBA_CUDA": "1", "ZORBA_CUDA_ARCHS": arch, "NVCC": tool("nvcc") or ""}
        command = stage.command(path, limit, rehearse=arch is None)
        outcome = run_process(command, limit, {k: v for k, v in variables.items() if v})
    whole = read_results(path)
    row: dict[str, Any] = whole["stages"].setdefault(stage.name, {})
    failed = any(test["outcome"] == "failed" for test in row.get("tests", []))
    # A peer or a tool that does not run says nothing against the kernels; a failed check does.
    good = outcome == "passed" or (stage.optional and not failed)
    row.update(outcome=outcome, good=good, seconds=round(time.monotonic() - start, 1))
    write_results(path, whole)
    print(f"   {outcome}, {row['seconds']:.1f} s", flush=True)


def summary(whole: dict[str, Any]) -> Iterator[str]:
    """Yields what passed, and which targets are met; each stage printed its own measures."""
    yield "\ntargets, for an H200; none decides whether the run passed"
    for row in whole["stages"].values():
        for t in (t for test in row.get("tests", []) for t in test.get("targets", [])):
            met = "met    " if t["met"] else "NOT MET"
            yield f"  {met} {t['name']}: {short(t['figure'])} {t['unit']}, wanted {t['wanted']}"
    yield f"\n{'stage':<11}{'seconds':>8}{'passed':>8}{'failed':>8}{'skipped':>8}  outcome"
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
    yield f"\n{'PASSED' if whole['passed'] else 'FAILED'} in {whole['seconds']:.0f} s"


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
