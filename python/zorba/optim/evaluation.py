"""Evaluates a closure at perturbed weights, and finds out what need not run again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from zorba.forward import replaced_forward
from zorba.offload import Offload
from zorba.optim.owners import Probe
from zorba.optim.placement import Placement
from zorba.optim.reuse import PrefixReuse, ReuseError
from zorba.optim.terms import Terms
from zorba.optim.thread import GeneratorState, ThreadState, deferred_interrupts

Run = Callable[[Terms], Any]
Losses = Callable[..., list[Any]]
"""Takes noises, and another closure where it is not the step's own; see ``Evaluator.step``."""


class Evaluator:
    """Evaluates closures on a model, a step at a time.

    ``read`` makes a number of what a closure returns, or an array of one loss an example.
    """

    def __init__(
        self,
        model: nn.Module,
        placement: Placement,
        prefix_reuse: bool,
        read: Callable[[Any], Any] = float,
    ) -> None:
        self._model, self._placement, self._read = model, placement, read
        self._reuse = PrefixReuse(model, placement)
        if not prefix_reuse:
            self._reuse.disable()
        # In place and without reuse it does not matter how the closure uses its parameters.
        self._watched = not (placement.by_module or self._reuse.enabled)
        self._offload = Offload.of(model)
        self._generators: GeneratorState | None = None  # at the start of a step that may draw

    @contextmanager
    def step(self, closure: Callable[[], Any]) -> Iterator[Losses]:
        """Context of a step, with a function that returns the closure's loss at each noise."""
        # Ctrl-C reaches the closure. Elsewhere it waits, at the longest until the step is done.
        with deferred_interrupts() as gate, ExitStack() as stack:
            # Autocast's copies are of perturbed weights: no forward behind the step may find them.
            stack.callback(torch.clear_autocast_cache)
            # Blocks first on the way in, last on the way out: placements and reuse then only meet
            # parameters that point to their host weights.
            if self._offload is not None:
                stack.enter_context(self._offload.streaming())
            stack.enter_context(self._placement.session())
            stack.enter_context(self._reuse.session())
            device = self._placement.table.device
            generators = GeneratorState(device) if self._model.training else None
            self._generators = generators

            def run(call: Callable[[], Any], terms: Terms) -> Any:
                self._placement.move_to(terms)
                # Autocast keeps copies of weights by their tensors: they would miss the noise.
                torch.clear_autocast_cache()
                if generators is not None:
                    generators.rewind()
                self._reuse.begin()
                # The closure is the caller's code: there Ctrl-C may stop it, as it may hang.
                with gate.open():
                    return self._read(call())

            def losses(noises: Sequence[Terms], other: Callable[[], Any] | None = None) -> Any:
                return self._losses(partial(run, closure if other is None else other), noises)

            yield losses

    def drew(self) -> bool:
        """Whether the last evaluation drew random numbers that are repeated for each."""
        return self._generators is not None and self._generators.moved()

    @property
    def reuses(self) -> bool:
        """Whether blocks run once a step and are skipped in all evaluations but the first."""
        return self._reuse.enabled

    def _losses(self, run: Run, noises: Sequence[Terms]) -> list[Any]:
        losses: list[Any] = [] if self._watched else [self._first(run, noises[0])]
        calls = [partial(run, terms) for terms in noises[len(losses) :]]
        offload = self._offload
        if offload is None or not offload.idle or not self._placement.side_by_side:
            return [*losses, *map(self._repeated, calls)]
        # Side by side, so that each idle block is brought to the device once. Reused blocks do not
        # run in every evaluation: nobody could wait there for the others.
        reused, draws = self._reuse.modules, self._model.training
        blocks = [block.module for block in offload.blocks if block.module not in reused]
        together = partial(_side_by_side, calls, blocks, self._placement, draws)
        return [*losses, *self._repeated(together)]

    def _repeated(self, call: Callable[[], Any]) -> Any:
        """Calls, and calls again without reuse where blocks were skipped that should have run."""
        try:
            return call()
        except ReuseError:
            self._give_up("blocks get other inputs in each evaluation of a step")
            return call()

    def _first(self, run: Run, terms: Terms) -> Any:
        """The loss of the first evaluation of all."""
        # It is watched: parameters that are used without their module are told to the placement.
        # In later steps this would cost a look at every operation.
        placement, reuse = self._placement, self._reuse
        probe = Probe(placement.owners, placement.table, reuse.close)
        with probe.watch():
            loss = run(terms)
        self._watched = True
        if probe.functional:
            reuse.limit()
        if placement.by_module and probe.unread:
            warnings.warn(
                f"the first evaluation did not use {', '.join(sorted(probe.unread)[:5])}"
                f"{' and more' if len(probe.unread) > 5 else ''}: updates will move them at "
                "random. Freeze them (requires_grad=False), unless other batches use them, as "
                "experts of a mixture",
                stacklevel=7,
            )
        if placement.by_module and probe.functional:
            # The loss above is of weights that were perturbed in part, and so is what was kept.
            placement.hold(probe.functional)
            reuse.forget()
            loss = run(terms)
        # Models read their blocks in ways that nothing here can know (hooks inside of them, hidden
        # states of several of them), so reuse is proven on the loss itself before it is relied on.
        if reuse.kept:
            again = self._repeated(partial(run, terms))
            if reuse.enabled and not np.array_equal(again, loss, equal_nan=True):
                self._give_up("it changes the loss: the model reads more of them than their output")
        return loss

    def _give_up(self, why: str) -> None:
        # At the caller of ``step``: behind methods of this file, and torch's wrappers.
        warnings.warn(f"prefix reuse is switched off: {why}", stacklevel=8)
        self._reuse.disable()


