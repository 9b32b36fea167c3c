"""What is known of a run's clients, plan, rounds and faults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from zorba.apps.watch.fields import clean, is_count, sequence


class Status(IntEnum):
    """What a client did in a round; the worse, the higher."""

    SITS_OUT = 0
    MEASURED = 1
    JOINED = 2
    UNUSED = 3
    FAILED = 4
    REFUSED = 5

    @property
    def words(self) -> str:
        """How it is shown."""
        return ("sits out", "measured", "joined", "not used", "failed", "refused")[self]


@dataclass
class ClientState:
    """One client.

    Attributes:
        status: in the last round.
        reason: of a failure or a refusal in it.
        history: status in each round of ``RunState.rounds``, one byte each.
        last_round: whose scalars were used; 0 before the first.
        last_seen: time of its last answer.
        loss: of the last round that it measured.
        bytes_up: total of its answers.
        bytes_down: total of what it was sent.
        measured_bytes: memory as measured there; None where unknown.
    """

    status: Status = Status.SITS_OUT
    reason: str = ""
    history: bytearray = field(default_factory=bytearray)
    last_round: int = 0
    last_seen: datetime | None = None
    loss: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    measured_bytes: int | None = None

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
    """The plan in force.

    Attributes:
        clients: names.
        blocks: names.
        mask: bool [clients, blocks].
        budgets: bytes by client; empty where unknown.
        memory: predicted bytes by client; empty where unknown.
    """

    clients: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    mask: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0), dtype=bool))
    budgets: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def read(record: Mapping[str, Any]) -> PlanState:
        """Reads ``plan.json``; a plan whose parts do not fit together is an empty one."""
        clients = tuple(clean(name) for name in sequence(record, "clients"))
        blocks = tuple(clean(name) for name in sequence(record, "blocks"))
        rows = [str(row) for row in sequence(record, "mask")]
        if len(rows) != len(clients) or any(len(row) != len(blocks) for row in rows):
            return PlanState()
        mask = np.array([[c == "1" for c in row] for row in rows], dtype=bool)
        by_client = {
            key: {n: v for n, v in zip(clients, sequence(record, key), strict=False) if is_count(v)}
            for key in ("budgets", "memory")
        }
        return PlanState(clients, blocks, mask.reshape(len(clients), len(blocks)), **by_client)

    @property
    def coverage(self) -> npt.NDArray[np.int64]:
        """How many clients have each block active, [blocks]."""
        return np.asarray(self.mask.sum(axis=0), dtype=np.int64)

    def row(self, client: str) -> npt.NDArray[np.bool_] | None:
        """Returns a client's mask, bool [blocks]."""
        return self.mask[self.clients.index(client)] if client in self.clients else None


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        number: from 1.
        time: of its event.
        seconds: that it took.
        loss: None when nobody replied.
        measured: how many clients' scalars were used.
        asked: how many clients were sent a message.
        bytes_up: of all clients.
        bytes_down: of all clients.
        coverage: clients that covered each block, int32 [blocks].
    """

    number: int
    time: datetime | None
    seconds: float
    loss: float | None
    measured: int
    asked: int
    bytes_up: int
    bytes_down: int
    coverage: npt.NDArray[np.int32]


@dataclass
class Fault:
    """Faults that are alike but for numbers in their text.

    Attributes:
        client: name; empty for one of the server.
        kind: "failed", "refused", "not used", "server", or "fault".
        text: of the last one.
        rounds: in which they came.
        first: time.
        last: time.
    """

    client: str
    kind: str
    text: str
    rounds: list[int]
    first: datetime | None
    last: datetime | None
