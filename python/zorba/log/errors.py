"""Errors of logs and trajectories."""

from __future__ import annotations


class LogError(RuntimeError):
    """A log cannot be written, read or replayed; the message says why."""


class DamagedLogError(LogError):
    """Bytes were cut or changed."""


class WrongBaseError(LogError):
    """A model is not the one that a log starts from."""
