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
    reason: str = ""  # of a failure or a refusal in the last round
    last_round: int = 0  # whose scalars were used; 0 before the first
    last_seen: datetime | None = None  # time of its last answer
    loss: float | None = None  # of the last round that it measured
    bytes_up: int = 0  # total of its answers
    bytes_down: int = 0  # total of what it was sent

    @property
    def status(self) -> Status:
        """What it did in the last round."""
        return Status(self.history[-1]) if self.history else Status.SITS_OUT

    @property
    def rounds_measured(self) -> int:
        """Rounds whose entry has its scalars."""
        return self.history.count(Status.MEASURED)

    @property
    def rounds_failed(self) -> int:
        """Rounds in which it failed or was refused."""
        return self.history.count(Status.FAILED) + self.history.count(Status.REFUSED)


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
    rounds: list[Event] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # round, scores
    faults: dict[tuple[str, str, str], Fault] = field(default_factory=dict)  # in order of the first
    starts: list[Event] = field(default_factory=list)
    rounds_before_start: int = 0  # the last start
    last_round: int = 0  # where the last start is to end
    end: Event | None = None  # None while the run goes on, or when the server was killed
    last_event: datetime | None = None
    damaged: int = 0  # lines of the file that held no event

    @property
    def round(self) -> int:
        """Number of the last round done."""
        last = self.rounds[-1:] or self.starts[-1:]
        return last[0].round if last else 0

    @property
    def pace(self) -> float | None:
        """Seconds from one round to the next, over the last rounds since the last start."""
        recent = self.rounds[self.rounds_before_start :][-_PACE_ROUNDS:]
        times = [r.time for r in recent if r.time is not None]
        if len(times) < 2:
            return None
        return max(0.0, (times[-1] - times[0]).total_seconds()) / (len(times) - 1)

    @property
    def identical(self) -> bool:
        """Whether the run ended with all replicas identical."""
        end = self.end
        return end is not None and end.replicas_identical and len({*end.fingerprints.values()}) == 1

    def apply(self, event: Event) -> None:
        """Takes the next event; kinds that are not known change nothing."""
        self.last_event = event.time or self.last_event
        match event.event:
            case "start":
                self._start(event)
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
                if event.problem:
                    self._add_fault(event, "server", f"ended: {event.problem}")
                for name, reason in event.failures.items():
                    self._add_fault(event, "failed", f"at the end: {reason}", name)

    def _start(self, event: Event) -> None:
        if self.starts:
            how = "went on" if self.end else "started again, after no end was written"
            self._add_fault(event, "server", f"the server {how}")
        self.job, self.settings, self.machine = event.job, event.settings, event.machine
        self.plan, self.last_round, self.end = event.plan, event.last_round, None
        self.starts.append(event)
        self.rounds_before_start = len(self.rounds)
        self._meet(event.plan.clients)

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
        self._meet(sorted({*did, *event.bytes_down}))
        for name, client in self.clients.items():
            client.history.append(did.get(name, Status.SITS_OUT))
            client.reason = event.refusals.get(name) or event.failures.get(name) or ""
            if client.reason:
                self._add_fault(event, client.status.words, client.reason, name)
            if client.status is Status.MEASURED:
                client.last_round, client.loss = event.round, event.losses.get(name)
            if name in event.bytes_up:
                client.last_seen = event.time or client.last_seen
            client.bytes_up += event.bytes_up.get(name, 0)
            client.bytes_down += event.bytes_down.get(name, 0)
        if event.problem:
            self._add_fault(event, Status.NOT_USED.words, event.problem)
        self.rounds.append(event)

    def _add_fault(self, event: Event, kind: str, words: str, client: str = "") -> None:
        # "answered after 31.2 s" a thousand times is one fault with a count, not a thousand.
        alike = (client, kind, _NUMBERS.sub("#", words))
        fault = self.faults.setdefault(alike, Fault(client, kind))
        fault.text, fault.last = words, event.time
        fault.rounds.append(event.round or self.round)


class Follower:
    """The state of a run folder, kept up with its events.

    Args:
        events: path of ``events.jsonl``; it need not exist yet.

    Attributes:
        state: as of the last update.

    Raises:
        RunFolderError: when it reads a file that holds no events.
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
