"""Time of ``plan_blocks`` for blocks of unequal sizes, and the gap that it reaches.

python -m benchmarks.plan_times [--seeds N] [--out FILE]

Whole plans with the default settings: eight points of the front, two solves a point. Budgets are
shares of all blocks, beside fixed bytes. CPU time, of all threads, does not count what else the
machine does; wall time does.
"""

from __future__ import annotations

import itertools
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from zorba import machine
from zorba.planning import MemoryModel, plan_blocks

FIXED = 10**9
SHAPES = ((100, 32), (20, 24))  # clients, blocks
# Bounds of the part of all blocks that fits a client.
SPREADS = {"tight": (0.05, 0.12), "narrow": (0.25, 0.35), "uniform": (0.1, 1.0), "bimodal": None}


def shares_of(spread: str, numbers: np.random.Generator, clients: int) -> np.ndarray[Any, Any]:
    bounds = SPREADS[spread]
    if bounds is not None:
        return numbers.uniform(*bounds, clients)
    small = numbers.random(clients) < 0.7
    return np.where(small, numbers.uniform(0.08, 0.15, clients), numbers.uniform(0.6, 1.0, clients))


def measure(clients: int, blocks: int, spread: str, equal: bool, seed: int) -> dict[str, Any]:
    numbers = np.random.default_rng(seed)
    sizes = numbers.integers(2 * 10**8, 6 * 10**8, blocks).tolist()
    shares = shares_of(spread, numbers, clients)
    budgets = [FIXED + max(int(share * sum(sizes)), max(sizes)) for share in shares]
    priorities = None if equal else np.round(numbers.lognormal(0, 0.7, blocks), 3).tolist()
    cpu, memory = time.process_time(), MemoryModel(sizes, [0] * blocks, FIXED)
    plan = plan_blocks(memory, budgets, priorities=priorities)
    return {
        "cpu_s": round(time.process_time() - cpu, 2),
        "wall_s": round(plan.seconds, 2),
        "gap": max(point.gap for point in plan.front),
        "proven": all(point.proven for point in plan.front),
    }


def main(seeds: int = 3, out: Path | None = None) -> None:
    """Prints a line for each kind of problem.

    Args:
        seeds: Problems of each kind.
        out: JSON file.
    """
    rows: list[dict[str, Any]] = []
    measure(9, 3, "uniform", True, 0)  # imports scipy
    for (clients, blocks), spread, equal in itertools.product(SHAPES, SPREADS, (True, False)):
        runs = [measure(clients, blocks, spread, equal, seed) for seed in range(seeds)]
        priorities = "equal" if equal else "unequal"
        row = {"clients": clients, "blocks": blocks, "spread": spread, "priorities": priorities}
        row |= {name: sorted(run[name] for run in runs) for name in ("cpu_s", "wall_s")}
        row["worst_gap"] = round(max(run["gap"] for run in runs), 4)
        row["proven"] = sum(run["proven"] for run in runs)
        rows.append(row)
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        if out is not None:
            described = {**machine.describe(), "scipy": version("scipy")}
            out.write_text(json.dumps({"machine": described, "plans": rows}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
