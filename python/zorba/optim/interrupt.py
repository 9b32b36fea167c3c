"""Holds Ctrl-C back while weights change."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Gate:
    """Lets Ctrl-C through for as long as the caller's own code runs."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any] | None) -> None:
        self.handler = handler
        self.held: list[tuple[int, FrameType | None]] = []

    def hold(self, number: int, frame: FrameType | None) -> None:
        """Takes the place of the handler."""
        self.held.append((number, frame))

    def deliver(self) -> None:
        """Gives the handler the last signal that was held, if there was one."""
        if self.held and self.handler is not None:
            last = self.held[-1]
            self.held.clear()  # first: the handler mostly raises
            self.handler(*last)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Delivers SIGINT inside the block, one that was held before at its beginning."""
        if self.handler is None:
            yield
            return
        outside = signal.getsignal(signal.SIGINT)  # open already, where evaluations are nested
        try:
            signal.signal(signal.SIGINT, self.handler)
            self.deliver()
            yield
        finally:
            signal.signal(signal.SIGINT, outside)


@contextmanager
def deferred_interrupts() -> Iterator[Gate]:
    """Delivers SIGINT at the end of the block instead of inside it; in the main thread alone."""
    # A pass over the weights and the note that it was made must happen together: an interrupt
    # between them would leave weights perturbed, and nobody would know. Python runs handlers in
    # the main thread only, so elsewhere there is nothing to hold back.
    handler = signal.getsignal(signal.SIGINT)
    # SIG_IGN and SIG_DFL are no callables: an ignored signal must stay ignored, and one that kills
    # the process leaves no weights to care for.
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield Gate(None)
        return
    gate = Gate(handler)
    try:
        signal.signal(signal.SIGINT, gate.hold)
        yield gate
    finally:
        # The handler first: a signal between the two lines raises here, as a held one would.
        signal.signal(signal.SIGINT, handler)
        gate.deliver()
