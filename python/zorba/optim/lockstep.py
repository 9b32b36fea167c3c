"""Runs several evaluations side by side, a block of the model at a time.

Each evaluation is a greenlet that runs the closure as it is, and with it the model's own forward.
Before each block it waits until the others have come as far. So all evaluations run through a block
before the first one enters the next, and weights that are brought to the device for a block are
brought once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

import zorba_kernels as zk
from zorba.optim.generators import GeneratorState


class Parking(Protocol):
    """What evaluations share and must not see of each other: a placement's perturbed weights."""

    table: zk.ParamTable

    def park(self) -> Any:
        """Takes it away when an evaluation waits; returns what brings it back."""
        ...

    def resume(self, parked: Any) -> None:
        """Brings it back when the evaluation goes on."""
        ...


class Lockstep:
    """Evaluations side by side.

    Args:
        blocks: modules before whose forward an evaluation waits for the others.
        parking: parts the evaluations' perturbed weights.
    """

    def __init__(self, blocks: Sequence[nn.Module], parking: Parking) -> None:
        self._blocks = list(blocks)
        self._parking = parking
        self._device = parking.table.device
        self._streams: dict[Any, _Stream] = {}

    def run(self, evaluations: Sequence[Callable[[], float]], draws: bool) -> list[float]:
        """Returns the result of each evaluation.

        Args:
            evaluations: each runs the model once, the first to its first wait before the second
                begins.
            draws: whether they draw random numbers, and each must go on with its own.

        Raises:
            Whatever an evaluation raises; the others are ended first.
        """
        try:
            from greenlet import greenlet  # optional: only offloading needs it
        except ImportError as error:
            raise ImportError(
                "steps with idle blocks off the device need the package greenlet: pip install "
                "'zorba-kernels[offload]'"
            ) from error
        streams = [_Stream(greenlet(call)) for call in evaluations]
        self._streams = {stream.greenlet: stream for stream in streams}
        try:
            with self._waiting():
                while waiting := [s for s in streams if not s.greenlet.dead]:
                    stream = min(waiting, key=lambda s: s.waits)
                    self._advance(stream, draws)
        finally:
            for stream in streams:
                if not stream.greenlet.dead:
                    stream.greenlet.throw()  # GreenletExit
            self._streams = {}
        return [stream.result for stream in streams]

    def _advance(self, stream: _Stream, draws: bool) -> None:
        """Lets an evaluation run to its next wait, or to its end."""
        outer = _Modes(self._device)
        if stream.kept is not None:
            self._parking.resume(stream.kept)
            if stream.generators is not None:
                stream.generators.rewind()
            stream.modes.restore()
        try:
            stream.result = stream.greenlet.switch()  # of an evaluation that waits: None
            stream.modes = _Modes(self._device)
        finally:
            outer.restore()
        stream.waits += 1
        if not all(s.greenlet.dead for s in self._streams.values()):
            stream.generators = GeneratorState(self._device) if draws else None
            stream.kept = self._parking.park()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Makes the blocks wait; they are as before on leaving."""
        before = [(module, module.__dict__.get("forward")) for module in self._blocks]
        try:
            for module in self._blocks:
                module.forward = self._forward(module.forward)
            yield
        finally:
            for module, forward in before:
                if forward is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.forward = forward

    def _forward(self, original: Any) -> Any:
        from greenlet import getcurrent

        def forward(*args: Any, **kwargs: Any) -> Any:
            current = getcurrent()
            if current in self._streams:
                current.parent.switch()
            return original(*args, **kwargs)

        return forward


class _Stream:
    """An evaluation, and where it stands."""

    def __init__(self, green: Any) -> None:
        self.greenlet = green
        self.waits = 0
        self.result: Any = None
        self.kept: Any = None
        self.modes: Any = None
        self.generators: GeneratorState | None = None


class _Modes:
    """Modes of the thread, which evaluations in one thread would else leave to each other.

    Torch's of autograd and autocast, and who gets Ctrl-C: the closure does, and nothing between.
    """

    def __init__(self, device: torch.device) -> None:
        self._grad = torch.is_grad_enabled()
        self._cache = torch.is_autocast_cache_enabled()
        self._autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in {"cpu", device.type}
        }
        self._handler = signal.getsignal(signal.SIGINT)

    def restore(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._handler)
        torch.set_grad_enabled(self._grad)
        torch.set_autocast_cache_enabled(self._cache)
        for kind, (enabled, dtype) in self._autocast.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.clear_autocast_cache()
