"""A checked planning problem, and its two objectives computed exactly from a mask."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from zorba.planning.memory import MemoryModel, per_client, unique_names

Mask = NDArray[np.bool_]


class InfeasiblePlanError(ValueError):
    """No mask fits: says which clients fall short, and by how many bytes.

    Attributes:
        shortfalls: bytes short, by client name; empty where more memory would not help.
        missing_coverage: clients missing, by block name; empty where a client alone is too small.
    """

    def __init__(
        self,
        message: str,
        shortfalls: Mapping[str, int] | None = None,
        missing_coverage: Mapping[str, int] | None = None,
    ) -> None:
        """Keeps what the message says in a form that code can read."""
        super().__init__(message)
        self.shortfalls = dict(shortfalls or {})
        self.missing_coverage = dict(missing_coverage or {})


@dataclass(frozen=True)
class Problem:
    """Who may activate what: N clients, B blocks, sizes in whole bytes.

    ``base[n]`` is the memory of client n with every block idle and ``extra[b]`` what block b adds
    where it is active, so that V_n = base[n] + sum_b a[n, b] extra[b]; with every block active it
    is ``whole[n]``, at most as much (just as much where no client may activate every block).
    ``covered`` further clients have every block active.
    """

    clients: tuple[str, ...]
    blocks: tuple[str, ...]
    budgets: tuple[int, ...]
    base: tuple[int, ...]
    whole: tuple[int, ...]
    extra: tuple[int, ...]
    priorities: tuple[float, ...]
    min_coverage: int
    min_active: int
    max_active: int
    covered: int = 0

    @property
    def needed(self) -> int:
        """Clients of this problem that must have each block active."""
        return max(self.min_coverage - self.covered, 0)

    @cached_property
    def spare(self) -> tuple[int, ...]:
        """Bytes left of each budget with every block idle; negative where even that is too much."""
        return tuple(c - v for c, v in zip(self.budgets, self.base, strict=True))

    @cached_property
    def kinds(self) -> tuple[tuple[int, ...], ...]:
        """Blocks grouped by equal (extra bytes, priority).

        Blocks of a kind are interchangeable, so the solver only needs to know how many of them a
        client activates: equal blocks leave one integer a client rather than B binaries.
        """
        groups: dict[tuple[int, float], list[int]] = {}
        for b, key in enumerate(zip(self.extra, self.priorities, strict=True)):
            groups.setdefault(key, []).append(b)
        return tuple(tuple(group) for group in groups.values())

    def memory(self, mask: Mask) -> tuple[int, ...]:
        """Returns V_n of each client, exact."""
        return tuple(
            whole if row.all() else base + sum(self.extra[b] for b in np.flatnonzero(row).tolist())
            for base, whole, row in zip(self.base, self.whole, mask, strict=True)
        )

    def f1(self, mask: Mask) -> float:
        """Returns F1 = sum_b priorities[b] / coverage[b]."""
        # fsum rounds once: two masks of equal coverages have equal F1, whatever the order.
        pairs = zip(self.priorities, mask.sum(axis=0).tolist(), strict=True)
        return math.fsum(priority / (count + self.covered) for priority, count in pairs)

    def f2(self, mask: Mask) -> float:
        """Returns F2 = sum_n V_n / C_n."""
        pairs = zip(self.memory(mask), self.budgets, strict=True)
        return math.fsum(used / budget for used, budget in pairs)

    def split(self) -> tuple[list[int], Problem]:
        """Splits off the clients that have room for every block and need less than the sum for it.

        Sums, which a program is made of, do not tell the memory of such a client. F1 is least where
        it has every block active, whatever else is planned.

        Returns:
            Their indices, and the problem of the others.
        """
        total = sum(self.extra)
        needs = zip(self.whole, self.budgets, self.base, strict=True)
        # Only where the whole model takes less than the sum: else the program knows it already.
        full = [n for n, (whole, c, base) in enumerate(needs) if whole <= min(c, base + total - 1)]
        rest = [n for n in range(len(self.clients)) if n not in full]
        return full, replace(
            self,
            clients=tuple(self.clients[n] for n in rest),
            budgets=tuple(self.budgets[n] for n in rest),
            base=tuple(self.base[n] for n in rest),
            whole=tuple(self.whole[n] for n in rest),
            covered=self.covered + len(full),
        )


def make_problem(
    memory: MemoryModel,
    budgets: Sequence[int] | Mapping[str, int],
    priorities: Sequence[float] | None,
    min_coverage: int,
    min_active: int,
    max_active: int | None,
) -> Problem:
    """Checks what a user gave and puts it in client and block order."""
    if isinstance(budgets, Mapping):
        clients = unique_names(tuple(budgets), "client")
    else:
        clients = tuple(f"client-{n}" for n in range(len(budgets)))
    blocks = tuple(memory.block_names or ())
    if not clients:
        raise ValueError("a plan needs at least one client")
    # Every refusal names what is wrong before a solver could only say "infeasible".
    limits = per_client(budgets, clients, "budget")
    for name, limit in zip(clients, limits, strict=True):
        if limit == 0:
            raise ValueError(f"the budget of client {name!r} must be positive")
    idle = sum(memory.idle)
    most = len(blocks) if max_active is None else max_active
    if not 1 <= min_coverage <= len(clients):
        raise ValueError(f"min_coverage must be in 1..{len(clients)} (clients), not {min_coverage}")
    if not 0 <= min_active <= most <= len(blocks) or most < 1:
        raise ValueError(
            f"min_active and max_active must satisfy 0 <= min_active <= max_active <= "
            f"{len(blocks)} (blocks) and max_active >= 1, not {min_active} and {most}"
        )
    base = tuple(fixed + idle for fixed in memory.fixed_bytes(clients))
    extra = tuple(on - off for on, off in zip(memory.active, memory.idle, strict=True))
    whole = memory.all_active_bytes(clients)
    # Nobody may activate every block: what that would take is no part of the problem.
    if most < len(blocks):
        whole = tuple(sum(extra, start) for start in base)
    return Problem(
        clients=clients,
        blocks=blocks,
        budgets=limits,
        base=base,
        whole=whole,
        extra=extra,
        priorities=_checked_priorities(priorities, blocks),
        min_coverage=min_coverage,
        min_active=min_active,
        max_active=most,
    )


def _checked_priorities(
    priorities: Sequence[float] | None, blocks: tuple[str, ...]
) -> tuple[float, ...]:
    if priorities is None:
        return (1.0,) * len(blocks)
    values = tuple(float(p) for p in priorities)
    if len(values) != len(blocks):
        raise ValueError(f"priorities has {len(values)} values for {len(blocks)} blocks")
    for name, value in zip(blocks, values, strict=True):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"the priority of block {name!r} must be finite, >= 0, not {value}")
    if not any(values):
        raise ValueError("at least one priority must be positive")
    return values
