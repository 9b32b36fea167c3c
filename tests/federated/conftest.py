"""Fixtures of the federation's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.federated.world import World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Three clients on an empty log."""
    made = World(tmp_path / "job.log")
    yield made
    made.server.close()
