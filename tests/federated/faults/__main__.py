"""Random kill schedules: ``python -m tests.federated.faults --schedules 100``."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.federated.faults.run import run_random


def main() -> int:
    """Runs the schedules; returns 1 when a run ended elsewhere than the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="repeats a run")
    options = parser.parse_args()
    kills: Counter[str] = Counter()
    failed = 0
    began = time.monotonic()
    for number in range(options.schedules):
        seed = options.seed + number
        with tempfile.TemporaryDirectory() as folder:
            wrong, happened = run_random(Path(folder), seed, options.rounds)
        kills.update(happened)
        if wrong:
            failed += 1
            print(f"schedule {number}, --seed {seed} --schedules 1: {wrong}", flush=True)
        elif sys.stderr.isatty():
            print(f"\r{number + 1} of {options.schedules}", end="", file=sys.stderr, flush=True)
    seconds = round(time.monotonic() - began, 1)
    record = {"failed": failed, "kills": dict(sorted(kills.items())), "seconds": seconds}
    print(json.dumps(vars(options) | record))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
