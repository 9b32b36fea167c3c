"""A checked planning problem, and its two objectives computed exactly from a mask."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from zorba.planning.memory import MemoryModel, unique_names, whole_bytes

Mask = NDArray[np.bool_]
Whole = NDArray[np.int64]
Vector = NDArray[np.float64]

_UNCOVERED = 1e-6  # counts as so many clients


class InfeasiblePlanError(ValueError):
    """No mask fits: says which clients fall short, and by how many bytes."""

    def __init__(self, message: str, shortfalls: Mapping[str, int] | None = None) -> None:
        super().__init__(message)
        # Bytes short, by client name; empty where more memory would not help.
        self.shortfalls = dict(shortfalls or {})


@dataclass(frozen=True, eq=False)
class Problem:
    """Who may activate what. V_n, the memory of client n, is base[n] + sum_b a[n, b] extra[b]."""

    clients: tuple[str, ...]  # N names
    blocks: tuple[str, ...]  # B names
    budgets: tuple[int, ...]  # C_n, bytes
    base: Whole  # [N], bytes with every block idle
    extra: Whole  # [B], bytes that a block adds where it is active
    priorities: tuple[float, ...]
    min_coverage: int
    min_active: Whole  # [N]
    max_active: int

    @cached_property
    def spare(self) -> Whole:
        """Bytes that active blocks may take on each client, [N]."""
        return np.array(self.budgets, dtype=np.int64) - self.base

    @cached_property
    def weights(self) -> Vector:
        """Weights of the blocks in F1, [B], scaled so that F1 is at most 1."""
        return np.array(self.priorities) / math.fsum(self.priorities)

    @cached_property
    def shares(self) -> Vector:
        """What each block adds to F2, [N, B], scaled to at most 1 in all.

        A client that has every block in any case adds nothing, nor does an idle block that stays.
        """
        changes = self.min_active < len(self.blocks)
        shares = np.outer(changes / np.array(self.budgets, dtype=np.float64), self.extra)
        return shares / (shares.sum() or 1.0)

    @cached_property
    def kinds(self) -> tuple[tuple[int, ...], ...]:
        """Blocks grouped by equal (extra bytes, priority).

        Blocks of a kind are interchangeable, so the solver only needs to know how many of them a
        client activates: equal blocks leave one integer a client rather than B binaries.
        """
        groups: dict[tuple[int, float], list[int]] = {}
        for b, key in enumerate(zip(self.extra.tolist(), self.priorities, strict=True)):
            groups.setdefault(key, []).append(b)
        return tuple(tuple(group) for group in groups.values())

    def values(self, mask: Mask) -> Vector:
        """Returns F1 and F2, scaled; a block that nobody covers makes F1 huge."""
        f1 = self.weights @ (1 / np.maximum(mask.sum(axis=0), _UNCOVERED))
        return np.array([f1, self.shares[mask].sum()])

    def f1(self, mask: Mask) -> float:
        """Returns F1 = sum_b priorities[b] / coverage[b], as it is told."""
        # fsum rounds once: two masks of equal coverages have equal F1, whatever the order.
        pairs = zip(self.priorities, mask.sum(axis=0).tolist(), strict=True)
        return math.fsum(priority / count for priority, count in pairs)


def make_problem(
    memory: MemoryModel,
    budgets: Sequence[int] | Mapping[str, int],
    priorities: Sequence[float] | None = None,
    min_coverage: int = 1,
    min_active: int = 1,
    max_active: int | None = None,
) -> Problem:
    """Checks what a user gave: a refusal names what is wrong, a solver only says "infeasible"."""
    if not isinstance(budgets, Mapping):
        budgets = {f"client-{n}": budget for n, budget in enumerate(budgets)}
    clients, blocks = unique_names(tuple(budgets), "client"), tuple(memory.block_names or ())
    if not clients:
        raise ValueError("a plan needs at least one client")
    limits = tuple(whole_bytes(v, f"budget of client {name!r}") for name, v in budgets.items())
    if 0 in limits:
        raise ValueError(f"the budget of client {clients[limits.index(0)]!r} must be positive")
    most = len(blocks) if max_active is None else max_active
    if not 1 <= min_coverage <= len(clients):
        raise ValueError(f"min_coverage must be in 1..{len(clients)} (clients), not {min_coverage}")
    if not 0 <= min_active <= most <= len(blocks) or most < 1:
        raise ValueError(
            f"min_active and max_active must satisfy 0 <= min_active <= max_active <= "
            f"{len(blocks)} (blocks) and max_active >= 1, not {min_active} and {most}"
        )
    weights = (1.0,) * len(blocks) if priorities is None else tuple(map(float, priorities))
    if len(weights) != len(blocks):
        raise ValueError(f"priorities has {len(weights)} values for {len(blocks)} blocks")
    for name, weight in zip(blocks, weights, strict=True):
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"the priority of block {name!r} must be finite, >= 0, not {weight}")
    if not any(weights):
        raise ValueError("at least one priority must be positive")
    wanted, possible = len(blocks) * min_coverage, len(clients) * most
    if wanted > possible:
        raise InfeasiblePlanError(
            f"{len(blocks)} blocks on {min_coverage} clients each are {wanted} activations, but "
            f"{len(clients)} clients with max_active {most} give {possible}: "
            f"{wanted - possible} missing, whatever the budgets"
        )
    extra = [on - off for on, off in zip(memory.active, memory.idle, strict=True)]
    idle = memory.bytes_of([False] * len(blocks))
    total = idle + sum(extra)
    whole = memory.bytes_of([True] * len(blocks)) if most == len(blocks) else total
    need = min(idle + sum(sorted(extra)[:min_active]), whole)
    if short := {name: need - c for name, c in zip(clients, limits, strict=True) if c < need}:
        lines = [
            f"client {name!r} has {need - missing:,} bytes but needs at least {need:,} for "
            f"{min_active} active block{'s' * (min_active != 1)}: {missing:,} bytes short"
            for name, missing in short.items()
        ]
        raise InfeasiblePlanError("; ".join(lines), short)
    # F1 is least where a client that has room for it has every block active. Where that takes less
    # than the sum, it is settled here, and the base of such a client makes its sum right.
    full = np.array([whole <= c and whole < total for c in limits])
    base = np.where(full, idle - (total - whole), idle)
    least = np.where(full, len(blocks), min_active)
    more = np.array(extra, dtype=np.int64)
    return Problem(clients, blocks, limits, base, more, weights, min_coverage, least, most)
