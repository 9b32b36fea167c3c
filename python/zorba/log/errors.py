"""What can go wrong with a trajectory."""

from __future__ import annotations


class TrajectoryError(RuntimeError):
    """A trajectory cannot be written, read or replayed; the message says why."""


class DamagedError(TrajectoryError):
    """Bytes were cut or changed."""


class WrongBaseError(TrajectoryError):
    """A model is not the one that a trajectory starts from."""
