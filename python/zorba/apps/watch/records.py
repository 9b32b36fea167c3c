"""The parts of a run's state: clients, plan, rounds and faults."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from zorba.apps.watch.fields import Event, is_count, items, names


class Status(IntEnum):
    """What a client did in a round; the worse, the higher."""

    SITS_OUT = 0
    MEASURED = 1
    JOINED = 2
    NOT_USED = 3
    FAILED = 4
    REFUSED = 5

    @property
    def words(self) -> str:
        """How it is shown."""
        return self.name.lower().replace("_", " ")


@dataclass
class ClientState:
    """One client."""

    status: Status = Status.SITS_OUT  # in the last round
    reason: str = ""  # of a failure or a refusal in it
    history: bytearray = field(default_factory=bytearray)  # status in each of RunState.rounds
    last_round: int = 0  # whose scalars were used; 0 before the first
    last_seen: datetime | None = None  # time of its last answer
    loss: float | None = None  # of the last round that it measured
    bytes_up: int = 0  # total of its answers
    bytes_down: int = 0  # total of what it was sent
    measured_bytes: int | None = None  # memory as measured there

    @property
    def rounds_measured(self) -> int:
        """Rounds whose entry has its scalars."""
        return self.history.count(Status.MEASURED)

    @property
    def rounds_failed(self) -> int:
        """Rounds in which it failed or was refused."""
        return self.history.count(Status.FAILED) + self.history.count(Status.REFUSED)


@dataclass(frozen=True)
class PlanState:
    """The plan in force; bytes are by client, and empty where they are unknown."""

    clients: list[str] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    mask: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0), dtype=bool))
    budgets: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)  # predicted

    @staticmethod
    def read(record: Event) -> PlanState:
        """Reads ``plan.json``; a plan whose parts do not fit together is an empty one."""
        clients, blocks = names(record, "clients"), names(record, "blocks")
        rows = [str(row) for row in items(record, "mask")]
        if len(rows) != len(clients) or any(len(row) != len(blocks) for row in rows):
            return PlanState()
        mask = np.array([[c == "1" for c in row] for row in rows], dtype=bool)
        known = {
            key: {n: v for n, v in zip(clients, items(record, key), strict=False) if is_count(v)}
            for key in ("budgets", "memory")
        }
        return PlanState(clients, blocks, mask.reshape(len(clients), len(blocks)), **known)


@dataclass(frozen=True)
class Round:
    """One round; bytes are of all clients."""

    number: int  # from 1
    time: datetime | None
    seconds: float
    loss: float | None  # None when nobody replied
    asked: int  # clients that were sent a message
    bytes_up: int
    bytes_down: int
    coverage: npt.NDArray[np.int64]  # clients that covered each block, [blocks]


@dataclass
class Fault:
    """Faults that are alike except for numbers in their text."""

    client: str  # empty for one of the server
    kind: str  # failed, refused, not used, server, or fault
    text: str = ""  # of the last one
    rounds: list[int] = field(default_factory=list)
    last: datetime | None = None

    @property
    def words(self) -> str:
        """Who, what and why, in one line."""
        return f"{self.client} {self.kind}: {self.text}".lstrip()
