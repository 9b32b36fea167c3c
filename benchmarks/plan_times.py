"""Time of ``plan_blocks`` for blocks of unequal sizes, and the gap that it reaches.

python -m benchmarks.plan_times [--shapes 100x32,20x24] [--seeds N] [--out FILE]

Whole plans with the default settings: eight points of the front, two solves a point. Budgets are
shares of all blocks, beside fixed bytes. CPU time, of all threads, does not count what else the
machine does; wall time does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from zorba import machine
from zorba.planning import MemoryModel, plan_blocks

SPREADS = ("tight", "narrow", "uniform", "bimodal")
FIXED = 10**9


def make_shares(spread: str, numbers: np.random.Generator, clients: int) -> np.ndarray[Any, Any]:
    """Returns the part of all blocks that fits each client."""
    if spread == "tight":
        return numbers.uniform(0.05, 0.12, clients)
    if spread == "narrow":
        return numbers.uniform(0.25, 0.35, clients)
    if spread == "uniform":
        return numbers.uniform(0.1, 1.0, clients)
    small = numbers.random(clients) < 0.7
    return np.where(small, numbers.uniform(0.08, 0.15, clients), numbers.uniform(0.6, 1.0, clients))


def measure(clients: int, blocks: int, spread: str, equal: bool, seed: int) -> dict[str, Any]:
    """Plans once; returns seconds and the worst point of the front."""
    numbers = np.random.default_rng(seed)
    sizes = numbers.integers(2 * 10**8, 6 * 10**8, blocks).tolist()
    shares = make_shares(spread, numbers, clients)
    budgets = [FIXED + max(int(share * sum(sizes)), max(sizes)) for share in shares]
    priorities = None if equal else np.round(numbers.lognormal(0, 0.7, blocks), 3).tolist()
    cpu, memory = time.process_time(), MemoryModel(sizes, [0] * blocks, FIXED)
    plan = plan_blocks(memory, budgets, priorities=priorities)
    return {
        "cpu_s": time.process_time() - cpu,
        "wall_s": plan.seconds,
        "gap": max(point.gap for point in plan.front),
        "proven": all(point.proven for point in plan.front),
    }


def main() -> None:
    """Prints a line for each kind of problem."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="100x32,20x24", help="clients x blocks")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    measure(9, 3, "uniform", True, 0)  # imports scipy
    for shape, spread, equal in itertools.product(given.shapes.split(","), SPREADS, (True, False)):
        clients, blocks = map(int, shape.split("x"))
        runs = [measure(clients, blocks, spread, equal, seed) for seed in range(given.seeds)]
        row = {
            "clients": clients,
            "blocks": blocks,
            "spread": spread,
            "priorities": "equal" if equal else "unequal",
            "cpu_s": sorted(round(run["cpu_s"], 2) for run in runs),
            "wall_s": sorted(round(run["wall_s"], 2) for run in runs),
            "worst_gap": round(max(run["gap"] for run in runs), 4),
            "proven": sum(run["proven"] for run in runs),
        }
        rows.append(row)
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        if given.out is not None:
            described = {**machine.describe(), "scipy": version("scipy")}
            given.out.write_text(json.dumps({"machine": described, "plans": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
