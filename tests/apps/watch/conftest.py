"""Fixtures of the tests of views and pages."""

from __future__ import annotations

import random

import pytest

from tests.conftest import Random


@pytest.fixture
def draw(rng: Random) -> random.Random:
    return random.Random(rng.seed)
