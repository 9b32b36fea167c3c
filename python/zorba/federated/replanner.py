"""Replanner: plans masks anew, from the importance of blocks that the replies' scalars tell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from zorba.federated.aggregate import clip_scalars
from zorba.files import write_whole

if TYPE_CHECKING:
    from zorba.federated.server import RoundOutcome, Server
    from zorba.planning import BlockPlan, MemoryModel

_SCHEMA = 1


@dataclass(frozen=True)
class _Energies:
    """What one round told: of each client its mask, and the mean of its squared scalars."""

    round: int
    masks: tuple[tuple[bool, ...], ...]
    energies: tuple[float, ...]
    samples: int


class Replanner:
    """Plans who activates what again, every so many rounds and at no traffic of its own.

    Give it to ``run_federation``. The scalars of a client are large where its active blocks have
    large gradients; over clients with different masks that tells how much each block matters
    (``zorba.planning.estimate_importance``), and the plan is made again with these priorities.
    New masks ride on the next plans, as ever. Masks are in no log entry's meaning, so replicas stay
    bit-identical whatever is planned.

    Args:
        memory: of the clients, as ``plan_blocks`` takes it.
        budgets: bytes that each client of the server may use.
        every: rounds between plans.
        window: rounds that an estimate looks back; twice ``every`` by default.
        least_gain: new masks are taken only where they lower F1 by this part, since moving blocks
            between host and device costs time.
        state: file in which the energies seen and the masks are kept over a restart of the server;
            None for memory alone. Losing it costs accuracy, not correctness: the estimate begins
            anew, under the masks that the server was started with.
        options: further arguments of ``plan_blocks``: ``min_coverage``, ``tolerance``, ...

    Attributes:
        importance: the last estimate, float64 [blocks] of mean 1; None before the first.
        plan: the plan that was taken last, or None.
    """

    def __init__(
        self,
        memory: MemoryModel,
        budgets: Mapping[str, int],
        every: int,
        window: int | None = None,
        least_gain: float = 0.02,
        state: str | Path | None = None,
        **options: Any,
    ) -> None:
        if every < 1 or (window is not None and window < 1):
            raise ValueError(f"every and window must be at least 1, got {every} and {window}")
        if "priorities" in options:
            raise ValueError("a Replanner finds the priorities itself")
        self.importance: npt.NDArray[np.float64] | None = None
        self.plan: BlockPlan | None = None
        self._memory = memory
        self._budgets = dict(budgets)
        self._every = every
        self._window = 2 * every if window is None else window
        self._least_gain = least_gain
        self._state = None if state is None else Path(state)
        self._options = {"num_points": 2, **options}  # the front is not looked at
        self._seen: list[_Energies] = []

    def begin(self, server: Server) -> None:
        """Takes up the state of an earlier run of the same job, masks included.

        Raises:
            ValueError: the file is of another job, or of none.
        """
        if self._seen or self._state is None or not self._state.exists():
            return
        try:
            record = json.loads(self._state.read_text())
            job, schema = record["job"], record["schema"]
            seen = [
                _Energies(r["round"], _rows(r["masks"]), tuple(r["energies"]), r["samples"])
                for r in record["rounds"]
            ]
            masks = dict(zip(record["masks"], _rows(record["masks"].values()), strict=True))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._state} is no state of a Replanner: {error!r}") from error
        if (schema, job) != (_SCHEMA, server.settings.job_id):
            raise ValueError(
                f"{self._state} is of job {job:#018x} and schema {schema}, not of "
                f"{server.settings.job_id:#018x} and {_SCHEMA}: give another file"
            )
        self._seen = [s for s in seen if s.round <= server.log.last_round]
        if set(masks) == set(server.names) and masks != server.masks:
            server.set_masks(list(masks), np.array(list(masks.values())))

    def after_round(self, server: Server, outcome: RoundOutcome) -> bool:
        """Takes in a round, and plans where it is time to.

        Args:
            server: whose masks are those of the round, and are replaced by a new plan's.
            outcome: of its ``end_round``.

        Returns:
            Whether there are new masks.

        Raises:
            InfeasiblePlanError, ValueError: as ``plan_blocks``.
        """
        replies, masks = outcome.replies, server.masks
        if replies:
            scalars = clip_scalars(replies.scalars, server.settings.clip)
            energies = np.square(scalars).mean(axis=(1, 2))
            self._seen.append(
                _Energies(
                    outcome.entry.round,
                    tuple(masks[name] for name in replies),
                    tuple(energies.tolist()),
                    scalars[0].size,
                )
            )
            oldest = outcome.entry.round - self._window
            self._seen = [s for s in self._seen if s.round > oldest]
        due = outcome.entry.round % self._every == 0 and bool(self._seen)
        changed = due and self._plan_again(server)
        if self._state is not None:
            write_whole(self._state, self._record(server))
        return changed

    def _plan_again(self, server: Server) -> bool:
        from zorba.planning import estimate_importance, plan_blocks

        masks = server.masks
        self.importance = estimate_importance(
            [row for seen in self._seen for row in seen.masks],
            [energy for seen in self._seen for energy in seen.energies],
            [seen.samples for seen in self._seen for _ in seen.masks],
        )
        missing = [name for name in masks if name not in self._budgets]
        if missing:
            raise ValueError(f"the Replanner has no budget for {', '.join(missing)}")
        plan = plan_blocks(
            self._memory.only(masks),
            {name: self._budgets[name] for name in masks},
            priorities=self.importance.tolist(),
            **self._options,
        )
        coverage = np.array(list(masks.values())).sum(axis=0)
        if coverage.all():
            now = float((self.importance / coverage).sum())
            if plan.point.f1 > (1 - self._least_gain) * now:
                return False
        self.plan = plan
        server.set_masks(list(plan.clients), plan.mask)
        return True

    def _record(self, server: Server) -> str:
        record = {
            "schema": _SCHEMA,
            "job": server.settings.job_id,
            "masks": {name: _text(row) for name, row in server.masks.items()},
            "rounds": [
                {
                    "round": seen.round,
                    "masks": [_text(row) for row in seen.masks],
                    "energies": seen.energies,
                    "samples": seen.samples,
                }
                for seen in self._seen
            ],
        }
        return json.dumps(record)


def _text(row: tuple[bool, ...]) -> str:
    return "".join("1" if active else "0" for active in row)


def _rows(texts: Any) -> tuple[tuple[bool, ...], ...]:
    return tuple(tuple(bit == "1" for bit in text) for text in texts)
