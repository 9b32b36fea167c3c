"""JobKeeper: when it submits, replaces and waits, before an engine and a clock of the tests."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from zorba.apps.deploy.config import ServerConfig
from zorba.apps.deploy.jobs import JobKeeper

from tests.apps.deploy.conftest import SITES, change_server


class Session:
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


class Kept:
    """A keeper, what it sees, the time that it believes it is, and what it said."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.said: list[str] = []
        self.session = Session()
        self.keeper = JobKeeper(folder, ServerConfig.read(folder), self.said.append)
        monkeypatch.setattr(self.keeper, "_connect", lambda: self.session)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.keeper.step()
            self.now += 1.0


@pytest.fixture
def kept(project: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    return Kept(project / "server", monkeypatch)


@pytest.mark.parametrize(
    ("quorum", "alone", "then"), [(0, 60, list(SITES)), (2, 20, ["ada", "bob"])], ids=["all", "two"]
)
def test_job_is_started_once_the_sites_are_there(
    project: Path, monkeypatch: pytest.MonkeyPatch, quorum: int, alone: int, then: list[str]
) -> None:
    """With a quorum it waits a while for the others."""
    change_server(project / "server", quorum=quorum)
    kept = Kept(project / "server", monkeypatch)
    kept.session.connected = ["ada", "bob", "eve"]
    kept.step(alone)
    assert kept.session.status == {}
    kept.session.connected = then
    kept.step(5)
    assert kept.session.status == {"job-0": "RUNNING"}


def test_job_that_ended_is_replaced_with_growing_pauses(kept: Kept) -> None:
    starts = []
    for _ in range(400):
        before = len(kept.session.status)
        kept.step()
        if len(kept.session.status) > before:
            starts.append(kept.now)
            kept.session.abort_job(f"job-{before}")
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert gaps == sorted(gaps)
    assert gaps[0] < 4.0
    assert 60.0 <= gaps[-1] <= 62.0


def test_job_whose_process_is_gone_is_replaced(kept: Kept) -> None:
    """The engine was killed, and believes that its job runs; an earlier keeper started it."""
    kept.session.status["old"] = "RUNNING"
    kept.step(6)
    assert kept.session.status == {"old": "RUNNING", "job-1": "RUNNING"}
    assert "the engine's job ended: its process is gone" in kept.said


def test_site_that_came_back_gets_a_job_that_it_is_in(kept: Kept) -> None:
    kept.session.busy = ["ada", "cleo"]
    kept.step(6)
    assert kept.session.aborted == [], "not so soon after the start"
    kept.now += 60.0
    kept.step(3)
    assert kept.session.aborted == ["job-0"]
    assert "bob came back: starting the engine's job again" in kept.said
    kept.session.busy = list(SITES)
    kept.step(80)
    assert kept.session.status["job-1"] == "RUNNING"
    assert kept.session.aborted == ["job-0"]


def test_engine_that_is_away_is_waited_for(kept: Kept) -> None:
    kept.step()
    kept.session.get_system_info = lambda: (_ for _ in ()).throw(ConnectionError("nobody there"))
    kept.step(2)
    assert "cannot reach the engine: ConnectionError: nobody there" in kept.said
    del kept.session.get_system_info
    kept.step()
    assert kept.said[-1] == "connected: ada, bob, cleo"
    assert list(kept.session.status) == ["job-0"]
