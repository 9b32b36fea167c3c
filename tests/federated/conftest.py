"""Fixtures of the federation's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import Random
from tests.federated.world import MASKS, NAMES, World, make_settings


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    """Makes worlds with changed settings, each on a log of its own."""
    worlds: list[World] = []

    def make(
        masks: Any = MASKS,
        names: tuple[str, ...] = NAMES,
        dtype: torch.dtype = torch.float32,
        **changes: Any,
    ) -> World:
        path = tmp_path / f"job-{len(worlds)}.log"
        worlds.append(World(path, make_settings(**changes), masks, names, dtype))
        return worlds[-1]

    yield make
    for made in worlds:
        made.server.close()


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    """Three clients on an empty log."""
    return make_world()


@pytest.fixture
def numbers(rng: Random) -> np.random.Generator:
    """numpy's generator, from the test's seed."""
    return np.random.default_rng(rng.seed)
