"""Clients that answer in time and in form, and lie about what they measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from zorba.federated import Client, Reply, decode

Scalars = npt.NDArray[np.float32]
Lie = Callable[[Scalars, np.random.Generator], Scalars]


def garbage(scalars: Scalars, numbers: np.random.Generator) -> Scalars:
    """Random bits that are finite numbers: of all magnitudes up to 3e38, of either sign."""
    made = numbers.integers(0, 1 << 32, scalars.shape, dtype=np.uint32).view(np.float32)
    return np.where(np.isfinite(made), made, np.float32(0))


def opposite(scalars: Scalars, numbers: np.random.Generator) -> Scalars:
    """Ten times uphill: what was measured, times -10."""
    return -10 * scalars


LIES: dict[str, Lie] = {"garbage": garbage, "opposite": opposite}


class LyingClient(Client):
    """An honest client whose replies carry other scalars than it measured."""

    def __init__(self, honest: Client, lie: Lie, seed: int) -> None:
        super().__init__(honest.name, honest.replica, honest.objective)
        self._lie = lie
        self._numbers = np.random.default_rng(seed)

    def handle(self, data: bytes) -> bytes:
        answer = super().handle(data)
        message = decode(answer)
        if not isinstance(message, Reply):
            return answer
        return replace(message, scalars=self._lie(message.scalars, self._numbers)).encode()
