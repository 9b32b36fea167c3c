"""What a run ran on, and how much memory it took."""

from zorba.machine.apart import Apart, Ready, run_apart
from zorba.machine.description import describe, version_of
from zorba.machine.peak import (
    PeakAnonymous,
    anonymous_memory,
    peak_memory,
    reset_peak_memory,
)

__all__ = [
    "Apart",
    "PeakAnonymous",
    "Ready",
    "anonymous_memory",
    "describe",
    "peak_memory",
    "reset_peak_memory",
    "run_apart",
    "version_of",
]
