"""JobKeeper: when it submits, replaces and waits, before an engine and a clock of the tests.

A real engine does not lose its processes on command, and the keeper waits for minutes.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from zorba.apps.deploy.config import ServerConfig
from zorba.apps.deploy.jobs import JobKeeper

from tests.apps.deploy.conftest import SITES


class Session:
    """The administrator's view of an engine."""

    def __init__(self) -> None:
        self.connected = list(SITES)
        self.status: dict[str, str] = {}
        self.processes: set[str] = set()
        self.busy = list(SITES)
        self.aborted: list[str] = []

    def get_system_info(self) -> Any:
        clients = [SimpleNamespace(name=name) for name in self.connected]
        jobs = [SimpleNamespace(job_id=job) for job in self.processes]
        return SimpleNamespace(client_info=clients, job_info=jobs)

    def list_jobs(self) -> list[dict[str, str]]:
        return [{"job_id": job, "status": status} for job, status in self.status.items()]

    def get_job_status(self, job: str) -> str:
        return self.status[job]

    def submit_job(self, folder: str) -> str:
        assert (Path(folder) / "meta.json").exists()
        job = f"job-{len(self.status)}"
        self.status[job] = "RUNNING"
        self.processes.add(job)
        return job

    def get_client_job_status(self) -> list[dict[str, str]]:
        (job,) = self.processes
        return [{"client_name": name, "job_id": job} for name in self.busy]

    def abort_job(self, job: str) -> None:
        self.aborted.append(job)
        self.status[job] = "FINISHED:ABORTED"
        self.processes.discard(job)

    def close(self) -> None: ...


@pytest.fixture
def kept(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[JobKeeper, Session, list[float], list[str]]:
    """A keeper, what it sees, the time that it believes it is, and what it said."""
    folder = project / "server"
    now, said = [1000.0], []
    keeper = JobKeeper(folder, ServerConfig.read(folder), said.append)
    session = Session()
    monkeypatch.setattr(keeper, "_connect", lambda: session)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return keeper, session, now, said


def test_job_is_started_once_the_sites_are_there(kept: Any) -> None:
    keeper, session, _, _ = kept
    session.connected = ["ada", "bob", "eve"]
    keeper.step()
    assert session.status == {}
    session.connected = list(SITES)
    keeper.step()
    keeper.step()
    assert session.status == {"job-0": "RUNNING"}


def test_job_that_ended_is_replaced_with_growing_pauses(kept: Any) -> None:
    keeper, session, now, _ = kept
    starts = []
    for _ in range(800):
        before = len(session.status)
        keeper.step()
        if len(session.status) > before:
            starts.append(now[0])
            session.abort_job(f"job-{before}")
        now[0] += 0.5
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert gaps == sorted(gaps)
    assert gaps[0] < 3.0
    assert 60.0 <= gaps[-1] <= 61.0


def test_site_that_came_back_gets_a_job_that_it_is_in(kept: Any) -> None:
    keeper, session, now, said = kept
    keeper.step()
    session.busy = ["ada", "cleo"]
    for _ in range(5):
        now[0] += 1.0
        keeper.step()
    assert session.aborted == [], "not so soon after the start"
    now[0] += 60.0
    for _ in range(3):
        keeper.step()
        now[0] += 1.0
    assert session.aborted == ["job-0"]
    assert "bob came back: starting the engine's job again" in said
    session.busy = list(SITES)
    for _ in range(80):
        keeper.step()
        now[0] += 1.0
    assert session.status["job-1"] == "RUNNING"
    assert session.aborted == ["job-0"]


def test_engine_that_is_away_is_waited_for(kept: Any) -> None:
    keeper, session, _, said = kept
    keeper.step()
    session.get_system_info = lambda: (_ for _ in ()).throw(ConnectionError("nobody there"))
    keeper.step()
    keeper.step()
    assert keeper.connected == []
    assert [text for text in said if "nobody there" in text] == [
        "cannot reach the engine: ConnectionError: nobody there"
    ]
    del session.get_system_info
    keeper.step()
    assert keeper.connected == list(SITES)
    assert list(session.status) == ["job-0"]
