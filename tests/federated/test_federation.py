"""Whole runs: whoever takes part, whatever is restarted, all replicas end with the same bits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from zorba.federated import Client, Greeting, LocalTransport, RoundLog, run_federation

from tests.federated.world import NAMES, World, fail, make_objective, make_replica, make_settings


@pytest.mark.parametrize(
    ("dtype", "distribution", "rounding"),
    [  # every pair of values comes up; the kernels' own tests have every triple
        (torch.float32, "gaussian", "nearest"),
        (torch.float32, "rademacher", "stochastic"),
        (torch.bfloat16, "gaussian", "stochastic"),
        (torch.bfloat16, "rademacher", "nearest"),
    ],
)
def test_replicas_are_identical_after_random_participation(
    make_world: Any, dtype: torch.dtype, distribution: str, rounding: str
) -> None:
    law = {"distribution": distribution, "rounding": rounding}
    world = make_world(dtype=dtype, local_steps=2, **law)
    draw = random.Random(5)
    result = world.run(15, available=lambda t: [n for n in NAMES if draw.random() < 0.5])
    assert result.replicas_identical
    assert result.fingerprints.keys() == set(NAMES)
    assert len(world.fingerprints()) == 1
    assert len({report.clients for report in result.reports}) > 3
    world.server.close()
    with RoundLog(world.path) as log:
        rebuilt = make_replica(dtype, **law)
        rebuilt.apply(log.entries(1))
    assert world.fingerprints() == {rebuilt.fingerprint(fresh=True)}, "the log alone is enough"


def test_absent_client_catches_up_in_one_pass(world: World) -> None:
    result = world.run(20, available=lambda t: NAMES if t == 1 else NAMES[:2])
    assert result.replicas_identical
    assert (world.replicas["cleo"].passes, world.replicas["ada"].passes) == (1, 20)
    assert result.flush_bytes_down["cleo"] > 10 * result.flush_bytes_down["ada"]


def test_clients_may_share_a_replica(world: World, make_world: Any) -> None:
    shared = make_world()
    replica = shared.replicas["ada"]
    for n, client in enumerate(shared.clients.values()):
        client.replica, client.objective = replica, make_objective(replica, 0.1 * n, 10 + n)
    together = shared.run(6)
    assert together.replicas_identical
    assert together.fingerprints == world.run(6).fingerprints
    assert replica.passes == 6, "one pass a round for all of them"


def test_server_restarts_as_if_nothing_had_happened(make_world: Any) -> None:
    undisturbed, disturbed = make_world(), make_world()
    undisturbed.run(9)
    for rounds in (1, 3, 2):
        disturbed.run(rounds)
        disturbed.restart()
    # killed after the replies came and before they were written
    disturbed.greet()
    for name, data in disturbed.server.begin_round().items():
        assert disturbed.answer(name, data).accepted
    disturbed.restart()
    disturbed.run(2)
    # killed in the middle of an append
    disturbed.server.close()
    torn = disturbed.path.read_bytes()
    disturbed.path.write_bytes(torn + torn[-30:-10])
    disturbed.server = disturbed.start()
    assert disturbed.server.log.torn_bytes == 20
    disturbed.run(1)
    assert undisturbed.fingerprints() == disturbed.fingerprints()
    assert undisturbed.path.read_bytes() == disturbed.path.read_bytes()


def test_old_rounds_are_not_replayed_at_todays_rate(world: World) -> None:
    world.run(3, available=lambda t: NAMES[:2])
    for lr in (5.0, lambda t: 5.0 / t):
        world.settings = make_settings(lr=lr)
        world.restart()
        assert world.run(2).replicas_identical
    assert len(world.fingerprints()) == 1


def test_masks_can_be_others_when_a_server_starts_again(world: World) -> None:
    world.run(2)
    old = world.server.log.entry(2).mask_version
    world.masks = [[False, False, True, False]] * 3
    world.restart()
    result = world.run(2)
    assert result.replicas_identical
    entry = result.reports[-1].entry
    assert entry.uncovered() == [0, 1, 3], "these blocks are left alone"
    assert entry.mask_version != old


def test_client_back_at_its_checkpoint_misses_no_round(
    world: World, make_world: Any, tmp_path: Path
) -> None:
    undisturbed, path = make_world(), tmp_path / "bob.safetensors"
    undisturbed.run(6)
    world.run(2)
    world.replicas["bob"].save(path)
    world.run(2)
    world.replicas["bob"].load(path)  # what is left after a kill
    assert [len(report.clients) for report in world.run(2).reports] == [3, 3]
    assert world.fingerprints() == undisturbed.fingerprints()
    world.replicas["bob"].load(path)  # killed before the last exchange
    assert world.run(0).replicas_identical


def test_failing_client_does_not_stop_the_others(world: World) -> None:
    fail(world.clients["bob"], RuntimeError("the disk is gone"))
    result = world.run(3)
    for report in result.reports:
        assert report.clients == ("ada", "cleo")
        assert report.failures == {"bob": "RuntimeError: the disk is gone"}
    assert result.replicas_identical, "it still applies the log"


def test_ctrl_c_passes_and_the_run_goes_on_later(world: World) -> None:
    inner = world.clients["cleo"].objective
    fail(world.clients["cleo"], KeyboardInterrupt(), from_round=3)
    with pytest.raises(KeyboardInterrupt):
        world.run(5)
    assert world.server.log.last == 2
    world.clients["cleo"].objective = inner
    assert world.run(3).replicas_identical


@pytest.mark.parametrize(("directions", "parts"), [("shared", 1), ("own", len(NAMES))])
def test_bytes_are_counted_as_encoded(make_world: Any, directions: str, parts: int) -> None:
    world = make_world(num_perturbations=5, directions=directions)
    seen, sent = [], dict.fromkeys(NAMES, 0)
    exchange = world.transport.exchange

    def counted(plans: Any, timeout: Any) -> Any:
        sent.update({name: sent[name] + len(data) for name, data in plans.items()})
        return exchange(plans, timeout)

    world.transport.exchange = counted
    result = world.run(4, on_round=seen.append)
    assert tuple(seen) == result.reports
    for report in result.reports:
        assert set(report.scalar_bytes_up.values()) == {20}
        assert report.scalar_bytes_down <= parts * 4 * 4 * 5 + 8
    assert set(result.reports[-1].bytes_up.values()) <= set(range(60, 81))
    for name in NAMES:
        total = sum(r.bytes_down[name] for r in result.reports) + result.flush_bytes_down[name]
        assert sent[name] == total


def test_client_of_another_model_takes_no_part(world: World) -> None:
    other = Client("bob", make_replica(frozen=2.0), lambda r, k: (lambda _: 0.0, 1))
    result = run_federation(world.server, LocalTransport(world.clients | {"bob": other}), 2)
    assert "another model" in result.reports[0].refusals["bob"]
    assert result.reports[1].clients == ("ada", "cleo")
    assert not result.replicas_identical
    assert result.fingerprints.keys() == {"ada", "cleo"}
    down = [*(report.bytes_down for report in result.reports), result.flush_bytes_down]
    assert [count["bob"] for count in down] == [len(Greeting(0).encode())] * 3


def test_registering_a_client_under_another_name_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match="registered as eve"):
        LocalTransport({"eve": world.clients["ada"]})
