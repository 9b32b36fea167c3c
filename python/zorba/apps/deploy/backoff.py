"""Pauses between the starts of something that keeps ending."""

from __future__ import annotations

from dataclasses import dataclass

LONGEST_PAUSE = 60.0
"""Seconds; a process that lasted longer than that has recovered."""


@dataclass
class Backoff:
    """Pauses that double up to a minute, so that a process which dies at once leaves cores free.

    Attributes:
        first: seconds of the first pause.
    """

    first: float
    _next: float = 0.0

    def pause(self, lasted: float) -> float:
        """Returns the seconds to wait, given how long the last start lasted."""
        if lasted > LONGEST_PAUSE or not self._next:
            self._next = self.first
        pause, self._next = self._next, min(2 * self._next, LONGEST_PAUSE)
        return pause
