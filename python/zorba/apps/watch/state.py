"""RunState: what the events of a run add up to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from zorba.apps.watch.fields import (
    Event,
    clean,
    counts,
    moment,
    names,
    number,
    table,
    text,
    texts,
    whole,
)
from zorba.apps.watch.records import ClientState, Fault, PlanState, Round, Status
from zorba.federated.events import EventReader

_PACE_ROUNDS = 20
_SILENT_SECONDS = 30.0
_NO_SCORES = ("event", "time", "schema", "round")
_NUMBERS = re.compile(r"0x[0-9a-f]+|-?\d+(\.\d+)?")


@dataclass
class RunState:
    """Folds the events of a run."""

    job: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)  # of the server
    plan: PlanState = field(default_factory=PlanState)  # in force
    clients: dict[str, ClientState] = field(default_factory=dict)  # in the order of the plan
    rounds: list[Round] = field(default_factory=list)  # in the order of their events
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # round, scores
    starts: list[tuple[datetime | None, int]] = field(default_factory=list)  # time, round in log
    last_round: int = 0  # where the last start is to end
    end: Event | None = None  # None while the run goes on, or when the server was killed
    last_event: datetime | None = None
    damaged: int = 0  # lines of the file that held no event
    _faults: dict[tuple[str, str, str], Fault] = field(default_factory=dict)
    _rounds_before_start: int = 0

    @property
    def faults(self) -> list[Fault]:
        """Faults by kind, in the order of their first occurrence."""
        return list(self._faults.values())

    @property
    def round(self) -> int:
        """Number of the last round done."""
        return self.rounds[-1].number if self.rounds else (self.starts[-1][1] if self.starts else 0)

    @property
    def pace(self) -> float | None:
        """Seconds from one round to the next, over the last rounds since the last start."""
        times = [r.time for r in self.rounds[self._rounds_before_start :][-_PACE_ROUNDS:]]
        if len(times) < 2 or times[0] is None or times[-1] is None:
            return None
        return max(0.0, (times[-1] - times[0]).total_seconds()) / (len(times) - 1)

    @property
    def problem(self) -> str:
        """Why the run ended, where it did not end well; else empty."""
        return text(self.end or {}, "problem")

    @property
    def fingerprints(self) -> list[str]:
        """The different fingerprints that the end told of the replicas."""
        return sorted(set(texts(self.end or {}, "fingerprints").values()))

    @property
    def identical(self) -> bool:
        """Whether the run ended with all replicas identical."""
        return bool(self.end and self.end.get("replicas_identical")) and len(self.fingerprints) == 1

    def memory(self, client: str) -> int | None:
        """Returns the bytes that a client takes: as measured there, else as predicted."""
        measured = self.clients[client].measured_bytes
        return self.plan.memory.get(client) if measured is None else measured

    def silence(self, now: datetime) -> float | None:
        """Returns the seconds since the last event of a run that has not ended, if they are many.

        The server waits for a client then, or was killed.
        """
        if self.end is not None or self.last_event is None:
            return None
        seconds = (now - self.last_event).total_seconds()
        # A run may have rounds of an hour, so a pause is measured in rounds, not in seconds alone.
        return seconds if seconds >= max(_SILENT_SECONDS, 5 * (self.pace or 0.0)) else None

    def apply(self, event: Event) -> None:
        """Takes the next event; kinds that are not known change nothing."""
        self.last_event = moment(event) or self.last_event
        match event["event"]:
            case "start":
                self._start(event)
            case "round":
                self._round(event)
            case "evaluation":
                self._evaluation(event)
            case "memory":
                for name, count in counts(event, "bytes").items():
                    self._client(name).measured_bytes = count
            case "fault":
                at = whole(event, "round", self.round)
                self._add_fault(event, text(event, "client"), "fault", text(event, "text"), at)
            case "lost":
                words = f"{whole(event, 'events')} events could not be written: the disk was full"
                self._add_fault(event, "", "server", words)
            case "replan":
                self._take_plan(event)
                words = f"new plan: {text(event, 'reason')}"
                self._add_fault(event, "", "server", words, whole(event, "round"))
            case "end":
                self.end = event
                if self.problem:
                    self._add_fault(event, "", "server", f"ended: {self.problem}")
                for name, reason in texts(event, "failures").items():
                    self._add_fault(event, name, "failed", f"at the end: {reason}")

    def _start(self, event: Event) -> None:
        log_round = whole(event, "round")
        if self.starts:
            how = "went on" if self.end is not None else "started again, after no end was written"
            self._add_fault(event, "", "server", f"the server {how}", log_round)
        self.job = text(event, "job")
        self.settings = table(event, "settings")
        self.machine = table(event, "machine")
        self.starts.append((moment(event), log_round))
        self.last_round = whole(event, "last_round")
        self.end = None
        self._rounds_before_start = len(self.rounds)
        self._take_plan(event)

    def _take_plan(self, event: Event) -> None:
        self.plan = PlanState.read(table(event, "plan"))
        for name in self.plan.clients:
            self._client(name)

    def _client(self, name: str) -> ClientState:
        if name not in self.clients:
            # Histories are as long as the rounds, so that they can be drawn side by side.
            self.clients[name] = ClientState(history=bytearray(len(self.rounds)))
        return self.clients[name]

    def _round(self, event: Event) -> None:
        this, time = whole(event, "round"), moment(event)
        up, down = counts(event, "bytes_up"), counts(event, "bytes_down")
        failures, refusals = texts(event, "failures"), texts(event, "refusals")
        measured, problem = set(names(event, "clients")), text(event, "problem")
        losses = table(event, "losses")
        for name in sorted({*up, *down, *failures, *refusals, *measured}):
            self._client(name)
        for name, client in self.clients.items():
            # A client can be in several lists; the worst is what people must see.
            if name in refusals:
                client.status = Status.REFUSED
            elif name in failures:
                client.status = Status.FAILED
            elif name in measured:
                client.status = Status.MEASURED
                client.last_round, client.loss = this, number(losses, name)
            elif name in up:
                client.status = Status.NOT_USED if problem else Status.JOINED
            else:
                client.status = Status.SITS_OUT
            client.reason = refusals.get(name) or failures.get(name) or ""
            if client.reason:
                self._add_fault(event, name, client.status.words, client.reason, this)
            client.history.append(client.status)
            client.bytes_up += up.get(name, 0)
            client.bytes_down += down.get(name, 0)
            if name in up:
                client.last_seen = time or client.last_seen
        if problem:
            self._add_fault(event, "", Status.NOT_USED.words, problem, this)
        rows = [n for n, name in enumerate(self.plan.clients) if name in measured]
        self.rounds.append(
            Round(
                number=this,
                time=time,
                seconds=number(event, "seconds") or 0.0,
                loss=number(event, "loss"),
                asked=len(down),
                bytes_up=sum(up.values()),
                bytes_down=sum(down.values()),
                coverage=self.plan.mask[rows].sum(axis=0, dtype=np.int64),
            )
        )

    def _evaluation(self, event: Event) -> None:
        scores = {clean(key): number(event, key) for key in event if key not in _NO_SCORES}
        found = {key: value for key, value in scores.items() if value is not None}
        if found:
            self.evaluations.append((whole(event, "round"), found))

    def _add_fault(
        self, event: Event, client: str, kind: str, words: str, at: int | None = None
    ) -> None:
        """Adds a fault of a round; None for the last one done."""
        # "answered after 31.2 s" a thousand times is one fault with a count, not a thousand.
        alike = (client, kind, _NUMBERS.sub("#", words))
        fault = self._faults.setdefault(alike, Fault(client, kind))
        fault.text, fault.last = words, moment(event)
        fault.rounds.append(self.round if at is None else at)


class Follower:
    """The state of a run folder, kept up with its events.

    Args:
        events: path of ``events.jsonl``; it need not exist yet.

    Attributes:
        state: as of the last update.
        reader: of the events.
    """

    def __init__(self, events: str | Path) -> None:
        self.reader = EventReader(events)
        self.state = RunState()

    def events(self) -> Iterator[Event]:
        """Yields each new event, after ``state`` took it.

        Raises:
            RunFolderError: the file holds no events.
        """
        for event in self.reader.poll():
            if "schema" in event:  # the first line of a file, perhaps of another run
                self.state = RunState()
            self.state.apply(event)
            yield event

    def update(self) -> RunState:
        """Takes all that is new, and returns the state.

        Raises:
            RunFolderError: the file holds no events.
        """
        for _ in self.events():
            pass
        self.state.damaged = self.reader.damaged
        return self.state
