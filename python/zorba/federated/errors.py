"""Errors of a federation, by what must be looked at."""

from zorba.log import LogError


class FederationError(Exception):
    """Anything that a part of the federation refuses; nothing was changed."""


class MessageError(FederationError, ValueError):
    """A message is malformed, of another version, or not for the one who got it."""


class ReplicaError(FederationError, RuntimeError):
    """A replica or its checkpoint does not fit the log."""


class GapError(ReplicaError):
    """Log entries are missing between the replica and what it was given."""


class DivergedError(ReplicaError):
    """A replica's fingerprint is not the one that the log says it must have."""


class RunFolderError(FederationError, RuntimeError):
    """A run folder holds something else, or is in use by another run."""


class ServerLogError(FederationError, LogError):
    """A server's log is damaged, of another job, open in another server, or cannot be written."""
