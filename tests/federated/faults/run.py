"""Runs a server and its sites as processes, and starts again what was killed."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from tests.federated.faults import lives
from tests.federated.faults.kills import Kill, Reaper, Schedule, draw_schedule
from tests.federated.faults.lives import SERVER, Job
from tests.federated.world import NAMES, make_settings

_PATIENCE = 1800.0  # seconds after which a run hangs: never a verdict on speed
_LOOK_SECONDS = 0.2
# Forks of a process that has all modules and no threads: a start takes milliseconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([lives.__name__])


@dataclass(frozen=True)
class Outcome:
    fingerprints: dict[str, int]  # of each site at the end
    identical: bool  # whether all that could be reached ended with the same
    log: bytes  # of the server
    kills: tuple[tuple[str, str], ...]  # that happened, in their order: process and point
    notes: tuple[dict[str, Any], ...]  # lines that processes wrote for the test


def run(job: Job, schedule: Schedule | None = None) -> Outcome:
    job.folder.mkdir(parents=True, exist_ok=True)
    family = _Family(job, schedule or {})
    try:
        return family.wait()
    finally:
        family.end()


def run_random(folder: Path, seed: int, rounds: int) -> tuple[str, list[str]]:
    """A random schedule beside the undisturbed run: what was wrong, and the kills in words."""
    rng = random.Random(seed)
    options: dict[str, Any] = {
        "settings": make_settings(
            seed=rng.getrandbits(32),
            local_steps=rng.choice((1, 2)),
            distribution=rng.choice(("gaussian", "rademacher")),
        ),
        "rounds": rounds,
        "dtype": rng.choice((torch.float32, torch.bfloat16)),
        "checkpoint_every": rng.choice((None, 1, 3, 7)),
    }
    undisturbed = run(Job(folder / "undisturbed", **options))
    schedule = draw_schedule(rng, NAMES, rounds)
    drawn = str(schedule)
    try:
        disturbed = run(Job(folder / "disturbed", **options), schedule)
    except (RuntimeError, TimeoutError) as error:
        return f"{drawn}: {error}", []
    happened = [f"{'server' if name == SERVER else 'site'} {at}" for name, at in disturbed.kills]
    parts = ("identical", "fingerprints", "log")
    other = [part for part in parts if getattr(disturbed, part) != getattr(undisturbed, part)]
    damaged = [note for note in disturbed.notes if "damaged" in note or "error" in note]
    good = undisturbed.identical and not other and not damaged
    return "" if good else f"{drawn}: not as undisturbed: {other}, {damaged}", happened


class _Family:
    def __init__(self, job: Job, schedule: Schedule) -> None:
        self._job, self._schedule = job, schedule
        self._lives: dict[Any, tuple[str, Kill | None]] = {}
        self._timers: dict[Any, float] = {}
        self._kills: list[tuple[str, str]] = []
        for name in (SERVER, *NAMES):
            self._start(name)

    def wait(self) -> Outcome:
        began = time.monotonic()
        while time.monotonic() - began < _PATIENCE:
            for process in self._ended():
                name, kill = self._lives.pop(process)
                self._timers.pop(process, None)
                process.join()
                code = process.exitcode
                if code == -signal.SIGKILL:
                    self._kills.append((name, kill.point if kill else "?"))
                    if name == SERVER and any("fingerprints" in note for note in self._notes()):
                        return self._outcome()  # killed with nothing left to do
                    self._start(name)
                elif code != 0:
                    raise RuntimeError(f"{name} ended with code {code}: {self._notes()[-3:]}")
                elif name == SERVER:
                    return self._outcome()
        raise TimeoutError(f"no end after {_PATIENCE} s: {self._kills}, {self._notes()[-3:]}")

    def end(self) -> None:
        for process in self._lives:
            process.kill()
            process.join()

    def _start(self, name: str) -> None:
        kills = self._schedule.get(name)
        kill = kills.pop(0) if kills else None
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

    def _notes(self) -> tuple[dict[str, Any], ...]:
        path = self._job.folder / "notes"
        lines = path.read_text().splitlines() if path.exists() else []
        return tuple(json.loads(line) for line in lines)

    def _outcome(self) -> Outcome:
        notes = self._notes()
        end = next(note for note in reversed(notes) if "fingerprints" in note)
        log = self._job.run_folder.log.read_bytes()
        return Outcome(end["fingerprints"], end["identical"], log, tuple(self._kills), notes)
