"""Small models run on one thread: more would only wait for each other."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    import torch

    torch.set_num_threads(1)
