"""A finished plan: the mask, the front it was picked from, and what it costs each client."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from zorba.planning.problem import Mask
from zorba.sizes import unit_of


@dataclass(frozen=True, eq=False)
class ParetoPoint:
    """One mask of the front."""

    f1: float  # convergence surrogate, sum_b priority / coverage
    f2: float  # relative memory, sum_n V_n / C_n
    mask: Mask  # bool [N, B], read-only
    memory: tuple[int, ...]  # predicted bytes of each client
    gap: float  # the larger relative one of its two solves (of F2 without what no mask changes)
    proven: bool  # whether both solves reached the gap asked for within the time limit


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Which client activates which blocks."""

    clients: tuple[str, ...]  # their names, the rows of the mask
    blocks: tuple[str, ...]  # their names, its columns
    budgets: tuple[int, ...]  # bytes that each client may use
    front: tuple[ParetoPoint, ...]  # by rising F1 and falling F2
    chosen: int  # the point of the front that this plan is; ``dataclasses.replace`` changes it
    seconds: float  # that planning took

    @property
    def point(self) -> ParetoPoint:
        """The point of the front that this plan is."""
        return self.front[self.chosen]

    @property
    def mask(self) -> Mask:
        """Bool [N, B]: whether client n activates block b."""
        return self.point.mask

    @property
    def memory(self) -> tuple[int, ...]:
        """Predicted bytes of each client."""
        return self.point.memory

    @property
    def coverage(self) -> tuple[int, ...]:
        """How many clients have each block active."""
        return tuple(self.mask.sum(axis=0).tolist())

    @property
    def version(self) -> int:
        """Uint64: the first 8 bytes, little-endian, of SHA-256 of the names and the mask."""
        text = json.dumps([self.clients, self.blocks, self._rows], separators=(",", ":"))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")

    @property
    def _rows(self) -> list[str]:
        return ["".join("01"[int(active)] for active in row) for row in self.mask]

    def active_blocks(self, client: str) -> tuple[str, ...]:
        """Returns the names of the blocks that a client activates."""
        if client not in self.clients:
            raise KeyError(f"no client {client!r} in this plan")
        row = self.mask[self.clients.index(client)]
        return tuple(name for name, active in zip(self.blocks, row, strict=True) if active)

    def record(self) -> dict[str, Any]:
        """Returns what ``plan.json`` has of it: plain JSON, a row of 0 and 1 for each client."""
        return {
            "clients": self.clients,
            "blocks": self.blocks,
            "mask": self._rows,
            "budgets": self.budgets,
            "memory": self.memory,
            "version": f"{self.version:016x}",
            "front": [{"f1": p.f1, "f2": p.f2, "memory": p.memory} for p in self.front],
            "chosen": self.chosen,
        }

    def render(self) -> str:
        """Returns the activation map as plain text, one row a client and one column a block."""
        point = self.point
        proof = f"gap {point.gap:.1%}" + ("" if point.proven else ", stopped by the time limit")
        # One unit for the column, that of the smallest budget, so that rows compare at a glance.
        unit, unit_name = unit_of(min(self.budgets))
        left, right = max(map(len, (*self.clients, "coverage"))), max(len(self.blocks), 6)
        clients, blocks = self.mask.shape
        lines = [
            f"block plan {self.version:016x}: {clients} clients, {blocks} blocks",
            f"F1 {point.f1:.4g}, F2 {point.f2:.4g}, point {self.chosen + 1} of {len(self.front)}, "
            f"{proof}, {self.seconds:.2f} s",
            f"columns: {self.blocks[0]} to {self.blocks[-1]}",
            "",
            f"{'client':<{left}}  {'blocks':<{right}}  active  memory / budget ({unit_name})",
        ]
        rows = zip(self.clients, self.mask, self.memory, self.budgets, strict=True)
        for client, row, used, budget in rows:
            drawn = "".join("#" if active else "." for active in row)
            lines.append(
                f"{client:<{left}}  {drawn:<{right}}  {row.sum():>6}  "
                f"{used / unit:.2f} / {budget / unit:.2f}  {used / budget:4.0%}"
            )
        # Coverage reads downwards, a line a digit.
        width = len(str(max(self.coverage)))
        columns = [f"{count:>{width}}" for count in self.coverage]
        for i, digits in enumerate(zip(*columns, strict=True)):
            lines.append(f"{'' if i else 'coverage':<{left}}  {''.join(digits)}".rstrip())
        return "\n".join(lines)
