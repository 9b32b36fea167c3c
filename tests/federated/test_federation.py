"""Whole runs: whoever takes part, whatever is restarted, all replicas end with the same bits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from zorba.federated import Client, Greeting, LocalTransport, RoundLog, run_federation

from tests.federated.world import NAMES, World, loss_of, make_objective, make_replica, make_settings


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
    tmp_path: Path, dtype: torch.dtype, distribution: Any, rounding: Any
) -> None:
    settings = make_settings(distribution=distribution, rounding=rounding, local_steps=2)
    world = World(tmp_path / "log", settings, dtype)
    draw = random.Random(5)
    result = run_federation(
        world.server,
        world.transport,
        15,
        available=lambda t: [name for name in NAMES if draw.random() < 0.5],
    )
    assert result.replicas_identical
    assert result.fingerprints.keys() == set(NAMES)
    assert len(world.fingerprints()) == 1
    assert len({report.clients for report in result.reports}) > 3
    rebuilt = make_replica(dtype, distribution, rounding)
    rebuilt.apply(world.server.log.entries(1))
    assert rebuilt.fingerprint(fresh=True) in world.fingerprints()
    world.server.close()


def test_loss_goes_down(tmp_path: Path) -> None:
    world = World(tmp_path / "log", make_settings(lr=1.0, num_perturbations=10))
    before = loss_of(world.replicas["ada"].table, 0.1)
    run_federation(world.server, world.transport, 30)
    assert loss_of(world.replicas["ada"].table, 0.1) < 0.99 * before
    world.server.close()


def test_absent_client_catches_up_in_one_pass(world: World) -> None:
    result = run_federation(
        world.server, world.transport, 20, available=lambda t: NAMES if t == 1 else NAMES[:2]
    )
    assert result.replicas_identical
    assert (world.replicas["cleo"].passes, world.replicas["ada"].passes) == (1, 20)
    assert result.flush_bytes_down["cleo"] > 10 * result.flush_bytes_down["ada"]


def test_clients_may_share_a_replica(world: World, tmp_path: Path) -> None:
    shared = World(tmp_path / "shared.log")
    replica = shared.replicas["ada"]
    for n, client in enumerate(shared.clients.values()):
        client.replica, client.objective = replica, make_objective(replica, 0.1 * n, 10 + n)
    alone = run_federation(world.server, world.transport, 6)
    together = run_federation(shared.server, shared.transport, 6)
    assert together.replicas_identical
    assert together.fingerprints == alone.fingerprints
    assert replica.passes == 6, "one pass a round for all of them"
    assert replica.fingerprint(fresh=True) in world.fingerprints()
    shared.server.close()


def test_server_restarts_as_if_nothing_had_happened(tmp_path: Path) -> None:
    undisturbed, disturbed = World(tmp_path / "a.log"), World(tmp_path / "b.log")
    run_federation(undisturbed.server, undisturbed.transport, 9)
    for rounds in (1, 3, 2):
        run_federation(disturbed.server, disturbed.transport, rounds)
        disturbed.restart()
    # killed after the replies came and before they were written
    disturbed.greet()
    for name, data in disturbed.server.begin_round().items():
        assert disturbed.server.receive(name, disturbed.clients[name].handle(data)).accepted
    disturbed.restart()
    run_federation(disturbed.server, disturbed.transport, 2)
    # killed in the middle of an append
    disturbed.server.close()
    torn = disturbed.path.read_bytes()
    disturbed.path.write_bytes(torn + torn[-30:-10])
    disturbed.server = disturbed.start()
    assert disturbed.server.log.torn_bytes == 20
    run_federation(disturbed.server, disturbed.transport, 1)
    assert undisturbed.fingerprints() == disturbed.fingerprints()
    undisturbed.server.close()
    disturbed.server.close()
    assert undisturbed.path.read_bytes() == disturbed.path.read_bytes()


def test_old_rounds_are_not_replayed_at_todays_rate(world: World) -> None:
    run_federation(world.server, world.transport, 3, available=lambda t: NAMES[:2])
    late = World(world.path.with_name("other"))
    world.server.set_settings(make_settings(lr=5.0))
    world.transport = LocalTransport(world.clients | {"cleo": late.clients["cleo"]})
    world.replicas["cleo"] = late.replicas["cleo"]
    world.restart()
    world.server.set_settings(make_settings(lr=lambda t: 5.0 / t))
    result = run_federation(world.server, world.transport, 2)
    assert result.replicas_identical
    assert len(world.fingerprints()) == 1
    late.server.close()


def test_rejoined_client_applies_no_round_twice(world: World) -> None:
    away = {3, 4, 5}
    result = run_federation(
        world.server, world.transport, 8, available=lambda t: NAMES[:2] if t in away else NAMES
    )
    assert result.replicas_identical
    # Its answer to the last plan is lost, so the server sends the same entries again.
    plan = world.server.begin_round()["cleo"]
    world.clients["cleo"].handle(plan)
    world.server.end_round()
    assert run_federation(world.server, world.transport, 1).replicas_identical
    assert len(world.fingerprints()) == 1


def test_client_back_at_its_checkpoint_misses_no_round(world: World, tmp_path: Path) -> None:
    undisturbed = World(tmp_path / "undisturbed.log")
    run_federation(undisturbed.server, undisturbed.transport, 6)
    run_federation(world.server, world.transport, 2)
    world.replicas["bob"].save(tmp_path / "bob.safetensors")
    run_federation(world.server, world.transport, 2)
    world.replicas["bob"].load(tmp_path / "bob.safetensors")  # what is left after a kill
    result = run_federation(world.server, world.transport, 2)
    assert [len(report.clients) for report in result.reports] == [3, 3]
    assert world.fingerprints() == undisturbed.fingerprints()
    world.replicas["bob"].load(tmp_path / "bob.safetensors")  # killed before the last exchange
    assert run_federation(world.server, world.transport, 0).replicas_identical
    undisturbed.server.close()


def test_clients_that_join_do_not_exceed_those_of_a_round(tmp_path: Path) -> None:
    world = World(tmp_path / "log", make_settings(clients_per_round=2))
    assert world.server.begin_round() == world.server.greetings(), "nobody is known"
    for name, message in world.server.greetings(NAMES[:1]).items():
        world.server.receive(name, world.clients[name].handle(message))
    assert world.server.ask_again().keys() == {"ada"}
    for name, message in world.server.greetings(NAMES).items():
        world.server.receive(name, world.clients[name].handle(message))
    assert len(world.server.ask_again()) == 1, "ada was asked already"
    assert world.server.ask_again() == {}
    world.server.close()


def test_hello_after_a_reply_takes_nothing_back(world: World) -> None:
    world.greet()
    for name, message in world.server.begin_round().items():
        assert world.server.receive(name, world.clients[name].handle(message)).accepted
    hello = world.clients["bob"].handle(Greeting(world.settings.job_id).encode())
    assert world.server.receive("bob", hello).accepted
    assert world.server.ask_again() == {}
    assert set(world.server.end_round().clients) == set(NAMES)


def test_masks_can_change_between_rounds(world: World) -> None:
    run_federation(world.server, world.transport, 2)
    old = world.server.log.entry(2).mask_version
    world.server.set_masks(NAMES, [[False, False, True, False]] * 3)
    result = run_federation(world.server, world.transport, 2)
    assert result.replicas_identical
    entry = result.reports[-1].entry
    assert entry.uncovered() == [0, 1, 3], "these blocks are left alone"
    assert entry.mask_version != old


def test_failing_client_does_not_stop_the_others(world: World) -> None:
    def failing(round_number: int, step: int) -> Any:
        raise RuntimeError("the disk is gone")

    world.clients["bob"].objective = failing
    result = run_federation(world.server, world.transport, 3)
    for report in result.reports:
        assert report.clients == ("ada", "cleo")
        assert report.failures == {"bob": "RuntimeError: the disk is gone"}
    assert result.replicas_identical, "it still applies the log"


def test_ctrl_c_passes_and_the_run_goes_on_later(world: World) -> None:
    inner = world.clients["cleo"].objective

    def interrupted(round_number: int, step: int) -> Any:
        if round_number == 3:
            raise KeyboardInterrupt
        return inner(round_number, step)

    world.clients["cleo"].objective = interrupted
    with pytest.raises(KeyboardInterrupt):
        run_federation(world.server, world.transport, 5)
    assert world.server.log.last == 2
    world.clients["cleo"].objective = inner
    assert run_federation(world.server, world.transport, 3).replicas_identical


def test_late_answer_is_dropped_and_its_scalars_are_not_used(world: World) -> None:
    result = run_federation(world.server, world.transport, 1, timeout=0.0)
    assert result.reports[0].clients == ()
    assert "the limit is 0.000 s" in result.reports[0].failures["ada"]
    assert run_federation(world.server, world.transport, 1).replicas_identical


def test_bytes_are_counted_as_encoded(tmp_path: Path) -> None:
    world = World(tmp_path / "log", make_settings(num_perturbations=5))
    seen = []
    result = run_federation(world.server, world.transport, 4, on_round=seen.append)
    assert tuple(seen) == result.reports
    for report in result.reports:
        assert set(report.scalar_bytes_up.values()) == {20}
        assert report.scalar_bytes_down <= 4 * 4 * 5 + 8
    assert set(result.reports[-1].bytes_up.values()) <= set(range(60, 81))
    for name in NAMES:
        total = sum(r.bytes_down[name] for r in result.reports) + result.flush_bytes_down[name]
        assert world.transport.bytes_down[name] == total
    world.server.close()


def test_client_of_another_model_takes_no_part(world: World) -> None:
    other = Client("bob", make_replica(frozen=2.0), lambda r, k: (lambda _: 0.0, 1))
    transport = LocalTransport(world.clients | {"bob": other})
    result = run_federation(world.server, transport, 2)
    assert "another model" in result.reports[0].refusals["bob"]
    assert result.reports[1].clients == ("ada", "cleo")
    assert not result.replicas_identical
    assert result.fingerprints.keys() == {"ada", "cleo"}
    greeting = len(Greeting(0).encode())
    assert transport.bytes_down["bob"] == 3 * greeting, "one a round, one at the end"


def test_registering_a_client_under_another_name_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match="registered as eve"):
        LocalTransport({"eve": world.clients["ada"]})


def test_log_alone_rebuilds_the_model(world: World) -> None:
    run_federation(world.server, world.transport, 5)
    world.server.close()
    with RoundLog(world.path) as log:
        replica = make_replica()
        replica.apply(log.entries(1))
    assert world.fingerprints() == {replica.fingerprint(fresh=True)}


def test_reports_need_not_be_kept(world: World) -> None:
    seen: list[int] = []
    result = run_federation(
        world.server,
        world.transport,
        3,
        on_round=lambda report: seen.append(report.round),
        keep_reports=False,
    )
    assert seen == [1, 2, 3]
    assert (result.reports, result.final_round) == ((), 3)
