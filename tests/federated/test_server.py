"""The server: who is admitted, which replies count, and what is refused without a trace."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zorba.federated import (
    Client,
    Greeting,
    Hello,
    LogError,
    MessageError,
    decode,
    run_federation,
)
from zorba.log import encode_entry

from tests.federated.test_client import plan_of, reply_of
from tests.federated.world import World, make_replica, make_settings


def hello_of(world: World, name: str = "ada") -> Hello:
    """The client's hello."""
    hello = decode(world.clients[name].handle(Greeting(world.settings.job_id).encode()))
    assert isinstance(hello, Hello)
    return hello


def test_all_clients_get_the_same_seeds(world: World) -> None:
    """A new seed per message would give each client another direction."""
    world.greet()
    for t in (1, 2):
        plans = [plan_of(data) for data in world.server.begin_round().values()]
        assert {plan.seeds for plan in plans} == {(world.settings.seed_of(t, 0),)}
        again = [plan_of(data) for data in world.server.begin_round().values()]
        assert {plan.seeds for plan in again} == {plans[0].seeds}, "also when asked again"
        assert [list(plan.mask) for plan in plans] == world.masks
        world.server.end_round()
    assert world.settings.seed_of(1, 0) != world.settings.seed_of(2, 0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"noise_version": 2}, "noise version 2, this job is of 1"),
        ({"package": "9.9"}, "package version 9.9"),
        ({"distribution": "rademacher"}, "distribution rademacher"),
        ({"rounding": "nearest"}, "rounding nearest"),
        ({"identity": make_replica(frozen=2.0).identity}, "ada has another model"),
        ({"client": "bob"}, "in the name of bob"),
        ({"job": 3}, "answers for job"),
        ({"applied_round": 1}, "followed another log"),
        ({"fingerprint": 3}, "diverged"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_hello_that_does_not_fit_is_refused(
    world: World, change: dict[str, Any], told: str
) -> None:
    receipt = world.server.receive("ada", replace(hello_of(world), **change).encode())
    assert not receipt.accepted
    assert told in receipt.reason
    assert world.server.admitted == ()
    assert world.server.fingerprints == {}


def test_two_models_of_the_same_shapes_are_told_apart(world: World) -> None:
    """They differ only in a frozen weight, so no trainable bit would ever tell."""
    replica = make_replica(frozen=2.0)
    assert replica.identity.start == world.identity.start
    other = Client("ada", replica, lambda r, k: (lambda _: 0.0, 1))
    receipt = world.server.receive("ada", other.handle(Greeting(world.settings.job_id).encode()))
    assert "another model" in receipt.reason


def test_unknown_client_and_server_messages_are_refused(world: World) -> None:
    receipt = world.server.receive("eve", hello_of(world).encode())
    assert "'eve' is no client" in receipt.reason
    for data in (world.plan("ada"), Greeting(1).encode()):
        assert "a client sends no" in world.server.receive("ada", data).reason


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"round": 2}, "replies to round 2; round 3 is under way"),
        ({"round": 4}, "replies to round 4"),
        ({"client": "bob"}, "in the name of bob"),
        ({"job": 1}, "answers for job"),
        ({"scalars": np.zeros((2, 3), np.float32)}, r"shape [2, 3], expected [1, 3]"),
        ({"scalars": np.zeros((1, 2), np.float32)}, r"shape [1, 2], expected [1, 3]"),
        ({"num_examples": 0}, "no examples"),
        ({"applied_round": 1}, "measured after round 1, expected round 2"),
        ({"applied_round": 3}, "measured after round 3, expected round 2"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_reply_that_does_not_fit_is_refused(
    world: World, change: dict[str, Any], told: str
) -> None:
    run_federation(world.server, world.transport, 2)
    plans = world.server.begin_round()
    good = reply_of(world.clients["ada"].handle(plans["ada"]))
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


def test_garbage_is_refused_without_a_trace(world: World) -> None:
    answer = world.clients["ada"].handle(world.plan("ada"))
    rng = np.random.default_rng(0)
    log = world.path.read_bytes()
    for _ in range(300):
        data = bytearray(answer)
        for at in rng.integers(0, len(data), 3):
            data[at] = rng.integers(0, 256)
        if bytes(data) != answer:
            assert not world.server.receive("ada", bytes(data)).accepted
        assert not world.server.receive("ada", rng.bytes(50)).accepted
    assert world.path.read_bytes() == log
    assert world.server.receive("ada", answer).accepted


def test_round_without_replies_has_an_empty_entry(world: World) -> None:
    world.plan("ada")
    outcome = world.server.end_round()
    assert outcome.entry.empty
    assert math.isnan(outcome.loss)
    result = run_federation(world.server, world.transport, 1)
    assert result.final_round == 2
    assert result.replicas_identical


def test_coefficients_that_overflow_change_nothing(tmp_path: Path) -> None:
    world = World(tmp_path / "log", make_settings(lr=1e30))
    data = world.plan("ada")
    reply = reply_of(world.clients["ada"].handle(data))
    huge = replace(reply, scalars=np.full((1, 3), 3e38, np.float32))
    assert world.server.receive("ada", huge.encode()).accepted
    outcome = world.server.end_round()
    assert outcome.entry.empty
    assert "finite" in outcome.problem
    world.server.close()


# --- Sync marks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [-2, -1, 1])
def test_wrong_mark_heals(world: World, error: int) -> None:
    """An off-by-one mark leaves a client at theta_0 for ever; here the client says where it is."""
    run_federation(world.server, world.transport, 3, available=lambda t: ("ada", "bob"))
    run_federation(world.server, world.transport, 1)
    world.server._marks["cleo"] = 3 + error
    result = run_federation(world.server, world.transport, 2)
    assert result.replicas_identical
    assert result.reports[-1].clients == ("ada", "bob", "cleo")
    assert len(world.fingerprints()) == 1


def test_mark_is_what_the_client_told(world: World) -> None:
    world.greet()
    for _ in range(3):
        world.server.begin_round()  # sent, but nobody answers
        world.server.end_round()
    assert [world.server.lacking(name) for name in world.server.names] == [3, 3, 3]
    plan = plan_of(world.server.begin_round()["ada"])
    assert (plan.base_round, [e.number for e in plan.entries]) == (0, [1, 2, 3])


def test_log_that_does_not_fit_one_plan_comes_in_several(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_federation(world.server, world.transport, 8, available=lambda t: ("ada", "bob"))
    reference = world.replicas["ada"].fingerprint()
    fresh = World(world.path.with_name("other")).clients["cleo"]
    size = len(encode_entry(world.server.log.entry(1), world.settings.job_id))
    monkeypatch.setattr("zorba.federated.server.MAX_PLAN_LOG_BYTES", 3 * size)
    world.server._marks.pop("cleo")
    hello = fresh.handle(Greeting(world.settings.job_id).encode())
    assert world.server.receive("cleo", hello).accepted
    exchanges = 0
    while world.server.lacking("cleo"):
        data = world.server.begin_round(["cleo"])["cleo"]
        plan = plan_of(data)
        caught_up = plan.base_round + len(plan.entries) == 8
        assert bool(plan.seeds) == caught_up, "it measures nothing before it has caught up"
        assert world.server.receive("cleo", fresh.handle(data)).accepted
        exchanges += 1
    assert exchanges > 2
    assert fresh.replica.fingerprint(fresh=True) == reference


# --- Divergence ----------------------------------------------------------------------------------


def corrupt(world: World, name: str) -> None:
    """Changes one weight behind the replica's back."""
    replica = world.replicas[name]
    replica.table.entries[1].tensor[0, 0] += 1
    replica.fingerprint(fresh=True)


def test_diverged_replica_is_excluded_and_can_return(world: World) -> None:
    run_federation(world.server, world.transport, 2)
    corrupt(world, "bob")
    first, second = run_federation(world.server, world.transport, 2).reports
    assert not first.fingerprints_equal
    assert "most clients have" in first.refusals["bob"]
    assert first.clients == ("ada", "cleo")
    assert "diverged" in second.refusals["bob"], "what it says of itself is checked with the log"
    assert not second.fingerprints_equal

    fresh = World(world.path.with_name("other"))
    replica, client = fresh.replicas["bob"], world.clients["bob"]
    client.replica, client.objective = replica, fresh.clients["bob"].objective
    world.replicas["bob"] = replica
    result = run_federation(world.server, world.transport, 2)
    assert result.reports[-1].clients == ("ada", "bob", "cleo")
    assert result.reports[-1].fingerprints_equal
    assert len(world.fingerprints()) == 1


def test_divergence_before_the_first_round_is_known_at_once(world: World) -> None:
    world.greet()
    corrupt(world, "cleo")
    receipt = world.server.receive(
        "cleo", world.clients["cleo"].handle(world.server.begin_round()["cleo"])
    )
    assert receipt.diverged
    assert "cleo has diverged: after round 0" in receipt.reason


def test_position_is_checked_across_empty_rounds(world: World) -> None:
    run_federation(world.server, world.transport, 2, available=lambda t: ("ada", "cleo"))
    world.server.begin_round([])
    world.server.end_round()
    run_federation(world.server, world.transport, 1, available=lambda t: ("ada", "cleo"))
    hello = replace(hello_of(world), applied_round=2)
    assert world.server.receive("ada", replace(hello, fingerprint=5).encode()).diverged
    base = world.server.log.entry(4).base
    assert base is not None
    assert world.server.receive("ada", replace(hello, fingerprint=base).encode()).accepted


def test_client_that_notices_its_own_divergence_says_so(world: World) -> None:
    run_federation(world.server, world.transport, 2, available=lambda t: ("ada", "cleo"))
    run_federation(world.server, world.transport, 1)
    data = {name: world.server.begin_round()[name] for name in ("ada", "cleo")}
    for name, plan in data.items():
        assert world.server.receive(name, world.clients[name].handle(plan)).accepted
    world.server.end_round()
    corrupt(world, "bob")
    receipt = world.server.receive(
        "bob", world.clients["bob"].handle(world.server.begin_round()["bob"])
    )
    assert receipt.diverged
    assert world.replicas["bob"].applied_round == 3, "it does not build on wrong weights"


def test_without_a_majority_nobody_is_believed(world: World) -> None:
    run_federation(world.server, world.transport, 2)
    corrupt(world, "bob")
    report = run_federation(
        world.server, world.transport, 1, available=lambda t: ("ada", "bob")
    ).reports[0]
    assert report.clients == ()
    assert report.entry.empty
    assert report.refusals.keys() == {"ada", "bob"}
    assert not report.fingerprints_equal


# --- Restart -------------------------------------------------------------------------------------


def test_log_of_another_job_is_refused(world: World) -> None:
    run_federation(world.server, world.transport, 1)
    world.server.close()
    data = world.path.read_bytes()
    world.settings = make_settings(seed=8)
    with pytest.raises(LogError, match="another job"):
        world.start()
    assert world.path.read_bytes() == data


def test_a_disk_that_is_full_can_be_retried(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = world.clients["ada"].handle(world.plan("ada"))
    assert world.server.receive("ada", answer).accepted

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(LogError, match="No space left"):
            world.server.end_round()
    assert world.server.end_round().clients == ("ada",)
    assert world.server.round == 2


def test_malformed_bytes_raise_nothing_but_message_errors() -> None:
    for data in (b"", b"\0" * 16, b"ZRBM" + b"\xff" * 12):
        with pytest.raises(MessageError):
            decode(data)
