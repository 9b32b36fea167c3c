"""What a run ran on, and how much memory it took."""

from zorba.machine.allocations import peak_bytes
from zorba.machine.apart import GIVING_BACK, Apart, Ready, run_apart
from zorba.machine.description import describe, version_of
from zorba.machine.peak import (
    PeakAnonymous,
    anonymous_memory,
    peak_memory,
    reset_peak_memory,
)

__all__ = [
    "GIVING_BACK",
    "Apart",
    "PeakAnonymous",
    "Ready",
    "anonymous_memory",
    "describe",
    "peak_bytes",
    "peak_memory",
    "reset_peak_memory",
    "run_apart",
    "version_of",
]
