"""State of the thread that a step borrows and puts back: Ctrl-C, generators, modes of torch."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch


class Gate:
    """Holds Ctrl-C back, and lets it through for as long as the caller's own code runs."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any] | None) -> None:
        self._handler = handler
        self._held: tuple[int, FrameType | None] | None = None

    def shut(self) -> None:
        """Takes the place of the handler."""
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._hold)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._held = number, frame

    def release(self) -> None:
        """Gives the handler its place back, and the last signal that was held."""
        if self._handler is None:
            return
        # The place first: a signal behind this line raises here, as a held one would.
        signal.signal(signal.SIGINT, self._handler)
        held, self._held = self._held, None  # first: the handler mostly raises
        if held is not None:
            self._handler(*held)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Delivers SIGINT inside the block, one that was held before at its beginning."""
        try:
            self.release()
            yield
        finally:
            self.shut()


@contextmanager
def deferred_interrupts() -> Iterator[Gate]:
    """Delivers SIGINT at the end of the block instead of inside it; in the main thread alone."""
    # A pass over the weights and the note that it was made must happen together: an interrupt
    # between them would leave weights perturbed, and nobody would know. Python runs handlers in
    # the main thread only, so elsewhere there is nothing to hold back.
    handler = signal.getsignal(signal.SIGINT)
    # SIG_IGN and SIG_DFL are no callables: an ignored signal must stay ignored, and one that kills
    # the process leaves no weights to care for.
    main = threading.current_thread() is threading.main_thread()
    gate = Gate(handler if main and callable(handler) else None)
    try:
        gate.shut()
        yield gate
    finally:
        gate.release()


class GeneratorState:
    """The state of every generator that a forward may draw from: torch's, Python's and numpy's."""

    # Both losses of a difference need the same dropout masks. With others the difference would be
    # that of two subnetworks, divided by a small eps: noise a hundred times the signal.

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._python = random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002  # masks of speech models

    def moved(self) -> bool:
        """Whether a generator is in another state by now."""
        now = GeneratorState(self._device)
        pairs = [(self._cpu, now._cpu)]
        if self._cuda is not None and now._cuda is not None:
            pairs.append((self._cuda, now._cuda))
        return not (
            all(torch.equal(before, after) for before, after in pairs)
            and self._python == now._python
            and all(map(np.array_equal, self._numpy, now._numpy))
        )

    def rewind(self) -> None:
        """Brings the generators back to it."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002


class ThreadState:
    """Modes of torch (autograd, autocast), the handler of Ctrl-C and, if asked for, generators."""

    def __init__(self, device: torch.device, generators: bool = False) -> None:
        self._grad = torch.is_grad_enabled()
        self._cache = torch.is_autocast_cache_enabled()
        self._autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in {"cpu", device.type}
        }
        self._handler = signal.getsignal(signal.SIGINT)
        self._generators = GeneratorState(device) if generators else None

    def restore(self) -> None:
        """Brings the thread back to it."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._handler)
        torch.set_grad_enabled(self._grad)
        torch.set_autocast_cache_enabled(self._cache)
        for kind, (enabled, dtype) in self._autocast.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        # Its copies are of the weights that the last evaluation saw.
        torch.clear_autocast_cache()
        if self._generators is not None:
            self._generators.rewind()
