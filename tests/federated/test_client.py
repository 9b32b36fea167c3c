"""The client: what it measures, and that repeated, stale or impossible plans do no harm."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zorba.federated import (
    FederationError,
    Greeting,
    Hello,
    LocalTransport,
    MessageError,
    Plan,
    ReplicaError,
    Reply,
    decode,
    run_federation,
)
from zorba.optim import NoiseTerms, one_by_one

import zorba_kernels as zk
from tests.federated.world import World, copy_table, loss_of, make_settings, weights_of


def plan_of(data: bytes) -> Plan:
    """The plan that the bytes are."""
    plan = decode(data)
    assert isinstance(plan, Plan)
    return plan


def reply_of(data: bytes) -> Reply:
    """The reply that the bytes are."""
    reply = decode(data)
    assert isinstance(reply, Reply), reply
    return reply


@pytest.mark.parametrize("estimator", ["central", "forward"])
def test_scalars_are_the_derivatives_along_the_masked_noise(tmp_path: Path, estimator: Any) -> None:
    world = World(tmp_path / "log", make_settings(estimator=estimator))
    reply = reply_of(world.clients["ada"].handle(world.plan("ada")))
    replica, seed = world.replicas["ada"], world.settings.seed_of(1, 0)
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
    world.server.close()


def test_measuring_leaves_the_weights(world: World) -> None:
    before = weights_of(world.replicas["bob"])
    world.clients["bob"].handle(world.plan("bob"))
    after = weights_of(world.replicas["bob"])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_same_plan_again_gets_the_same_bytes(world: World) -> None:
    run_federation(world.server, world.transport, 2)
    calls = []
    client = world.clients["ada"]
    inner = client.objective
    client.objective = lambda r, k: calls.append((r, k)) or inner(r, k)  # type: ignore[func-returns-value]
    data = world.plan("ada")
    first = client.handle(data)
    assert client.handle(data) == first
    assert calls == [(3, 0)]


def test_stale_plan_is_refused(world: World) -> None:
    old = world.plan("ada")
    run_federation(world.server, world.transport, 3)
    before = world.replicas["ada"].fingerprint(fresh=True)
    with pytest.raises(MessageError, match="plan of round 1 but has applied round 3"):
        world.clients["ada"].handle(old)
    assert world.replicas["ada"].fingerprint(fresh=True) == before


def test_missing_entries_are_asked_for(world: World) -> None:
    run_federation(world.server, world.transport, 3, available=lambda _: ("ada", "bob"))
    plan = plan_of(world.server.begin_round()["ada"])
    fresh = World(world.path.with_name("other")).clients["cleo"]
    # A plan that starts at round 3 reaches a replica at theta_0.
    answer = decode(fresh.handle(replace(plan, base_round=3, num_entries=0, frames=b"").encode()))
    assert isinstance(answer, Hello)
    assert answer.applied_round == 0
    flush = replace(plan, base_round=3, num_entries=0, frames=b"", seeds=())
    assert isinstance(decode(fresh.handle(flush.encode())), Hello)
    assert fresh.replica.fingerprint(fresh=True) == fresh.replica.identity.start


def test_plan_for_another_replica_is_refused_before_anything_is_applied(world: World) -> None:
    plan = plan_of(world.plan("ada"))
    for change, told in (
        ({"noise_version": 2}, "noise version 2"),
        ({"distribution": "rademacher"}, "distribution"),
        ({"rounding": "nearest"}, "rounding"),
        ({"mask": (True,) * 3}, "number of blocks"),
    ):
        with pytest.raises(MessageError, match=told):
            world.clients["ada"].handle(replace(plan, **change).encode())
    run_federation(world.server, world.transport, 1)
    with pytest.raises(ReplicaError, match="job"):
        world.clients["ada"].handle(replace(plan, round=9, job=4).encode())
    with pytest.raises(ReplicaError, match="job"):
        world.clients["ada"].handle(Greeting(4).encode())
    with pytest.raises(MessageError, match="sends no hello"):
        world.clients["ada"].handle(world.clients["ada"].handle(Greeting(plan.job).encode()))


def test_objective_that_raises_leaves_the_applied_entries(world: World) -> None:
    run_federation(world.server, world.transport, 2)
    data = world.server.begin_round()["ada"]
    client, replica = world.clients["ada"], world.replicas["ada"]
    before = replica.fingerprint(fresh=True)
    inner = client.objective

    def failing(round_number: int, step: int) -> Any:
        raise MemoryError("out of memory")

    client.objective = failing
    with pytest.raises(MemoryError):
        client.handle(data)
    assert (replica.applied_round, replica.fingerprint(fresh=True)) == (2, before)
    client.objective = inner
    assert reply_of(client.handle(data)).applied_round == 2


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e300])
def test_non_finite_loss_sits_the_round_out(world: World, loss: float) -> None:
    data = world.plan("ada")
    world.clients["ada"].objective = lambda r, k: (
        one_by_one(lambda terms: loss * float(terms.coefs.sum())),
        1,
    )
    with pytest.raises(FederationError, match="round 1, step 0"):
        world.clients["ada"].handle(data)
    report = run_federation(world.server, world.transport, 1).reports[0]
    assert report.clients == ("bob", "cleo")
    assert "sits the round out" in report.failures["ada"]


# --- Local steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_pending_steps_are_the_round_of_a_single_client(tmp_path: Path, distribution: Any) -> None:
    """The noise that rides along is bit for bit what the log makes of the same scalars."""
    changes = {"local_steps": 3, "distribution": distribution}
    world = World(tmp_path / "log", make_settings(**changes), masks=[[True] * 4], names=("ada",))
    seen: list[NoiseTerms] = []
    client, replica = world.clients["ada"], world.replicas["ada"]
    inner = client.objective

    def spying(round_number: int, step: int) -> Any:
        evaluate, count = inner(round_number, step)
        return (lambda noises: seen.extend(noises) or evaluate(noises)), count  # type: ignore[func-returns-value]

    client.objective = spying
    start = copy_table(replica.table)
    run_federation(world.server, world.transport, 1)
    entry = world.server.log.entry(1)
    terms = entry.terms
    # The last evaluation saw two pending steps of P = 3 terms, and its own perturbation.
    assert seen[-1].seeds == terms.seeds[:7]
    assert terms.seeds[::3] == tuple(world.settings.seed_of(1, k) for k in range(3))
    assert seen[-1].samples == (0, 1, 2, 0, 1, 2, 2)
    assert torch.equal(seen[-1].coefs[:, :6], terms.coefs[:, :6])

    written = copy_table(start)
    zk.add_noise_(written, terms.seeds, terms.coefs, distribution, samples=terms.samples)
    assert zk.fingerprint(written) == replica.fingerprint(fresh=True)
    world.server.close()


def test_pending_steps_equal_written_steps_to_rounding(tmp_path: Path) -> None:
    """Steps that are written round three times, pending ones once: a few float32 ulps apart."""
    world = World(
        tmp_path / "log", make_settings(local_steps=3), masks=[[True] * 4], names=("ada",)
    )
    replica = world.replicas["ada"]
    table, s = copy_table(replica.table), world.settings
    run_federation(world.server, world.transport, 1)
    for step in range(3):
        g = []
        for p in range(3):
            losses = []
            for sign in (1.0, -1.0):
                moved = copy_table(table)
                zk.add_noise_(moved, s.seed_of(1, step), sign * s.eps, samples=p)
                losses.append(loss_of(moved, 0.01 + 0.1 * step))
            g.append((losses[0] - losses[1]) / (2 * s.eps))
        coefs = [-0.05 * value / 3 for value in g]
        zk.add_noise_(table, [s.seed_of(1, step)] * 3, coefs, samples=[0, 1, 2])
    for pending, written in zip(replica.table.entries, table.entries, strict=True):
        # weights of size 1 (ulp 1.2e-7), and scalars that differ by what that does to the losses
        torch.testing.assert_close(pending.tensor, written.tensor, rtol=0, atol=2e-6)
    world.server.close()


def test_masked_blocks_stay_still_while_measuring(tmp_path: Path) -> None:
    world = World(tmp_path / "log", make_settings(local_steps=2))
    seen: list[NoiseTerms] = []

    def evaluate(terms: NoiseTerms) -> float:
        seen.append(terms)
        return float(terms.coefs.sum())

    world.clients["cleo"].objective = lambda r, k: (one_by_one(evaluate), 4)
    reply = reply_of(world.clients["cleo"].handle(world.plan("cleo")))
    assert reply.scalars.shape == (2, 3)
    assert not any(terms.active(block) for terms in seen for block in (2, 3))
    assert all(terms.active(block) for terms in seen for block in (0, 1))
    world.server.close()


def test_clip_holds_for_pending_steps_too(tmp_path: Path) -> None:
    settings = make_settings(local_steps=2, clip=1e-3)
    world = World(tmp_path / "log", settings, masks=[[True] * 4], names=("ada",))
    seen: list[NoiseTerms] = []
    client = world.clients["ada"]
    inner = client.objective

    def spying(round_number: int, step: int) -> Any:
        evaluate, count = inner(round_number, step)
        return (lambda noises: seen.extend(noises) or evaluate(noises)), count  # type: ignore[func-returns-value]

    client.objective = spying
    reply = reply_of(client.handle(world.plan("ada")))
    assert np.abs(reply.scalars).max() > 1e-3, "scalars go up as they were measured"
    pending = seen[-1].coefs[:, :-1]
    assert 0 < float(pending.abs().max()) <= np.float32(0.05 * 1e-3 / 3)
    run_federation(world.server, world.transport, 1)
    assert float(world.server.log.entry(1).terms.coefs.abs().max()) <= np.float32(0.05 * 1e-3 / 3)
    world.server.close()


# --- Checkpoints ---------------------------------------------------------------------------------


def test_client_continues_from_its_checkpoint(tmp_path: Path) -> None:
    world = World(tmp_path / "log")
    client = world.clients["ada"]
    client.checkpoint, client.checkpoint_every = tmp_path / "ada.safetensors", 2
    run_federation(world.server, world.transport, 6)
    again = World(tmp_path / "other")
    again.server.close()
    again.replicas["ada"].load(tmp_path / "ada.safetensors")
    assert again.replicas["ada"].applied_round == 6
    clients = world.clients | {"ada": again.clients["ada"]}
    world.restart()  # a server does not know that a client was started again
    result = run_federation(world.server, LocalTransport(clients), 3)
    assert result.replicas_identical
    world.server.close()
