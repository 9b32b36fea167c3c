"""Runs a server and its sites as processes, and starts again what was killed."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from tests.federated.faults import lives
from tests.federated.faults.kills import Kill, Reaper, Schedule
from tests.federated.faults.lives import SERVER, Job
from tests.federated.world import NAMES

_PATIENCE = 1800.0  # seconds after which a run hangs: never a verdict on speed
_LOOK_SECONDS = 0.2
# Forks of a process that has all modules and no threads: a start takes milliseconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([lives.__name__])


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        fingerprints: of each site at the end.
        identical: whether all that could be reached ended with the same.
        log: bytes of the server's log.
        kills: that happened, in their order: process and point.
        notes: lines that processes wrote for the test.
    """

    fingerprints: dict[str, int]
    identical: bool
    log: bytes
    kills: tuple[tuple[str, str], ...]
    notes: tuple[dict[str, Any], ...]


def run(job: Job, schedule: Schedule | None = None) -> Outcome:
    """Runs a job to its end; killed processes start again with the next kill of the schedule.

    Args:
        job: what to run.
        schedule: of kills; used up.

    Raises:
        TimeoutError: the run did not end.
    """
    schedule = schedule or Schedule()
    job.folder.mkdir(parents=True, exist_ok=True)
    family = _Family(job, schedule)
    try:
        return family.wait()
    finally:
        family.end()


class _Family:
    """The processes of a run."""

    def __init__(self, job: Job, schedule: Schedule) -> None:
        self._job, self._schedule = job, schedule
        self._lives: dict[Any, tuple[str, Kill | None]] = {}
        self._timers: dict[Any, float] = {}
        self._kills: list[tuple[str, str]] = []
        self._waiting = dict(job.late_sites)
        for name in (SERVER, *NAMES):
            if name not in self._waiting:
                self._start(name)

    def wait(self) -> Outcome:
        began = time.monotonic()
        while time.monotonic() - began < _PATIENCE:
            ended = self._ended()
            self._start_late_sites()
            for process in ended:
                name, kill = self._lives.pop(process)
                self._timers.pop(process, None)
                process.join()
                code = process.exitcode
                if code == -signal.SIGKILL:
                    self._kills.append((name, kill.point if kill else "?"))
                    if name == SERVER and self._over():
                        return self._outcome()  # killed with nothing left to do
                    self._start(name)
                elif name == SERVER:
                    if code == 0:
                        return self._outcome()
                    raise RuntimeError(f"the server ended with code {code}: {self._tail()}")
                elif code != 0:
                    raise RuntimeError(f"{name} ended with code {code}: {self._tail()}")
        raise TimeoutError(f"no end after {_PATIENCE} s: {self._kills}, {self._tail()}")

    def end(self) -> None:
        for process in self._lives:
            process.kill()
            process.join()

    def _start(self, name: str) -> None:
        kill = self._schedule.next(name)
        process = _CONTEXT.Process(target=lives.live, args=(self._job, name, Reaper(kill)))
        process.start()
        self._lives[process] = name, kill
        if kill is not None and kill.point == "any time":
            self._timers[process] = time.monotonic() + kill.count / 1000

    def _ended(self) -> list[Any]:
        """Waits for a process to end or a timer to run out; kills where one has."""
        now = time.monotonic()
        for process, moment in list(self._timers.items()):
            if now >= moment:
                del self._timers[process]
                process.kill()
        left = min((moment - now for moment in self._timers.values()), default=_LOOK_SECONDS)
        ready = set(wait([p.sentinel for p in self._lives], max(0.0, min(left, _LOOK_SECONDS))))
        return [process for process in self._lives if process.sentinel in ready]

    def _start_late_sites(self) -> None:
        if not self._waiting:
            return
        reached = max((note["round"] for note in self._notes() if "round" in note), default=0)
        for name, after in list(self._waiting.items()):
            if reached >= after:
                del self._waiting[name]
                self._start(name)

    def _notes(self) -> tuple[dict[str, Any], ...]:
        path = self._job.folder / "notes"
        lines = path.read_text().splitlines() if path.exists() else []
        return tuple(json.loads(line) for line in lines)

    def _tail(self) -> str:
        return str(self._notes()[-3:])

    def _over(self) -> bool:
        return any("fingerprints" in note for note in self._notes())

    def _outcome(self) -> Outcome:
        notes = self._notes()
        end = next(note for note in reversed(notes) if "fingerprints" in note)
        return Outcome(
            end["fingerprints"],
            end["identical"],
            self._job.run_folder.log.read_bytes(),
            tuple(self._kills),
            notes,
        )
