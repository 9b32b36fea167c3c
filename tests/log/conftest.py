"""One thread, as more would only wait for each other, and a trajectory to read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import Random
from tests.log.world import WEIGHTS, make_table, make_updates, record


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    value: torch.dtype = request.param
    return value


@pytest.fixture
def path(tmp_path: Path, rng: Random) -> Path:
    """A finished trajectory of eight steps of every kind."""
    record(tmp_path / "run.zot", make_table(WEIGHTS), make_updates(8, rng))
    return tmp_path / "run.zot"
