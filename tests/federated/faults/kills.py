"""Where processes are killed: named points in the code, and moments that nobody chose."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import dataclass

SITE_POINTS = (
    "starting",  # before it is connected
    "before",  # it got a message and did nothing yet
    "during",  # in an evaluation, the log's entries applied
    "drafted",  # its checkpoint is written under another name
    "saved",  # its checkpoint is in place
    "measured",  # its reply is made
    "after",  # its reply is sent
)
SERVER_POINTS = (
    "starting",  # before the log is opened
    "sent",  # plans are with some sites
    "replied",  # all replies are there, nothing is written
    "torn",  # a part of the entry is in the file
    "written",  # the entry is in the file and was not synced
    "synced",  # the entry is safe and nobody has heard of it
    "ended",  # the round is over for the server
)


@dataclass(frozen=True)
class Kill:
    point: str  # where; "any time" for a moment after the start of the process
    count: int  # the how many-th time that the point is reached, from 1; or milliseconds


# Kills by process, "server" or a site, one for each of its lives; later lives are not disturbed.
Schedule = dict[str, list[Kill]]


def draw_schedule(rng: random.Random, names: tuple[str, ...], rounds: int) -> Schedule:
    schedule: Schedule = {}
    for _ in range(rng.randint(3, 10)):
        process = rng.choice(("server", "server", *names))
        points = SERVER_POINTS if process == "server" else SITE_POINTS
        if rng.random() < 0.3:
            kill = Kill("any time", rng.randint(0, 300))
        else:
            point = rng.choice(points)
            often = {"starting": 1, "drafted": 3, "saved": 3}.get(point, rounds // 2)
            kill = Kill(point, rng.randint(1, often))
        schedule.setdefault(process, []).append(kill)
    return schedule


class Reaper:
    """Kills its own process when a point was reached often enough, as ``kill -9`` would."""

    def __init__(self, kill: Kill | None) -> None:
        self._kill = kill
        self._count = 0

    def due(self, point: str) -> bool:
        if self._kill is None or self._kill.point != point:
            return False
        self._count += 1
        return self._count == self._kill.count

    def reach(self, point: str) -> None:
        if self.due(point):
            die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()
