"""Processes that are killed, late, full or wrong: the run ends where the undisturbed one ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from zorba.federated import RoundLog
from zorba.federated.events import EventReader

from tests.conftest import Random
from tests.federated.faults.kills import SERVER_POINTS, SITE_POINTS, Kill
from tests.federated.faults.lives import Job, jumping_clock, small_disk
from tests.federated.faults.run import Outcome, run, run_random
from tests.federated.world import NAMES

ROUNDS = 8


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    outcome = run(Job(tmp_path_factory.mktemp("plain"), rounds=ROUNDS))
    assert outcome.identical
    assert outcome.kills == ()
    return outcome


def assert_same(disturbed: Outcome, undisturbed: Outcome) -> None:
    assert disturbed.identical
    assert disturbed.fingerprints == undisturbed.fingerprints
    assert disturbed.log == undisturbed.log
    assert not [note for note in disturbed.notes if "damaged" in note]


@pytest.mark.parametrize(
    ("process", "point"),
    [*(("bob", point) for point in SITE_POINTS), *(("server", point) for point in SERVER_POINTS)],
)
def test_killed_process_comes_back(
    tmp_path: Path, undisturbed: Outcome, process: str, point: str, rng: Random
) -> None:
    few = point in ("starting", "drafted", "saved")
    kill = Kill(point, 1 if few else 1 + rng.integer(3) % ROUNDS)
    outcome = run(Job(tmp_path, rounds=ROUNDS), {process: [kill]})
    assert outcome.kills == ((process, point),)
    assert_same(outcome, undisturbed)


@pytest.mark.parametrize("number", range(5))
def test_random_kill_schedule(tmp_path: Path, number: int, rng: Random) -> None:
    """``python -m tests.federated.faults`` runs a hundred longer ones."""
    wrong, _ = run_random(tmp_path, rng.integer(32), rounds=12)
    assert not wrong


def test_full_disk_stops_the_server_and_room_lets_it_go_on(
    tmp_path: Path, undisturbed: Outcome
) -> None:
    job = Job(tmp_path, rounds=ROUNDS, disguise={"server": small_disk})
    with pytest.raises(RuntimeError, match=r"LogError: entry \d was not written to "):
        run(job)
    with RoundLog(job.run_folder.log) as log:
        assert 0 < log.last < ROUNDS
        assert log.torn_bytes == 0, "the log was cut back to what it was"
    job.disguise = {}
    assert_same(run(job), undisturbed)


def test_jumping_clocks_change_nothing(tmp_path: Path, undisturbed: Outcome) -> None:
    jumping = dict.fromkeys(("server", *NAMES), jumping_clock)
    job = Job(tmp_path, rounds=ROUNDS, disguise=jumping)
    assert_same(run(job), undisturbed)
    moments = [event["time"] for event in EventReader(job.run_folder.events).poll()]
    assert moments != sorted(moments), "the clocks did jump"
