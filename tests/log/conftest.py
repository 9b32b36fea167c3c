"""One thread, as more would only wait for each other, and logs to read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zorba.log import LogFile

from tests.conftest import Random
from tests.log import world


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def path(tmp_path: Path, rng: Random) -> Path:
    return world.record(tmp_path / "run.zot", world.make_table(), world.make_updates(8, rng))


@pytest.fixture
def rounds(tmp_path: Path) -> Path:
    """A federation's log of four rounds; nobody measured anything in the third."""
    with LogFile(tmp_path / "jobs" / "job.log", world.HEADER) as log:
        for number in range(1, 5):
            log.append(world.make_entry(number, empty=number == 3))
    return log.path


@pytest.fixture(params=["path", "rounds"])
def either(request: pytest.FixtureRequest) -> Path:
    value: Path = request.getfixturevalue(request.param)
    return value
