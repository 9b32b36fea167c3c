"""Errors of a federation, by what must be looked at.

Those of the log itself are ``zorba.log.LogError``.
"""

from __future__ import annotations


class FederationError(Exception):
    """Anything that a part of the federation refuses; nothing was changed."""


class MessageError(FederationError, ValueError):
    """A message is malformed, of another version, or not for the one who got it."""


class ReplicaError(FederationError, RuntimeError):
    """A replica or its checkpoint does not fit the log."""


class GapError(ReplicaError):
    """Log entries are missing between the replica and what it was given."""

    def __init__(self, applied_round: int, first_round: int) -> None:
        """Both rounds are told, so that the caller can ask for the right part of the log."""
        super().__init__(
            f"the replica has applied round {applied_round} but the first log entry given is of "
            f"round {first_round}: ask for the log from round {applied_round + 1}"
        )
        self.needed_round = applied_round + 1


class DivergedError(ReplicaError):
    """A replica's fingerprint is not the one that the log says it must have."""


class RunFolderError(FederationError, RuntimeError):
    """A run folder holds something else, or is in use by another run."""
