"""Evaluates a closure at perturbed weights, and finds out what need not run again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zorba.offload import Offload
from zorba.optim.estimator import Evaluate
from zorba.optim.generators import GeneratorState
from zorba.optim.interrupt import Gate
from zorba.optim.lockstep import Lockstep
from zorba.optim.placement import Placement
from zorba.optim.probe import Probe
from zorba.optim.reuse import PrefixReuse, ReuseError
from zorba.optim.scratch import ScratchPlacement
from zorba.optim.terms import NoiseTerms

Closure = Callable[[], float | Tensor]
Losses = list[Any]


class Evaluator:
    """Evaluates closures for an optimizer.

    The first evaluation of all is watched: parameters that are used without their module are held,
    and it is made again. Where blocks can be reused, it is also made again with reuse, and must
    give the same bits; otherwise more is kept, and at last reuse is given up.

    Args:
        model: what the closures run.
        placement: of its active parameters.
        prefix_reuse: whether to reuse what no perturbation can reach.
        read: makes a number of what a closure returns, or an array of numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        placement: Placement,
        prefix_reuse: bool,
        read: Callable[[Any], Any] = float,
    ) -> None:
        self._model = model
        self._placement = placement
        self._read = read
        self._reuse = PrefixReuse(model, placement.table)
        if not prefix_reuse:
            self._reuse.disable()
        in_place = not isinstance(placement, ScratchPlacement)
        self._probed = in_place and not self._reuse.enabled
        self._offload = Offload.of(model)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Context of a step; model and weights are as before on leaving it, but for updates."""
        device = self._placement.table.device
        try:
            with ExitStack() as stack:
                if self._offload is not None:
                    stack.enter_context(self._offload.streaming())
                stack.enter_context(self._placement.session())
                stack.enter_context(self._reuse.session(device))
                yield
        finally:
            torch.clear_autocast_cache()

    def of(self, closure: Closure, gate: Gate) -> Evaluate:
        """Returns what gives the closure's losses at the weights plus some noises.

        Where idle blocks are off the device all evaluations run side by side, so that each block
        is brought once; else one after the other.

        Args:
            closure: see ``ZerothOrderSGD.step``.
            gate: opened while it runs.
        """
        device = self._placement.table.device
        generators = GeneratorState(device) if self._model.training else None

        def run(terms: NoiseTerms) -> Any:
            self._placement.move_to(terms)
            # Autocast keeps its copies of weights by their tensors: they would miss a perturbation.
            torch.clear_autocast_cache()
            if generators is not None:
                generators.rewind()
            self._reuse.begin()
            with gate.open():
                return self._read(closure())

        def attempt(calls: Callable[[], Losses]) -> Losses:
            try:
                return calls()
            except ReuseError:
                self._give_up("blocks get other inputs in each evaluation of a step")
                return calls()

        def alone(terms: NoiseTerms) -> Any:
            return attempt(lambda: [run(terms)])[0]

        def first(terms: NoiseTerms) -> Any:
            probe = Probe(self._model, self._placement.table, on_functional=self._reuse.close)
            with probe.watch():
                loss = run(terms)
            self._probed = True
            if self._learn(probe):
                self._reuse.restart()
                loss = alone(terms)
            return self._prove(loss, lambda: alone(terms))

        def evaluate(noises: Sequence[NoiseTerms]) -> Losses:
            losses = [] if self._probed else [first(noises[0])]
            rest = noises[len(losses) :]
            lockstep = self._lockstep()
            if lockstep is None:
                return losses + [alone(terms) for terms in rest]
            return losses + attempt(
                lambda: lockstep.run([partial(run, t) for t in rest], generators is not None)
            )

        return evaluate

    def _lockstep(self) -> Lockstep | None:
        """Returns what runs evaluations side by side, where that saves bringing idle blocks."""
        offload, placement = self._offload, self._placement
        if offload is None or not offload.idle or not isinstance(placement, ScratchPlacement):
            return None
        reused = self._reuse.modules
        blocks = [block.module for block in offload.blocks if block.module not in reused]
        return Lockstep(blocks, placement)

    def _learn(self, probe: Probe) -> bool:
        """Takes in how parameters are used; returns whether the evaluation did not see them all."""
        if probe.functional:
            self._reuse.limit()
        if not isinstance(self._placement, ScratchPlacement):
            return False
        if probe.unread:
            names = sorted(probe.unread)
            warnings.warn(
                f"the first evaluation did not use {', '.join(names[:5])}"
                f"{' and more' if len(names) > 5 else ''}: updates will move them at random. "
                "Freeze them (requires_grad=False), unless other batches use them, as experts of a "
                "mixture",
                stacklevel=6,
            )
            self._placement.excuse(probe.unread)
        if probe.functional:
            self._placement.hold(probe.functional)
        return bool(probe.functional)

    def _prove(self, loss: Any, attempt: Callable[[], Any]) -> Any:
        """Evaluates again with reuse, where there is any, until the bits are equal without it."""
        while self._reuse.kept:
            again = attempt()
            if _bits(again) == _bits(loss) or not self._reuse.enabled:
                break
            if self._reuse.everything:
                self._give_up("it changes the loss: the model reads more of them than their output")
                break
            self._reuse.everything = True  # the output of each block, not of the last one alone
            self._reuse.restart()
            loss = attempt()
        return loss

    def _give_up(self, why: str) -> None:
        warnings.warn(f"prefix reuse is switched off: {why}", stacklevel=6)
        self._reuse.disable()


def _bits(loss: Any) -> bytes:
    numbers = np.asarray(loss, dtype=np.float64)
    return np.where(np.isnan(numbers), np.nan, numbers).tobytes()
