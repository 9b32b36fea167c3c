"""Small planning problems, and every plan that they have."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
from zorba.planning import MemoryModel
from zorba.planning.problem import Problem

# HiGHS lets rows be off by 1e-6 on objectives scaled to at most 1, so the second stage may move the
# first objective by that much; priorities of two decimals keep distinct F1 values further apart.
SOLVER_TOLERANCE = 2e-6


def random_case(
    seed: int, num_clients: int, num_blocks: int, *, whole: bool = False, alike: bool = False
) -> dict[str, Any]:
    """Arguments of plan_blocks.

    With `whole`, clients with every block active may need less; with `alike`, blocks are of one or
    two kinds.
    """
    rng = np.random.default_rng(seed)
    active = rng.integers(50, 200, num_blocks)
    if alike:
        active = active[np.arange(num_blocks) % rng.integers(1, 3)]
    idle = active // (4 if alike else rng.integers(2, 9, num_blocks))
    fixed = int(rng.integers(10, 60))
    share = rng.uniform(0.3, 1.1, num_clients)
    budgets = fixed + idle.sum() + np.maximum(active.max(), share * (active - idle).sum())
    priorities = np.round(rng.uniform(0.5, 3.0, num_blocks), 2)
    if alike:
        priorities = np.full(num_blocks, priorities[0])
    memory = MemoryModel(active.tolist(), idle.tolist(), fixed)
    if whole:
        memory = replace(memory, whole=int(rng.uniform(0.5, 1.05) * (fixed + active.sum())))
    return {
        "memory": memory,
        "budgets": [int(b) for b in budgets],
        "priorities": priorities.tolist(),
    }


def all_values(problem: Problem, memory: MemoryModel, free: bool = False) -> np.ndarray:
    """F1 and F2 of every mask that satisfies the problem: [masks, 2].

    Clients that have room for the whole model, and need less for it than the sum of its parts, have
    every block active, unless `free`.
    """
    rows = np.array(list(itertools.product([0, 1], repeat=len(problem.blocks))))
    active = rows.sum(axis=1)
    least = min(problem.min_active)
    allowed = (active >= least) & (active <= problem.max_active)
    used = np.array([memory.bytes_of(row.tolist()) for row in rows])
    less = used[-1] < memory.fixed + sum(memory.active)
    picks = []
    for budget in problem.budgets:
        fits = allowed & (used <= budget)
        if less and fits[-1] and not free:
            fits &= active == len(problem.blocks)
        picks.append(np.flatnonzero(fits))
    grid = np.array(list(itertools.product(*picks)), dtype=np.int64)  # [masks, N]: a row each
    grid = grid.reshape(-1, len(picks))
    coverage = rows[grid].sum(axis=1)
    grid, coverage = (x[(coverage >= problem.min_coverage).all(axis=1)] for x in (grid, coverage))
    f1 = (np.array(problem.priorities) / coverage).sum(axis=1)
    return np.stack([f1, (used[grid] / np.array(problem.budgets)).sum(axis=1)], axis=1)
