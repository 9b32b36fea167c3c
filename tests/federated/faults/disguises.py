"""How a process of a run differs from the others: called in it before anything else happens."""

from __future__ import annotations

import datetime
import random
import resource
import signal
import time

from zorba.federated import events


def small_disk() -> None:
    """A server whose files cannot grow beyond 500 bytes: a few rounds of the log."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))


def jumping_clock() -> None:
    """A process whose clock is days off, in another direction at every look."""
    jumps = random.Random(0)
    now = time.time

    def jumped() -> float:
        return now() + jumps.choice((-1, 1)) * jumps.randrange(10**6)

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
            return datetime.datetime.fromtimestamp(jumped(), tz)

    time.time = jumped
    time.time_ns = lambda: int(1e9 * jumped())
    events.datetime = Clock  # type: ignore[misc]
