"""Hostile bytes and clients that lie: the run goes on as if they were not there."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zorba.federated import LocalTransport, run_federation

from benchmarks.lying_clients import LIES, Lie, LyingClient
from tests.conftest import Random
from tests.federated.fuzz import Attack
from tests.federated.world import BLOCKS, World, loss_of

MESSAGES = 1000  # of the test of memory; ``python -m tests.federated.fuzz`` sends 100,000


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of calls on a few hundred weights: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_hostile_messages_do_no_harm_and_leave_nothing_in_memory(
    tmp_path: Path, rng: Random
) -> None:
    attack = Attack(tmp_path)
    given = attack.messages_of(MESSAGES, rng.seed)
    refused = [(name, data) for name, data in given if not attack.strike(name, data)]
    assert MESSAGES / 2 < len(refused) < MESSAGES, "some are well-formed, and taken"
    tracemalloc.start()
    try:
        traced = []
        for _ in range(2):
            for name, data in refused:
                attack.strike(name, data)
            gc.collect()
            traced.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert traced[1] - traced[0] < 8 * len(refused), "a pointer for each would be more"
    attack.end()


CREW = tuple(f"client{n}" for n in range(8))
FULL = [[True] * BLOCKS] * len(CREW)


def fall(path: Path, lie: Lie | None, **changes: Any) -> float:
    """Eight clients, two of them liars: how far the loss fell in 8 rounds."""
    changes |= {"weighting": "uniform", "lr": 4.0, "num_perturbations": 8}
    world = World(path, FULL, CREW, **changes)
    if lie is not None:
        for n, name in enumerate(CREW[2:4]):
            world.clients[name] = LyingClient(world.clients[name], lie, n)
    table = world.replicas[CREW[0]].table
    before = loss_of(table, 0.5)
    run_federation(world.server, LocalTransport(world.clients), 8)
    world.server.close()
    assert len(world.fingerprints()) == 1, "all replicas have the same bits, those of liars too"
    return before - loss_of(table, 0.5)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> float:
    return fall(tmp_path_factory.mktemp("honest") / "log", None, directions="shared")


@pytest.mark.parametrize("lie", LIES)
def test_two_liars_of_eight_are_outvoted(tmp_path: Path, honest: float, lie: str) -> None:
    assert honest > 0.02
    for rule in ("trimmed", "median"):
        assert fall(tmp_path / rule, LIES[lie], aggregation=rule) > 0.5 * honest, rule
    with np.errstate(all="ignore"):
        mean = fall(tmp_path / "mean", LIES[lie], directions="shared")
    assert not mean > 0.1 * honest, "one liar moves a mean"


@pytest.mark.parametrize("lie", LIES)
def test_a_liar_moves_own_directions_no_further_than_the_bound(tmp_path: Path, lie: str) -> None:
    """Nobody can compare scalars of different directions: their length alone is bounded."""
    honest = fall(tmp_path / "honest", None, directions="own")
    assert fall(tmp_path / "bounded", LIES[lie], directions="own", part_bound=1.0) > 0.25 * honest
    with np.errstate(all="ignore"):
        free = fall(tmp_path / "free", LIES[lie], directions="own", part_bound=None)
    assert not free > 0.1 * honest
