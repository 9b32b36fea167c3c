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
from hypothesis import given, settings
from hypothesis import strategies as st
from zorba.federated import LocalTransport, run_federation

from benchmarks.lying_clients import LIES, Lie, LyingClient
from tests.conftest import Random
from tests.federated.fuzz import NAMES, Attack, sealed
from tests.federated.world import BLOCKS, World, loss_of, make_settings

MESSAGES = 600  # of the test of memory; ``python -m tests.federated.fuzz`` sends 100,000


@pytest.fixture(scope="module")
def attack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attack]:
    """A round under way, which hostile messages must not disturb."""
    # Thousands of calls on a few hundred weights: threads would only wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Attack(tmp_path_factory.mktemp("attack"))
    yield made
    made.end()
    torch.set_num_threads(threads)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(["ada", "bob", *NAMES]),
    st.integers(0, 7),
    st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=8)), max_size=4),
    st.integers(0, 400),
    st.booleans(),
)
def test_changed_messages_are_refused_or_do_no_harm(
    attack: Attack, name: str, which: int, edits: list[tuple[int, bytes]], end: int, seal: bool
) -> None:
    data = bytearray(attack.messages[which % len(attack.messages)])
    for at, values in edits:
        data[at : at + len(values)] = values
    if end:
        data = data[: max(1, len(data) - end // 4)]
    attack.strike(name, sealed(bytes(data)) if seal else bytes(data))


def test_refused_messages_leave_nothing_in_memory(attack: Attack, rng: Random) -> None:
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


CREW = tuple(f"client{n}" for n in range(8))
FULL = [[True] * BLOCKS] * len(CREW)


def fall(path: Path, lie: Lie | None, **changes: Any) -> float:
    """Eight clients, two of them liars: how far the loss fell in 12 rounds."""
    federation = make_settings(weighting="uniform", lr=4.0, num_perturbations=8, **changes)
    world = World(path, federation, FULL, CREW)
    if lie is not None:
        for n, name in enumerate(CREW[2:4]):
            world.clients[name] = LyingClient(world.clients[name], lie, n)
    table = world.replicas[CREW[0]].table
    before = loss_of(table, 0.5)
    run_federation(world.server, LocalTransport(world.clients), 12)
    world.server.close()
    assert len(world.fingerprints()) == 1, "all replicas have the same bits, those of liars too"
    return before - loss_of(table, 0.5)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> float:
    """How far the loss falls when nobody lies."""
    return fall(tmp_path_factory.mktemp("honest") / "log", None)


@pytest.mark.parametrize("lie", LIES)
def test_two_liars_of_eight_are_outvoted(tmp_path: Path, honest: float, lie: str) -> None:
    assert honest > 0.02
    for rule in ("trimmed", "median"):
        assert fall(tmp_path / rule, LIES[lie], aggregation=rule) > 0.5 * honest, rule
    with np.errstate(all="ignore"):
        assert not fall(tmp_path / "mean", LIES[lie]) > 0.1 * honest, "one liar moves a mean"
