"""Runs several evaluations side by side, a block of the model at a time.

Each evaluation is a greenlet that runs the closure as it is, and with it the model's own forward.
Before each block it waits until the others have come as far. So all evaluations run through a block
before the first one enters the next, and weights that are brought to the device for a block are
brought once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from zorba.forward import replaced_forward
from zorba.optim.generators import GeneratorState
from zorba.optim.placement import Placement


class Lockstep:
    """Evaluations side by side.

    Args:
        blocks: modules before whose forward an evaluation waits for the others.
        placement: whose perturbed weights the evaluations must not see of each other.
    """

    def __init__(self, blocks: Sequence[nn.Module], placement: Placement) -> None:
        self._blocks = list(blocks)
        self._placement = placement
        self._device = placement.table.device
        self._evaluations: dict[Any, _Evaluation] = {}

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
        # Greenlets, not threads: one evaluation runs at a time and always stops at a block, so
        # that hooks, generators and ``.data`` need no locks; and not generators, as the wait is
        # deep in a forward that is not ours.
        running = [_Evaluation(greenlet(call)) for call in evaluations]
        self._evaluations = {evaluation.greenlet: evaluation for evaluation in running}
        try:
            with ExitStack() as stack:
                for block in self._blocks:
                    forward = partial(self._forward, block.forward)
                    stack.enter_context(replaced_forward(block, forward))
                # The one that is furthest behind goes on: all pass a block before one enters the
                # next, also where an evaluation calls a block more often than another one.
                while waiting := [e for e in running if not e.greenlet.dead]:
                    self._advance(min(waiting, key=lambda e: e.waits), draws)
        finally:
            for evaluation in running:
                # Its ``with`` blocks and hooks must be left here, not when it is collected.
                if not evaluation.greenlet.dead:
                    evaluation.greenlet.throw()  # GreenletExit
            self._evaluations = {}
        return [evaluation.result for evaluation in running]

    def _advance(self, evaluation: _Evaluation, draws: bool) -> None:
        """Lets an evaluation run to its next wait, or to its end."""
        # Everything that an evaluation set up is put away while it waits, and brought back when it
        # goes on: generators, weights that read scratch, modes of the thread.
        outer = _Modes(self._device)
        if evaluation.modes is not None:
            self._placement.resume(evaluation.parked)
            if evaluation.generators is not None:
                evaluation.generators.rewind()
            evaluation.modes.restore()
        try:
            evaluation.result = evaluation.greenlet.switch()  # of one that waits: None
            evaluation.modes = _Modes(self._device)
        finally:
            outer.restore()
        evaluation.waits += 1
        if not all(e.greenlet.dead for e in self._evaluations.values()):
            evaluation.generators = GeneratorState(self._device) if draws else None
            evaluation.parked = self._placement.park()

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward of a block: waits until the other evaluations are here too."""
        from greenlet import getcurrent

        current = getcurrent()
        if current in self._evaluations:
            current.parent.switch()
        return original(*args, **kwargs)


@dataclass
class _Evaluation:
    """An evaluation, and its state while it waits."""

    greenlet: Any
    waits: int = 0
    result: Any = None
    parked: Any = None
    modes: _Modes | None = None
    generators: GeneratorState | None = None


class _Modes:
    """Modes of the thread: torch's of autograd and autocast, and the handler of Ctrl-C."""

    # A greenlet switches the stack of calls, not the state of the thread. Without this, one
    # evaluation's ``with torch.autocast(...)`` would hold for those that go on while it waits.

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
        # Its copies are of the weights that the last evaluation saw.
        torch.clear_autocast_cache()
