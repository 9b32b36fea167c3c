"""The server: who is admitted, which replies count, and what is refused without a trace."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from zorba.federated import FederationError, Hello, LogError, ServerLogError, decode
from zorba.log import encode_entry

from tests.federated.world import World, make_replica, make_settings, plan_of, reply_of

MOST = ("ada", "bob")


def field(value: Any) -> str:
    return next(iter(value)) if isinstance(value, dict) else ""


def hello_of(world: World, name: str = "ada") -> Hello:
    hello = decode(world.clients[name].handle(world.greeting))
    assert isinstance(hello, Hello)
    return hello


def test_all_clients_get_the_same_seeds(world: World) -> None:
    """A new seed per message would give each client another direction."""
    world.greet()
    for t in (1, 2):
        for when in ("begun", "begun again"):
            plans = [plan_of(data) for data in world.server.begin_round().values()]
            assert {plan.seeds for plan in plans} == {world.settings.seeds_of(t)}, when
            assert [list(plan.mask) for plan in plans] == world.masks
        world.server.end_round()
    assert world.settings.seeds_of(1) != world.settings.seeds_of(2)


def test_drawn_clients_change_from_round_to_round(make_world: Any) -> None:
    world = make_world(clients_per_round=2)
    world.greet()
    drawn = []
    for _ in range(12):
        drawn.append(tuple(world.server.begin_round()))
        assert tuple(world.server.begin_round()) == drawn[-1], "a round begun again draws the same"
        world.server.end_round()
    assert {len(names) for names in drawn} == {2}
    assert len(set(drawn)) == 3, "all three pairs come up"


def test_clients_that_join_do_not_exceed_those_of_a_round(make_world: Any) -> None:
    world = make_world(clients_per_round=2)
    assert set(world.server.begin_round().values()) == {world.greeting}, "nobody is known"
    world.greet("ada")
    assert world.server.ask_again().keys() == {"ada"}
    world.greet("bob", "cleo")
    assert len(world.server.ask_again()) == 1, "ada was asked already"
    assert world.server.ask_again() == {}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"noise_version": 2}, "noise version 2, this job is of 1"),
        ({"package": "9.9"}, "package version 9.9"),
        ({"distribution": "rademacher"}, "distribution rademacher"),
        ({"rounding": "nearest"}, "rounding nearest"),
        # It differs in a frozen weight alone, so no trainable bit would ever tell.
        ({"identity": make_replica(frozen=2.0).identity}, "ada has another model"),
        ({"client": "bob"}, "in the name of bob"),
        ({"job": 3}, "answers for job"),
        ({"applied_round": 1}, "followed another log"),
        ({"fingerprint": 3}, "diverged"),
    ],
    ids=field,
)
def test_hello_that_does_not_fit_is_refused(
    world: World, change: dict[str, Any], told: str
) -> None:
    receipt = world.server.receive("ada", replace(hello_of(world), **change).encode())
    assert not receipt.accepted
    assert told in receipt.reason
    assert world.server.fingerprints == {}


def test_unknown_client_and_server_messages_are_refused(world: World) -> None:
    receipt = world.server.receive("eve", hello_of(world).encode())
    assert "'eve' is no client" in receipt.reason
    for data in (world.plan("ada"), world.greeting):
        assert "a client sends no" in world.server.receive("ada", data).reason


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"round": 2}, "replies to round 2; round 3 is under way"),
        ({"scalars": np.zeros((2, 3), np.float32)}, r"shape [2, 3], expected [1, 3]"),
        ({"num_examples": 0}, "no examples"),
        ({"applied_round": 1}, "measured after round 1, expected round 2"),
        ({"applied_round": 3}, "measured after round 3, expected round 2"),
    ],
    ids=field,
)
def test_reply_that_does_not_fit_is_refused(
    world: World, change: dict[str, Any], told: str
) -> None:
    world.run(2)
    good = reply_of(world.clients["ada"].handle(world.server.begin_round()["ada"]))
    log = world.path.read_bytes()
    receipt = world.server.receive("ada", replace(good, **change).encode())
    assert not receipt.accepted
    assert told in receipt.reason
    assert world.path.read_bytes() == log
    assert world.server.receive("ada", good.encode()).accepted, "nothing was changed"
    assert world.server.end_round().clients == ("ada",)


def test_second_reply_is_refused(world: World) -> None:
    answer = world.clients["ada"].handle(world.plan("ada"))
    assert world.server.receive("ada", answer).accepted
    assert "replied to round 1 already" in world.server.receive("ada", answer).reason
    world.server.end_round()
    assert "asked nothing now" in world.server.receive("ada", answer).reason


def test_hello_after_a_reply_takes_nothing_back(world: World) -> None:
    world.greet()
    for name, message in world.server.begin_round().items():
        assert world.answer(name, message).accepted
    world.greet("bob")
    assert world.server.ask_again() == {}
    assert set(world.server.end_round().clients) == set(world.clients)


def test_round_without_replies_has_an_empty_entry(world: World) -> None:
    world.plan("ada")
    report = world.server.end_round()
    assert report.entry.empty
    assert math.isnan(report.loss)
    result = world.run(1)
    assert result.final_round == 2
    assert result.replicas_identical


def test_coefficients_that_overflow_change_nothing(make_world: Any) -> None:
    world = make_world(lr=1e30)
    reply = reply_of(world.clients["ada"].handle(world.plan("ada")))
    huge = replace(reply, scalars=np.full((1, 3), 3e38, np.float32))
    assert world.server.receive("ada", huge.encode()).accepted
    report = world.server.end_round()
    assert report.entry.empty
    assert "finite" in report.problem


@pytest.mark.parametrize("error", [-2, -1, 1])
def test_wrong_mark_heals(world: World, error: int) -> None:
    """An off-by-one mark leaves a client at theta_0 for ever; here the client says where it is."""
    world.run(3, available=lambda _: MOST)
    world.run(1)
    world.server.fingerprints["cleo"] = (3 + error, 0)
    result = world.run(2)
    assert result.replicas_identical
    assert result.reports[-1].clients == ("ada", "bob", "cleo")
    assert len(world.fingerprints()) == 1


def test_mark_is_what_the_client_told(world: World) -> None:
    world.greet()
    for _ in range(3):
        world.server.begin_round()  # sent, but nobody answers
        world.server.end_round()
    for plan in map(plan_of, world.server.begin_round().values()):
        assert (plan.base_round, [e.number for e in plan.entries]) == (0, [1, 2, 3])


def test_log_that_does_not_fit_one_plan_comes_in_several(
    world: World, make_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.run(8, available=lambda _: MOST)
    reference = world.replicas["ada"].fingerprint()
    fresh = make_world().clients["cleo"]
    size = len(encode_entry(world.server.log.entry(1), world.settings.job_id))
    monkeypatch.setattr("zorba.federated.server.MAX_PLAN_LOG_BYTES", 3 * size)
    assert world.server.receive("cleo", fresh.handle(world.greeting)).accepted
    plans = []
    while fresh.replica.applied_round < 8:
        data = world.server.begin_round(["cleo"])["cleo"]
        plans.append(plan_of(data))
        assert world.server.receive("cleo", fresh.handle(data)).accepted
    assert len(plans) > 2
    assert [bool(plan.seeds) for plan in plans] == [plan.reached == 8 for plan in plans]
    assert fresh.replica.fingerprint(fresh=True) == reference


def corrupt(world: World, name: str) -> None:
    replica = world.replicas[name]
    replica.table.entries[1].tensor[0, 0] += 1
    replica.fingerprint(fresh=True)


def test_diverged_replica_is_excluded_and_can_return(world: World, make_world: Any) -> None:
    world.run(2)
    corrupt(world, "bob")
    first, second = world.run(2).reports
    assert not first.fingerprints_equal
    assert "most clients have" in first.refusals["bob"]
    assert first.clients == ("ada", "cleo")
    assert "diverged" in second.refusals["bob"], "what it says of itself is checked with the log"
    assert not second.fingerprints_equal

    fresh, client = make_world().clients["bob"], world.clients["bob"]
    world.replicas["bob"] = client.replica = fresh.replica
    client.objective = fresh.objective
    report = world.run(2).reports[-1]
    assert report.clients == ("ada", "bob", "cleo")
    assert report.fingerprints_equal
    assert len(world.fingerprints()) == 1


def test_position_is_checked_across_empty_rounds(world: World) -> None:
    world.run(2, available=lambda _: ("ada", "cleo"))
    world.server.begin_round([])
    world.server.end_round()
    world.run(1, available=lambda _: ("ada", "cleo"))
    hello, base = hello_of(world), world.server.log.entry(4).base
    assert base is not None
    for fingerprint in (5, base):
        data = replace(hello, applied_round=2, fingerprint=fingerprint).encode()
        assert world.server.receive("ada", data).diverged == (fingerprint == 5)


@pytest.mark.parametrize("rounds", [0, 3])
def test_client_that_diverged_is_known_at_once(world: World, rounds: int) -> None:
    world.run(rounds)
    if rounds:  # the log goes on without bob
        assert world.answer("ada", world.server.begin_round()["ada"]).accepted
        world.server.end_round()
    world.greet()
    corrupt(world, "bob")
    receipt = world.answer("bob", world.server.begin_round()["bob"])
    assert receipt.diverged
    assert f"bob has diverged: after round {rounds}" in receipt.reason
    assert world.replicas["bob"].applied_round == rounds, "it does not build on wrong weights"


def test_without_a_majority_nobody_is_believed(world: World) -> None:
    world.run(2)
    corrupt(world, "bob")
    report = world.run(1, available=lambda _: MOST).reports[0]
    assert report.clients == ()
    assert report.entry.empty
    assert report.refusals.keys() == {"ada", "bob"}
    assert not report.fingerprints_equal


@pytest.mark.parametrize("damage", ["another job", "a flipped bit"])
def test_log_that_cannot_be_continued_is_refused(world: World, damage: str) -> None:
    world.run(2)
    with pytest.raises(ServerLogError, match="another process, another server"):
        world.start()
    world.server.close()
    data = bytearray(world.path.read_bytes())
    if damage == "another job":
        world.settings = make_settings(seed=8)
    else:
        data[len(data) // 2] ^= 4
        world.path.write_bytes(data)
    with pytest.raises(LogError, match="another job" if damage == "another job" else "job-0") as it:
        world.start()
    assert isinstance(it.value, FederationError), "one to catch, whatever the federation refuses"
    assert world.path.read_bytes() == data


def test_a_disk_that_is_full_can_be_retried(world: World) -> None:
    assert world.answer("ada", world.plan("ada")).accepted
    full = patch("os.fsync", side_effect=OSError(28, "No space left on device"))
    with full, pytest.raises(ServerLogError, match="No space left"):
        world.server.end_round()
    assert world.server.end_round().clients == ("ada",)
    assert world.server.round == 2
