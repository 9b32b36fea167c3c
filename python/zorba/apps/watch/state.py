"""RunState: what the events of a run add up to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from zorba.apps.watch.fields import clean, counts, moment, number, sequence, table, whole
from zorba.apps.watch.records import ClientState, Fault, PlanState, Round, Status
from zorba.federated.events import EventReader

_PACE_ROUNDS = 20
_SILENT_SECONDS = 30.0


class RunState:
    """Folds events.

    Attributes:
        job: name.
        settings: by name.
        machine: of the server.
        plan: in force.
        clients: by name, in the order of the plan.
        rounds: that were done, in the order of their events.
        evaluations: (round, scores by name).
        faults: in the order of their first occurrence.
        starts: (time, last round in the log) of every start of the server.
        last_round: where the last start is to end.
        end: the end's event; None while the run goes on, or when the server was killed.
        last_event: time.
        damaged: lines of the file that held no event.
    """

    def __init__(self) -> None:
        self.job = ""
        self.settings: dict[str, Any] = {}
        self.machine: dict[str, Any] = {}
        self.plan = PlanState()
        self.clients: dict[str, ClientState] = {}
        self.rounds: list[Round] = []
        self.evaluations: list[tuple[int, dict[str, float]]] = []
        self.starts: list[tuple[datetime | None, int]] = []
        self.last_round = 0
        self.end: dict[str, Any] | None = None
        self.last_event: datetime | None = None
        self.damaged = 0
        self._faults: dict[tuple[str, str, str], Fault] = {}
        self._rounds_before_start = 0

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
        """Seconds from one round to the next, of the last rounds since the last start."""
        times = [r.time for r in self.rounds[self._rounds_before_start :][-_PACE_ROUNDS:]]
        if len(times) < 2 or times[0] is None or times[-1] is None:
            return None
        return max(0.0, (times[-1] - times[0]).total_seconds()) / (len(times) - 1)

    @property
    def problem(self) -> str:
        """What ended the run, where it did not end well; else empty."""
        return clean(self.end["problem"]) if self.end and self.end.get("problem") else ""

    def silence(self, now: datetime) -> float | None:
        """Returns the seconds since the last event of a run that has not ended, if they are many.

        The server waits for a client then, or was killed.
        """
        if self.end is not None or self.last_event is None:
            return None
        seconds = (now - self.last_event).total_seconds()
        return seconds if seconds >= max(_SILENT_SECONDS, 5 * (self.pace or 0.0)) else None

    def apply(self, event: Mapping[str, Any]) -> None:
        """Takes the next event; kinds that are not known change nothing."""
        self.last_event = moment(event) or self.last_event
        handler = {
            "start": self._start,
            "round": self._round,
            "evaluation": self._evaluation,
            "memory": self._memory,
            "fault": self._fault,
            "lost": self._lost,
            "replan": self._replan,
            "end": self._end,
        }.get(event["event"])
        if handler is not None:
            handler(event)

    def _start(self, event: Mapping[str, Any]) -> None:
        log_round = whole(event, "round")
        if self.starts:
            how = "went on" if self.end is not None else "started again, after no end was written"
            self._add_fault("", "server", f"the server {how}", log_round, event)
        self.job = clean(event.get("job", ""))
        self.settings = table(event, "settings")
        self.machine = table(event, "machine")
        self.starts.append((moment(event), log_round))
        self.last_round = whole(event, "last_round")
        self.end = None
        self._rounds_before_start = len(self.rounds)
        self._take_plan(event)

    def _take_plan(self, event: Mapping[str, Any]) -> None:
        self.plan = PlanState.read(table(event, "plan"))
        for name in self.plan.clients:
            self._client(name)

    def _client(self, name: str) -> ClientState:
        if name not in self.clients:
            self.clients[name] = ClientState(history=bytearray(len(self.rounds)))
        return self.clients[name]

    def _round(self, event: Mapping[str, Any]) -> None:
        round_number, time = whole(event, "round"), moment(event)
        up, down = counts(event, "bytes_up"), counts(event, "bytes_down")
        failures, refusals = table(event, "failures"), table(event, "refusals")
        measured = {clean(name) for name in sequence(event, "clients")}
        losses, problem = table(event, "losses"), clean(event.get("problem") or "")
        for name in sorted({*up, *down, *failures, *refusals, *measured}):
            self._client(name)
        for name, client in self.clients.items():
            status, reason = Status.SITS_OUT, ""
            if name in refusals:
                status, reason = Status.REFUSED, clean(refusals[name])
            elif name in failures:
                status, reason = Status.FAILED, clean(failures[name])
            elif name in measured:
                status = Status.MEASURED
                client.last_round = round_number
                client.loss = number(losses, name)
            elif name in up:
                status = Status.UNUSED if problem else Status.JOINED
            if reason:
                self._add_fault(name, status.words, reason, round_number, event)
            client.status, client.reason = status, reason
            client.history.append(status)
            client.bytes_up += up.get(name, 0)
            client.bytes_down += down.get(name, 0)
            if name in up:
                client.last_seen = time or client.last_seen
        if problem:
            self._add_fault("", Status.UNUSED.words, problem, round_number, event)
        rows = [n for n, name in enumerate(self.plan.clients) if name in measured]
        self.rounds.append(
            Round(
                number=round_number,
                time=time,
                seconds=number(event, "seconds") or 0.0,
                loss=number(event, "loss"),
                measured=len(measured),
                asked=len(down),
                bytes_up=sum(up.values()),
                bytes_down=sum(down.values()),
                coverage=self.plan.mask[rows].sum(axis=0).astype(np.int32),
            )
        )

    def _evaluation(self, event: Mapping[str, Any]) -> None:
        scores = {clean(key): number(event, key) for key in event if key not in _NO_SCORES}
        found = {key: value for key, value in scores.items() if value is not None}
        if found:
            self.evaluations.append((whole(event, "round"), found))

    def _memory(self, event: Mapping[str, Any]) -> None:
        for name, count in counts(event, "bytes").items():
            self._client(name).measured_bytes = count

    def _fault(self, event: Mapping[str, Any]) -> None:
        client = clean(event.get("client") or "")
        round_number = whole(event, "round", self.round)
        self._add_fault(client, "fault", clean(event.get("text", "")), round_number, event)

    def _lost(self, event: Mapping[str, Any]) -> None:
        text = f"{whole(event, 'events')} events could not be written: the disk was full"
        self._add_fault("", "server", text, self.round, event)

    def _replan(self, event: Mapping[str, Any]) -> None:
        self._take_plan(event)
        reason = clean(event.get("reason", ""))
        self._add_fault("", "server", f"new plan: {reason}", whole(event, "round"), event)

    def _end(self, event: Mapping[str, Any]) -> None:
        self.end = dict(event)
        if self.problem:
            self._add_fault("", "server", f"ended: {self.problem}", self.round, event)
        for name, text in table(event, "failures").items():
            self._add_fault(name, "failed", f"at the end: {clean(text)}", self.round, event)

    def _add_fault(
        self, client: str, kind: str, text: str, round_number: int, event: Mapping[str, Any]
    ) -> None:
        alike = (client, kind, _NUMBERS.sub("#", text))
        fault = self._faults.setdefault(
            alike, Fault(client, kind, text, [], moment(event), moment(event))
        )
        fault.text, fault.last = text, moment(event)
        fault.rounds.append(round_number)


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

    def events(self) -> Iterator[dict[str, Any]]:
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


_NO_SCORES = ("event", "time", "schema", "round")
_NUMBERS = re.compile(r"0x[0-9a-f]+|-?\d+(\.\d+)?")
