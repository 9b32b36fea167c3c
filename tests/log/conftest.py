"""One thread, as more would only wait for each other, and logs to read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import Random
from tests.log.world import WEIGHTS, make_table, make_updates, record, record_rounds


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def path(tmp_path: Path, rng: Random) -> Path:
    """A finished trajectory of eight steps of every kind."""
    return record(tmp_path / "run.zot", make_table(WEIGHTS), make_updates(8, rng))


@pytest.fixture
def rounds(tmp_path: Path) -> Path:
    """A federation's log of four rounds; nobody measured anything in the third."""
    return record_rounds(tmp_path / "jobs" / "job.log")


@pytest.fixture(params=["path", "rounds"])
def either(request: pytest.FixtureRequest) -> Path:
    """One log after the other."""
    value: Path = request.getfixturevalue(request.param)
    return value
