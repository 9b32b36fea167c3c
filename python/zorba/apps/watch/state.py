"""RunState: what the events of a run add up to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from zorba.apps.watch.events import Event, Plan, Status
from zorba.federated.events import EventReader

_PACE_ROUNDS = 20
_NUMBERS = re.compile(r"0x[0-9a-f]+|-?\d+(\.\d+)?")


@dataclass
class ClientState:
    """One client."""

    history: bytearray  # status in each of RunState.rounds
    status: Status = Status.SITS_OUT  # in the last round
    reason: str = ""  # of a failure or a refusal in the last round
    last_round: int = 0  # whose scalars were used; 0 before the first
    last_seen: datetime | None = None  # time of its last answer
    loss: float | None = None  # of the last round that it measured
    rounds_measured: int = 0  # whose entry has its scalars
    rounds_failed: int = 0  # in which it failed or was refused
    bytes_up: int = 0  # total of its answers
    bytes_down: int = 0  # total of what it was sent


# A run may have 10,000 rounds of 100 clients: only sums of a round are kept, not its event.
@dataclass(slots=True)
class Round:
    """A round that is done."""

    round: int
    time: datetime  # of its end
    seconds: float
    loss: float | None
    asked: int  # clients that were sent a message
    bytes_up: int  # of all clients, as those down
    bytes_down: int


@dataclass
class Fault:
    """Faults that are alike except for numbers in their text."""

    client: str  # empty for one of the server
    kind: str  # failed, refused, not used, server, or fault
    text: str = ""  # of the last one
    rounds: list[int] = field(default_factory=list)
    last: datetime | None = None


@dataclass
class RunState:
    """Folds the events of a run."""

    job: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)  # of the server
    plan: Plan = field(default_factory=Plan)  # in force
    clients: dict[str, ClientState] = field(default_factory=dict)  # in the order of the plan
    rounds: list[Round] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # round, scores
    faults: dict[tuple[str, str, str], Fault] = field(default_factory=dict)  # in order of the first
    starts: list[Event] = field(default_factory=list)
    rounds_before_start: int = 0  # the last start
    round: int = 0  # the last one done
    last_round: int = 0  # where the last start is to end
    end: Event | None = None  # None while the run goes on, or when the server was killed
    identical: bool = False  # whether the run ended with all replicas identical
    last_event: datetime | None = None
    damaged: int = 0  # lines of the file that held no event

    @property
    def pace(self) -> float | None:
        """Seconds from one round to the next, over the last rounds since the last start."""
        recent = self.rounds[self.rounds_before_start :][-_PACE_ROUNDS:]
        if len(recent) < 2:
            return None
        return max(0.0, (recent[-1].time - recent[0].time).total_seconds()) / (len(recent) - 1)

    @property
    def coverage(self) -> list[int]:
        """How many clients that measured in the last round have each block active."""
        rows = zip(self.plan.clients, self.plan.mask, strict=True)
        used = [row for name, row in rows if self.clients[name].status is Status.MEASURED]
        return [sum(row[b] == "1" for row in used) for b in range(len(self.plan.blocks))]

    def apply(self, event: Event) -> None:
        """Takes the next event; kinds that are not known change nothing."""
        self.last_event = event.time
        match event.event:
            case "start":
                if self.starts:
                    how = "went on" if self.end else "started again, after no end was written"
                    self._add_fault(event, "server", f"the server {how}")
                self.job, self.settings, self.machine = event.job, event.settings, event.machine
                self.plan, self.round, self.last_round = event.plan, event.round, event.last_round
                self.end, self.identical = None, False
                self.starts.append(event)
                self.rounds_before_start = len(self.rounds)
                self._meet(event.plan.clients)
            case "round":
                self._round(event)
            case "evaluation" if event.scores:
                self.evaluations.append((event.round, event.scores))
            case "fault":
                self._add_fault(event, "fault", event.text, event.client)
            case "lost":
                words = f"{event.events} events could not be written: the disk was full"
                self._add_fault(event, "server", words)
            case "end":
                self.end = event
                told = set(event.fingerprints.values())
                self.identical = event.replicas_identical and len(told) == 1
                if event.problem:
                    self._add_fault(event, "server", f"ended: {event.problem}")
                for name, reason in event.failures.items():
                    self._add_fault(event, "failed", f"at the end: {reason}", name)

    def _meet(self, names: list[str]) -> None:
        for name in names:
            # Histories are as long as the rounds, so that they can be drawn side by side.
            self.clients.setdefault(name, ClientState(bytearray(len(self.rounds))))

    def _round(self, event: Event) -> None:
        # A client can be in several lists. The later ones win: the worst is what people must see.
        did = dict.fromkeys(event.bytes_up, Status.NOT_USED if event.problem else Status.JOINED)
        did |= dict.fromkeys(event.clients, Status.MEASURED)
        did |= dict.fromkeys(event.failures, Status.FAILED)
        did |= dict.fromkeys(event.refusals, Status.REFUSED)
        up, down = event.bytes_up, event.bytes_down
        self._meet(sorted({*did, *down}))
        for name, client in self.clients.items():
            client.status = did.get(name, Status.SITS_OUT)
            client.history.append(client.status)
            client.reason = event.refusals.get(name) or event.failures.get(name) or ""
            if client.reason:
                self._add_fault(event, client.status.words, client.reason, name)
            if client.status is Status.MEASURED:
                client.last_round, client.loss = event.round, event.losses.get(name)
            client.rounds_measured += client.status is Status.MEASURED
            client.rounds_failed += client.status in (Status.FAILED, Status.REFUSED)
            if name in up:
                client.last_seen = event.time
            client.bytes_up += up.get(name, 0)
            client.bytes_down += down.get(name, 0)
        if event.problem:
            self._add_fault(event, Status.NOT_USED.words, event.problem)
        self.round, times = event.round, (event.time, event.seconds)
        sums = (len(down), sum(up.values()), sum(down.values()))
        self.rounds.append(Round(event.round, *times, event.loss, *sums))

    def _add_fault(self, event: Event, kind: str, words: str, client: str = "") -> None:
        # "answered after 31.2 s" a thousand times is one fault with a count, not a thousand.
        alike = (client, kind, _NUMBERS.sub("#", words))
        fault = self.faults.setdefault(alike, Fault(client, kind))
        fault.text, fault.last = words, event.time
        fault.rounds.append(event.round or self.round)


class Follower:
    """Keeps ``state`` up with the events of a run.

    ``events`` is the path of ``events.jsonl``, which need not exist yet. Reading a file that holds
    no events raises RunFolderError.
    """

    def __init__(self, events: str | Path) -> None:
        self.state = RunState()
        self._reader = EventReader(events)

    def events(self) -> Iterator[Event]:
        """Yields each new event, after ``state`` took it."""
        for record in self._reader.poll():
            if "schema" in record:  # the first line of a file, perhaps of another run
                self.state = RunState()
            try:
                event = Event.model_validate(record)
            except ValidationError:  # a field of another type than it should be
                self._reader.damaged += 1
                continue
            self.state.apply(event)
            yield event

    def update(self) -> RunState:
        """Takes all that is new, and returns the state."""
        for _ in self.events():
            pass
        self.state.damaged = self._reader.damaged
        return self.state
