"""Evaluates a closure at perturbed weights, and finds out what need not run again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from zorba.offload import Offload
from zorba.optim.generators import GeneratorState
from zorba.optim.interrupt import Gate, deferred_interrupts
from zorba.optim.lockstep import Lockstep
from zorba.optim.placement import Placement
from zorba.optim.probe import Probe
from zorba.optim.reuse import PrefixReuse, ReuseError
from zorba.optim.terms import NoiseTerms

Closure = Callable[[], Any]
Read = Callable[[Any], Any]
T = TypeVar("T")


class Evaluator:
    """Evaluates closures on a model, a step at a time.

    Args:
        model: what the closures run.
        placement: of its active parameters.
        prefix_reuse: whether to reuse what no perturbation can reach.
        read: makes a number of what a closure returns, or an array of one loss an example.
    """

    def __init__(
        self,
        model: nn.Module,
        placement: Placement,
        prefix_reuse: bool,
        read: Read = float,
    ) -> None:
        self._model = model
        self._placement = placement
        self._read = read
        self._reuse = PrefixReuse(model, placement.table, placement.owners)
        if not prefix_reuse:
            self._reuse.disable()
        # In place and without reuse it does not matter how the closure uses its parameters.
        self._watched = not (placement.by_module or self._reuse.enabled)
        self._offload = Offload.of(model)

    @contextmanager
    def step(self, closure: Closure) -> Iterator[StepEvaluation]:
        """Context of a step; model and weights are as before on leaving it, but for updates.

        Ctrl-C reaches the closure. Elsewhere it waits, at the longest until the step is done.
        """
        with deferred_interrupts() as gate, ExitStack() as stack:
            # Autocast's copies are of perturbed weights: no forward behind the step may find them.
            stack.callback(torch.clear_autocast_cache)
            # Blocks first on the way in, last on the way out: placements and reuse then only meet
            # parameters that point to their host weights.
            if self._offload is not None:
                stack.enter_context(self._offload.streaming())
            stack.enter_context(self._placement.session())
            stack.enter_context(self._reuse.session(self._placement.table.device))
            yield StepEvaluation(self, closure, gate)

    def lockstep(self) -> Lockstep | None:
        """Returns what runs evaluations side by side, where that saves bringing idle blocks."""
        offload = self._offload
        if offload is None or not offload.idle or not self._placement.side_by_side:
            return None
        # Reused blocks do not run in every evaluation: nobody could wait there for the others.
        reused = self._reuse.modules
        blocks = [block.module for block in offload.blocks if block.module not in reused]
        return Lockstep(blocks, self._placement)


class StepEvaluation:
    """Evaluates one closure at the weights plus some noises, for the length of a step."""

    def __init__(self, evaluator: Evaluator, closure: Closure, gate: Gate) -> None:
        self._evaluator = evaluator
        self._model = evaluator._model
        self._placement = evaluator._placement
        self._reuse = evaluator._reuse
        self._closure = closure
        self._gate = gate
        device = self._placement.table.device
        self._generators = GeneratorState(device) if self._model.training else None

    def losses(self, noises: Sequence[NoiseTerms]) -> list[Any]:
        """Returns the loss at each noise, as ``read`` returns it.

        Where idle blocks are off the device all evaluations run side by side, so that each block
        is brought once; else one after the other.
        """
        losses = []
        if not self._evaluator._watched:
            losses.append(self._first(noises[0]))
        rest = noises[len(losses) :]
        lockstep = self._evaluator.lockstep()
        if lockstep is None:
            return losses + [self._at(terms) for terms in rest]
        calls = [partial(self._run, terms) for terms in rest]
        draws = self._generators is not None
        return losses + self._repeated(partial(lockstep.run, calls, draws))

    def _at(self, terms: NoiseTerms) -> Any:
        """The loss at a noise."""
        return self._repeated(partial(self._run, terms))

    def _run(self, terms: NoiseTerms) -> Any:
        """One call of the closure."""
        self._placement.move_to(terms)
        # Autocast keeps its copies of weights by their tensors: they would miss a perturbation.
        torch.clear_autocast_cache()
        if self._generators is not None:
            self._generators.rewind()
        self._reuse.begin()
        # The closure is the caller's code: there Ctrl-C may stop it, as it may hang.
        with self._gate.open():
            return self._evaluator._read(self._closure())

    def _repeated(self, call: Callable[[], T]) -> T:
        """Calls, and calls again without reuse where blocks were skipped that should have run."""
        try:
            return call()
        except ReuseError:
            self._give_up("blocks get other inputs in each evaluation of a step")
            return call()

    def _first(self, terms: NoiseTerms) -> Any:
        """The loss of the first evaluation of all."""
        # It is watched: parameters that are used without their module are told to the placement.
        # In later steps this would cost a look at every operation.
        placement = self._placement
        probe = Probe(placement.owners, placement.table, on_functional=self._reuse.close)
        with probe.watch():
            loss = self._run(terms)
        self._evaluator._watched = True
        if probe.functional:
            self._reuse.limit()
        if placement.by_module and probe.unread:
            _warn(
                f"the first evaluation did not use {', '.join(sorted(probe.unread)[:5])}"
                f"{' and more' if len(probe.unread) > 5 else ''}: updates will move them at "
                "random. Freeze them (requires_grad=False), unless other batches use them, as "
                "experts of a mixture"
            )
        if placement.learn(probe.functional, probe.unread):
            # The loss above is of weights that were perturbed in part, and so is what was kept.
            self._reuse.restart()
            loss = self._at(terms)
        return self._proven(loss, terms)

    def _proven(self, loss: Any, terms: NoiseTerms) -> Any:
        """Evaluates again with reuse, where there is any, until the bits are equal without it."""
        # Models read their blocks in ways that nothing here can know (hooks inside of them, skips
        # between them), so reuse is proven on the loss itself before it is relied on. If it fails,
        # more is kept; if it fails again, reuse is given up.
        reuse = self._reuse
        while reuse.kept:
            again = self._at(terms)
            if _bits(again) == _bits(loss) or not reuse.enabled:
                break
            if reuse.everything:
                self._give_up("it changes the loss: the model reads more of them than their output")
                break
            reuse.everything = True  # the output of each block, not of the last one alone
            reuse.restart()
            loss = self._at(terms)
        return loss

    def _give_up(self, why: str) -> None:
        _warn(f"prefix reuse is switched off: {why}")
        self._reuse.disable()


def _warn(message: str) -> None:
    # At the caller of ``step``: behind a method of this file for each level, and torch's wrappers.
    warnings.warn(message, stacklevel=7)


def _bits(loss: Any) -> bytes:
    numbers = np.asarray(loss, dtype=np.float64)
    return np.where(np.isnan(numbers), np.nan, numbers).tobytes()  # one NaN for all of them
