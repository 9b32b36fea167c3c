"""Fixtures of the federation's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Random
from tests.federated.world import World


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(**options: Any) -> World:
        worlds.append(World(tmp_path / f"job-{len(worlds)}.log", **options))
        return worlds[-1]

    yield make
    for made in worlds:
        made.server.close()


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()


@pytest.fixture
def numbers(rng: Random) -> np.random.Generator:
    return np.random.default_rng(rng.seed)
