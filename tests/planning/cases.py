"""Small planning problems, and every plan that they have."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from zorba.planning import MemoryModel
from zorba.planning.problem import Problem

# HiGHS lets rows be off by 1e-6 on objectives scaled to at most 1, so the second stage may move the
# first objective by that much; priorities of two decimals keep distinct F1 values further apart.
SOLVER_TOLERANCE = 2e-6


def random_case(seed: int, num_clients: int, num_blocks: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    active = rng.integers(50, 200, num_blocks)
    idle = active // rng.integers(2, 9, num_blocks)
    fixed = rng.integers(10, 60, num_clients)
    share = rng.uniform(0.3, 1.1, num_clients)
    budgets = fixed + idle.sum() + np.maximum(active.max(), share * (active - idle).sum())
    return {
        "memory": MemoryModel(active.tolist(), idle.tolist(), fixed.tolist()),
        "budgets": [int(b) for b in budgets],
        "priorities": np.round(rng.uniform(0.5, 3.0, num_blocks), 2).tolist(),
    }


def all_values(problem: Problem) -> np.ndarray:
    """F1 and F2 of every mask that satisfies the problem: [masks, 2]."""
    num_clients, num_blocks = len(problem.clients), len(problem.blocks)
    rows = np.array(list(itertools.product([0, 1], repeat=num_blocks)))
    used = rows @ np.array(problem.extra)
    active = rows.sum(axis=1)
    allowed = (active >= problem.min_active) & (active <= problem.max_active)
    picks = [np.flatnonzero(allowed & (used <= spare)) for spare in problem.spare]
    grid = np.array(list(itertools.product(*picks)), dtype=np.int64)  # [masks, N]: a row each
    grid = grid.reshape(-1, num_clients)
    coverage = rows[grid].sum(axis=1)
    grid, coverage = (x[(coverage >= problem.min_coverage).all(axis=1)] for x in (grid, coverage))
    f1 = (np.array(problem.priorities) / coverage).sum(axis=1)
    memory = np.array(problem.base) + used[grid]
    return np.stack([f1, (memory / np.array(problem.budgets)).sum(axis=1)], axis=1)
