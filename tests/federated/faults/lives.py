"""What the processes of a run do, and where they may die."""

from __future__ import annotations

import datetime
import json
import os
import random
import resource
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from zorba import machine
from zorba.federated import (
    Client,
    FederationSettings,
    Replica,
    ReplicaError,
    RunFolder,
    RunRecorder,
    Server,
    events,
    run_federation,
)

from tests.federated.faults.kills import Reaper, die
from tests.federated.faults.wire import SiteLink, SocketTransport
from tests.federated.world import MASKS, NAMES, make_objective, make_replica, make_settings

SERVER = "server"
# It asks a program, once and for all forks: one that a killed server had just started would hold
# the lock of its log for a moment longer.
machine.describe()


@dataclass
class Job:
    """One run, and how its processes differ from the plain ones."""

    folder: Path  # for everything that it writes
    settings: FederationSettings = field(default_factory=make_settings)
    rounds: int = 8
    dtype: torch.dtype = torch.float32
    checkpoint_every: int | None = 3  # None for no checkpoints
    # By process: called in it before it does anything; importable by name.
    disguise: dict[str, Callable[[], None]] = field(default_factory=dict)

    @property
    def socket(self) -> Path:
        return self.folder / "socket"

    @property
    def run_folder(self) -> RunFolder:
        return RunFolder(self.folder / "run")

    def replica(self) -> Replica:
        return make_replica(self.dtype, self.settings.distribution, self.settings.rounding)


def live(job: Job, name: str, reaper: Reaper) -> None:
    code = 1
    try:
        torch.set_num_threads(1)
        job.disguise.get(name, lambda: None)()
        reaper.reach("starting")
        if name == SERVER:
            _serve(job, reaper)
        else:
            _measure(job, name, reaper)
        code = 0
    except BaseException as error:
        _note(job, error=f"{type(error).__name__}: {error}", process=name)
        traceback.print_exc()
    finally:
        os._exit(code)


def small_disk() -> None:
    """A disguise: files cannot grow beyond 500 bytes, a few rounds of the log."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))


def jumping_clock() -> None:
    """A disguise: the clock is days off, in another direction at every look."""
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


def _note(job: Job, **what: Any) -> None:
    """Appends a line for the test, in one write, which a limit of the disk does not hold for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    file = os.open(job.folder / "notes", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, (json.dumps(what) + "\n").encode())
    os.close(file)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _serve(job: Job, reaper: Reaper) -> None:
    folder = job.run_folder
    folder.path.mkdir(parents=True, exist_ok=True)
    server = Server(job.settings, job.replica().identity, list(NAMES), MASKS, folder.log)
    server.log._file = _DoomedFile(server.log._file, reaper)  # type: ignore[assignment]

    transport = SocketTransport(job.socket, len(NAMES))
    _after(transport, "_send", lambda *_: reaper.reach("sent") if transport._pending else None)
    _after(transport, "exchange", lambda *_: reaper.reach("replied"))
    _after(server, "end_round", lambda *_: reaper.reach("ended"))
    rounds = max(0, job.rounds - server.log.last)
    with RunRecorder(folder, server, rounds) as recorder:
        result = run_federation(server, transport, rounds, recorder.round)
        recorder.end(result)
    _note(job, fingerprints=result.fingerprints, identical=result.replicas_identical)
    transport.close()


def _after(owner: Any, name: str, then: Callable[..., Any]) -> None:
    """Calls something, with the same arguments, after each call of a function of the owner."""
    inner = getattr(owner, name)

    def both(*args: Any, **named: Any) -> Any:
        result = inner(*args, **named)
        then(*args)
        return result

    setattr(owner, name, both)


class _DoomedFile:
    """The log's file, in which a process may die."""

    def __init__(self, file: Any, reaper: Reaper) -> None:
        self._file, self._reaper = file, reaper
        mine = file.fileno()
        _after(os, "fsync", lambda handle: reaper.reach("synced") if handle == mine else None)

    def write(self, data: bytes) -> int:
        if self._reaper.due("torn"):
            self._file.write(data[: len(data) * 2 // 3])
            die()
        count: int = self._file.write(data)
        self._reaper.reach("written")
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _measure(job: Job, name: str, reaper: Reaper) -> None:
    number = NAMES.index(name)
    replica = job.replica()
    checkpoint = job.folder / f"{name}.safetensors"
    if checkpoint.exists():
        try:
            replica.load(checkpoint)
        except ReplicaError as error:  # written as a whole or not at all: this must not happen
            _note(job, damaged=name, error=str(error))
    inner = make_objective(replica, 0.1 * number, 10 + number)

    def doomed_objective(round_number: int, step: int) -> Any:
        evaluate, count = inner(round_number, step)

        def doomed(noises: Any) -> Any:
            losses = evaluate(noises)
            reaper.reach("during")
            return losses

        return doomed, count

    replace = os.replace

    def doomed_replace(draft: Any, path: Any) -> None:
        reaper.reach("drafted")
        replace(draft, path)
        reaper.reach("saved")

    os.replace = doomed_replace
    every = job.checkpoint_every
    client = Client(name, replica, doomed_objective, checkpoint if every else None, every or 1)
    link = SiteLink(job.socket, name)
    while (received := link.receive())[1]:
        message_number, data = received
        reaper.reach("before")
        answer = client.handle(data)
        reaper.reach("measured")
        link.send(message_number, answer)
        reaper.reach("after")
