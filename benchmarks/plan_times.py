"""CPU time of ``plan_blocks`` over spreads of budgets, and the gap that it reaches.

python -m benchmarks.plan_times [--shapes 100x32,20x24] [--spreads tight,narrow,uniform,bimodal]
                                [--seeds N] [--time-limit SECONDS] [--out FILE]

Whole plans as they come by default: eight points of the front, two solves a point, a gap of 1 %.
Blocks of unequal sizes; budgets are shares of all blocks, beside fixed bytes. CPU time, of all
threads, does not count what else the machine does; the time limit, which is HiGHS's, does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
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
    """Returns what part of all blocks fits each client."""
    if spread == "tight":
        return numbers.uniform(0.05, 0.12, clients)
    if spread == "narrow":
        return numbers.uniform(0.25, 0.35, clients)
    if spread == "uniform":
        return numbers.uniform(0.1, 1.0, clients)
    small = numbers.random(clients) < 0.7
    return np.where(small, numbers.uniform(0.08, 0.15, clients), numbers.uniform(0.6, 1.0, clients))


def measure(
    shape: tuple[int, int], spread: str, equal: bool, seed: int, time_limit: float
) -> dict[str, Any]:
    """Plans once; returns seconds and the worst point of the front."""
    clients, blocks = shape
    numbers = np.random.default_rng(seed)
    sizes = numbers.integers(2 * 10**8, 6 * 10**8, blocks).tolist()
    shares = make_shares(spread, numbers, clients)
    budgets = [FIXED + max(int(share * sum(sizes)), max(sizes)) for share in shares]
    priorities = None if equal else np.round(numbers.lognormal(0, 0.7, blocks), 3).tolist()
    cpu = time.process_time()
    plan = plan_blocks(
        MemoryModel(sizes, [0] * blocks, FIXED),
        budgets,
        priorities=priorities,
        time_limit=time_limit,
    )
    return {
        "cpu_s": time.process_time() - cpu,
        "gap": max(point.gap for point in plan.front),
        "proven": all(point.proven for point in plan.front),
    }


def main() -> None:
    """Prints a line for each kind of problem."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="100x32,20x24", help="clients x blocks")
    parser.add_argument("--spreads", default=",".join(SPREADS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--time-limit", type=float, default=60.0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    kinds = itertools.product(given.shapes.split(","), given.spreads.split(","), (True, False))
    for shape, spread, equal in kinds:
        clients, blocks = map(int, shape.split("x"))
        runs = [
            measure((clients, blocks), spread, equal, seed, given.time_limit)
            for seed in range(given.seeds)
        ]
        row = {
            "clients": clients,
            "blocks": blocks,
            "spread": spread,
            "priorities": "equal" if equal else "unequal",
            "seeds": given.seeds,
            "time_limit_s": given.time_limit,
            "median_cpu_s": round(statistics.median(run["cpu_s"] for run in runs), 2),
            "worst_cpu_s": round(max(run["cpu_s"] for run in runs), 2),
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