@dataclass
class _Waiting:
    """An evaluation that runs beside others, and its state while it waits."""

    greenlet: Any
    waits: int = 0  # how many it has reached
    result: Any = None
    parked: Any = None  # of the placement
    state: ThreadState | None = None


def _side_by_side(
    calls: Sequence[Callable[[], Any]],
    blocks: Sequence[nn.Module],
    placement: Placement,
    draws: bool,
) -> list[Any]:
    """Runs several evaluations side by side, a block of the model at a time; returns their results.

    Each is a greenlet that runs the closure as it is, and with it the model's own forward. Before
    each block it waits until the others have come as far. So all evaluations run through a block
    before the first one enters the next, and weights that are brought to the device for a block are
    brought once. Where they draw, each goes on with its own random numbers. If one raises, the
    others are ended first.
    """
    try:  # optional: only offloading needs it
        from greenlet import getcurrent, greenlet
    except ImportError as error:
        raise ImportError(
            "steps with idle blocks off the device need the package greenlet: pip install "
            "'zorba-kernels[offload]'"
        ) from error
    # Greenlets, not threads: one evaluation runs at a time and always stops at a block, so that
    # hooks, generators and ``.data`` need no locks; and not generators, as the wait is deep in a
    # forward that is not ours.
    running = [_Waiting(greenlet(call)) for call in calls]
    members = {evaluation.greenlet for evaluation in running}

    def wait_and_run(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        current = getcurrent()
        if current in members:
            current.parent.switch()  # until the other evaluations are here too
        return original(*args, **kwargs)

    try:
        with ExitStack() as stack:
            for block in blocks:
                forward = partial(wait_and_run, block.forward)
                stack.enter_context(replaced_forward(block, forward))
            # The one that is furthest behind goes on: all pass a block before one enters the
            # next, also where an evaluation calls a block more often than another one.
            while waiting := [e for e in running if not e.greenlet.dead]:
                _advance(min(waiting, key=lambda e: e.waits), placement, draws)
    finally:
        for evaluation in running:
            # Its ``with`` blocks and hooks must be left here, not when it is collected.
            if not evaluation.greenlet.dead:
                evaluation.greenlet.throw()  # GreenletExit
    return [evaluation.result for evaluation in running]


def _advance(evaluation: _Waiting, placement: Placement, draws: bool) -> None:
    """Lets an evaluation run to its next wait, or to its end."""
    # A greenlet switches the stack of calls, not the state of the thread, and not what the weights
    # show. Without this, one evaluation's ``with torch.autocast(...)`` would hold for the others.
    device = placement.table.device
    outer = ThreadState(device)
    if evaluation.state is not None:
        placement.resume(evaluation.parked)
        evaluation.state.restore()
    try:
        evaluation.result = evaluation.greenlet.switch()  # of one that waits: None
        evaluation.state = ThreadState(device, draws)
    finally:
        outer.restore()
    evaluation.waits += 1
    evaluation.parked = placement.park()
