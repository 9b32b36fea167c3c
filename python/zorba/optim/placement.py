"""Where perturbed weights live: the interface, and the placement that perturbs in place."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

import zorba_kernels as zk
from zorba.optim.interrupt import deferred_interrupts
from zorba.optim.terms import NoiseTerms

PlacementName = Literal["scratch", "inplace"]
PLACEMENTS: tuple[PlacementName, ...] = get_args(PlacementName)


class Placement(ABC):
    """Shows a model perturbed weights, and writes updates.

    Attributes:
        table: the weights; its groups are the rows of every ``NoiseTerms`` given.
        distribution: of the noise.
        kernel_seconds: time spent in passes over weights so far.
        remake: makes the table anew where its parameters have moved; None where they may not.
    """

    def __init__(self, table: zk.ParamTable, distribution: str) -> None:
        self.table = table
        self.distribution = distribution
        self.kernel_seconds = 0.0
        self.remake: Callable[[], zk.ParamTable] | None = None

    @abstractmethod
    def session(self) -> AbstractContextManager[None]:
        """Context of a step. On leaving it, by an exception too, no perturbation is left."""

    @abstractmethod
    def move_to(self, terms: NoiseTerms) -> None:
        """Makes the following forwards see the weights plus ``terms``; inside a session."""

    @abstractmethod
    def update(
        self,
        terms: NoiseTerms,
        rounding: str,
        rounding_seed: int | None = None,
        decay: Tensor | None = None,
        then: NoiseTerms | None = None,
    ) -> None:
        """Writes ``w <- round(w - decay * w + terms)``, w being the unperturbed weights.

        Args:
            terms: what to add.
            rounding: "nearest" or "stochastic".
            rounding_seed: uint64; the first seed of ``terms`` by default.
            decay: float32 [groups], or None.
            then: what the next session moves to first. The weights may be left there, in the same
                pass, until ``settle`` or the next session takes it off again.
        """

    def refresh(self) -> None:
        """Follows parameters that have moved, to a device or another dtype, with ``remake``."""
        if self.remake is not None and not self.table.current:
            self.rebase(self.remake())

    def rebase(self, table: zk.ParamTable) -> None:
        """Works on another table of the same parameters from here on: they have moved."""
        self.table = table

    @abstractmethod
    def settle(self) -> None:
        """Takes off what ``update`` left on the weights for the next session."""

    def _add(
        self,
        terms: NoiseTerms,
        rounding: str = "nearest",
        rounding_seed: int | None = None,
        decay: Tensor | None = None,
    ) -> None:
        started = time.perf_counter()
        zk.add_noise_(
            self.table,
            terms.seeds,
            terms.coefs,
            self.distribution,
            rounding,
            rounding_seed,
            samples=terms.samples,
            decay=decay,
        )
        self.kernel_seconds += time.perf_counter() - started


class InplacePlacement(Placement):
    """Perturbs the weights themselves. No extra memory; restoring rounds, so 16-bit weights drift.

    A central difference costs three passes: perturb, flip, and one that restores and updates; two,
    where that one also perturbs for the next step (``then``).

    Attributes:
        ahead: whether the weights carry what the next session begins with.
    """

    def __init__(self, table: zk.ParamTable, distribution: str) -> None:
        super().__init__(table, distribution)
        self._current = NoiseTerms.none(table.num_groups)
        self.ahead = False

    @contextmanager
    def session(self) -> Iterator[None]:
        """See ``Placement.session``; restores to rounding."""
        self.ahead = False
        try:
            yield
        finally:
            if not self.ahead:
                self.settle()

    def settle(self) -> None:
        """See ``Placement.settle``; one pass, or none where nothing is left."""
        self.refresh()
        self.move_to(NoiseTerms.none(self.table.num_groups))

    def move_to(self, terms: NoiseTerms) -> None:
        """See ``Placement.move_to``; one pass, or none where nothing changes."""
        delta = _difference(terms, self._current)
        with deferred_interrupts():
            if delta.seeds:
                self._add(delta)
            self._current, self.ahead = terms, False

    def update(
        self,
        terms: NoiseTerms,
        rounding: str,
        rounding_seed: int | None = None,
        decay: Tensor | None = None,
        then: NoiseTerms | None = None,
    ) -> None:
        """See ``Placement.update``; restores in the same pass."""
        # Decay acts on what is in memory, the perturbation too: that share of it is gone already.
        kept = 1.0 - (decay.double() if decay is not None else torch.zeros(1).double())
        current = self._current
        left = NoiseTerms(current.seeds, current.samples, current.coefs * kept[:, None])
        target = NoiseTerms.none(self.table.num_groups) if then is None else then
        delta = _difference(terms.plus(target), left)
        with deferred_interrupts():
            self._add(delta, rounding, rounding_seed, decay)
            self._current, self.ahead = target, then is not None


def _difference(target: NoiseTerms, current: NoiseTerms) -> NoiseTerms:
    """Terms that lead from one combination to another, equal noises merged, in a fixed order."""
    merged: dict[tuple[int, int], Tensor] = {}
    for sign, terms in ((-1.0, current), (1.0, target)):
        for k, key in enumerate(zip(terms.seeds, terms.samples, strict=True)):
            column = sign * terms.coefs[:, k].double()
            merged[key] = merged[key] + column if key in merged else column
    kept = {key: column for key, column in merged.items() if bool((column != 0).any())}
    if not kept:
        return NoiseTerms.none(target.coefs.shape[0])
    seeds, samples = zip(*kept, strict=True)
    return NoiseTerms(seeds, samples, torch.stack(list(kept.values()), dim=1).float())
