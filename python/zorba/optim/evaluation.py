"""Evaluates a closure at perturbed weights, and finds out what need not run again."""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zorba.optim.generators import GeneratorState
from zorba.optim.interrupt import Gate
from zorba.optim.placement import Placement
from zorba.optim.probe import Probe
from zorba.optim.reuse import PrefixReuse, ReuseError
from zorba.optim.scratch import ScratchPlacement
from zorba.optim.terms import NoiseTerms

Closure = Callable[[], float | Tensor]


class Evaluator:
    """Evaluates closures for an optimizer.

    The first evaluation of all is watched: parameters that are used without their module are held,
    and it is made again. Where blocks can be reused, it is also made again with reuse, and must
    give the same bits; otherwise more is kept, and at last reuse is given up.

    Args:
        model: what the closures run.
        placement: of its active parameters.
        prefix_reuse: whether to reuse what no perturbation can reach.
    """

    def __init__(self, model: nn.Module, placement: Placement, prefix_reuse: bool) -> None:
        self._model = model
        self._placement = placement
        self._reuse = PrefixReuse(model, placement.table)
        if not prefix_reuse:
            self._reuse.disable()
        in_place = not isinstance(placement, ScratchPlacement)
        self._probed = in_place and not self._reuse.enabled

    @contextmanager
    def session(self) -> Iterator[None]:
        """Context of a step; model and weights are as before on leaving it, but for updates."""
        try:
            with self._placement.session(), self._reuse.session(self._placement.table.device):
                yield
        finally:
            torch.clear_autocast_cache()

    def of(self, closure: Closure, gate: Gate) -> Callable[[NoiseTerms], float]:
        """Returns what gives the closure's loss at the weights plus some noise.

        Args:
            closure: see ``ZerothOrderSGD.step``.
            gate: opened while it runs.
        """
        device = self._placement.table.device
        generators = GeneratorState(device) if self._model.training else None

        def run() -> float:
            # Autocast keeps its copies of weights by their tensors: they would miss a perturbation.
            torch.clear_autocast_cache()
            if generators is not None:
                generators.rewind()
            self._reuse.begin()
            with gate.open():
                return float(closure())

        def attempt(terms: NoiseTerms) -> float:
            self._placement.move_to(terms)
            try:
                return run()
            except ReuseError:
                self._give_up("blocks get other inputs in each evaluation of a step")
                self._placement.move_to(terms)
                return run()

        def evaluate(terms: NoiseTerms) -> float:
            if self._probed:
                return attempt(terms)
            self._placement.move_to(terms)
            probe = Probe(self._model, self._placement.table, on_functional=self._reuse.close)
            with probe.watch():
                loss = run()
            self._probed = True
            if self._learn(probe):
                self._reuse.restart()
                loss = attempt(terms)
            return self._prove(loss, lambda: attempt(terms))

        return evaluate

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

    def _prove(self, loss: float, attempt: Callable[[], float]) -> float:
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


def _bits(loss: float) -> bytes:
    return struct.pack("<d", math.nan if math.isnan(loss) else loss)
