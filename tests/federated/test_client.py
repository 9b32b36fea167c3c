"""The client: what it measures, and that repeated, stale or impossible plans do no harm."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zorba.federated import FederationError, Greeting, Hello, MessageError, ReplicaError, decode
from zorba.optim import one_by_one

import zorba_kernels as zk
from tests.federated.world import (
    World,
    copy_table,
    fail,
    make_replica,
    plan_of,
    reply_of,
    spy,
)

ALONE: dict[str, Any] = {"masks": [[True] * 4], "names": ("ada",)}


@pytest.mark.parametrize("estimator", ["central", "forward"])
def test_scalars_are_the_derivatives_along_the_masked_noise(
    make_world: Any, estimator: str
) -> None:
    world = make_world(estimator=estimator)
    replica, (seed,) = world.replicas["ada"], world.settings.seeds_of(1)
    reply = reply_of(world.clients["ada"].handle(world.plan("ada")))
    for p in range(3):
        slope = 0.0  # of the mean squared distance, in closed form
        for entry in replica.table.entries:
            if world.masks[0][entry.group]:
                z = zk.noise(entry.tensor.shape, seed=seed, stream=entry.stream, sample=p)
                slope += float((2 * (entry.tensor - 0.01) * z).sum()) / replica.table.numel
        # central is exact on a quadratic but for rounding of the weights, forward is off by eps
        assert float(reply.scalars[0, p]) == pytest.approx(slope, abs=3e-3)
    assert reply.num_examples == 10
    assert reply.fingerprint == replica.identity.start
    assert replica.fingerprint(fresh=True) == replica.identity.start, "the weights are left alone"


def test_the_same_plan_again_gets_the_same_bytes(world: World) -> None:
    world.run(2)
    data = world.plan("ada")
    seen = spy(world.clients["ada"])
    first = world.clients["ada"].handle(data)
    count = len(seen)
    assert world.clients["ada"].handle(data) == first
    assert len(seen) == count > 0, "nothing is measured twice"


def test_stale_plan_is_refused(world: World) -> None:
    old = world.plan("ada")
    world.run(3)
    before = world.replicas["ada"].fingerprint(fresh=True)
    with pytest.raises(MessageError, match="plan of round 1 but has applied round 3"):
        world.clients["ada"].handle(old)
    assert world.replicas["ada"].fingerprint(fresh=True) == before


def test_missing_entries_are_asked_for(world: World, make_world: Any) -> None:
    world.run(3, available=lambda _: ("ada", "bob"))
    plan = plan_of(world.server.begin_round()["ada"])
    fresh = make_world().clients["cleo"]
    # A plan that starts at round 3 reaches a replica at theta_0.
    plan = replace(plan, base_round=3, num_entries=0, frames=b"")
    for late in (plan, replace(plan, seeds=())):
        answer = decode(fresh.handle(late.encode()))
        assert isinstance(answer, Hello)
        assert answer.applied_round == 0
    assert fresh.replica.fingerprint(fresh=True) == fresh.replica.identity.start


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"noise_version": 2}, "noise version 2"),
        ({"distribution": "rademacher"}, "distribution"),
        ({"rounding": "nearest"}, "rounding"),
        ({"mask": (True,) * 3}, "number of blocks"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_plan_for_another_replica_is_refused(
    world: World, change: dict[str, Any], told: str
) -> None:
    with pytest.raises(MessageError, match=told):
        world.clients["ada"].handle(replace(plan_of(world.plan("ada")), **change).encode())


def test_messages_of_another_job_are_refused(world: World) -> None:
    plan, client = plan_of(world.plan("ada")), world.clients["ada"]
    world.run(1)
    for data in (replace(plan, round=9, job=4).encode(), Greeting(4).encode()):
        with pytest.raises(ReplicaError, match="job"):
            client.handle(data)
    with pytest.raises(MessageError, match="sends no hello"):
        client.handle(client.handle(world.greeting))


def test_objective_that_raises_leaves_the_applied_entries(world: World) -> None:
    world.run(2)
    data = world.server.begin_round()["ada"]
    client, replica = world.clients["ada"], world.replicas["ada"]
    before, inner = replica.fingerprint(fresh=True), client.objective
    fail(client, MemoryError("out of memory"))
    with pytest.raises(MemoryError):
        client.handle(data)
    assert (replica.applied_round, replica.fingerprint(fresh=True)) == (2, before)
    client.objective = inner
    assert reply_of(client.handle(data)).applied_round == 2


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e300])
def test_non_finite_loss_sits_the_round_out(world: World, loss: float) -> None:
    data = world.plan("ada")
    evaluate = one_by_one(lambda terms: loss * float(terms.coefs.sum()))
    world.clients["ada"].objective = lambda r, k: (evaluate, 1)
    with pytest.raises(FederationError, match="round 1, step 0"):
        world.clients["ada"].handle(data)
    report = world.run(1).reports[0]
    assert report.clients == ("bob", "cleo")
    assert "sits the round out" in report.failures["ada"]


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_pending_steps_are_the_round_of_a_single_client(make_world: Any, distribution: Any) -> None:
    """The noise that rides along is bit for bit what the log makes of the same scalars."""
    world = make_world(**ALONE, local_steps=3, distribution=distribution)
    seen, replica = spy(world.clients["ada"]), world.replicas["ada"]
    start = copy_table(replica.table)
    world.run(1)
    terms = world.server.log.entry(1).terms
    # The last evaluation saw two pending steps of P = 3 terms, and its own perturbation.
    assert seen[-1].seeds == terms.seeds[:7]
    assert terms.seeds[::3] == world.settings.seeds_of(1)
    assert seen[-1].samples == (0, 1, 2, 0, 1, 2, 2)
    assert torch.equal(seen[-1].coefs[:, :6], terms.coefs[:, :6])
    zk.add_noise_(start, terms.seeds, terms.coefs, distribution, samples=terms.samples)
    assert zk.fingerprint(start) == replica.fingerprint(fresh=True)


def test_masked_blocks_stay_still_while_measuring(make_world: Any) -> None:
    world = make_world(local_steps=2)
    seen = spy(world.clients["cleo"])
    reply = reply_of(world.clients["cleo"].handle(world.plan("cleo")))
    assert reply.scalars.shape == (2, 3)
    assert {tuple(map(terms.active, range(4))) for terms in seen} == {(True, True, False, False)}


def test_clip_holds_for_pending_steps_too(make_world: Any) -> None:
    world = make_world(**ALONE, local_steps=2, clip=1e-3)
    seen = spy(world.clients["ada"])
    reply = reply_of(world.clients["ada"].handle(world.plan("ada")))
    assert np.abs(reply.scalars).max() > 1e-3, "scalars go up as they were measured"
    world.run(1)
    for coefs in (seen[-1].coefs[:, :-1], world.server.log.entry(1).terms.coefs):
        assert 0 < float(coefs.abs().max()) <= np.float32(0.05 * 1e-3 / 3)


def test_checkpoint_is_kept_up_to_date(world: World, tmp_path: Path) -> None:
    client, path = world.clients["ada"], tmp_path / "ada.safetensors"
    client.checkpoint, client.checkpoint_every = path, 2
    world.run(6)
    replica = make_replica()
    replica.load(path)
    assert replica.applied_round == 6
