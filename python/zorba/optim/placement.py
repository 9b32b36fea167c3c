"""Where perturbed weights live: the interface, and the placement that perturbs in place."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

import zorba_kernels as zk
from zorba.optim.interrupt import deferred_interrupts
from zorba.optim.owners import Owner
from zorba.optim.terms import NoiseTerms

PlacementName = Literal["scratch", "inplace"]
PLACEMENTS: tuple[PlacementName, ...] = get_args(PlacementName)


class Placement(ABC):
    """Shows a model perturbed weights, and writes updates.

    Args:
        table: the active weights.
        distribution: of the noise.
        owners: modules that hold them; see ``find_owners``.

    Attributes:
        table: the weights; its groups are the rows of every ``NoiseTerms`` given.
        distribution: of the noise.
        owners: modules that hold the parameters.
        kernel_seconds: time spent in passes over weights so far.
        remake: makes the table anew where its parameters have moved; None where they may not.
        by_module: whether weights are perturbed in the forwards of their modules alone, so that it
            must ``learn`` which of them a closure uses elsewhere.
        side_by_side: whether evaluations may take turns within a forward: ``park``, ``resume``.
    """

    by_module: ClassVar[bool] = False
    side_by_side: ClassVar[bool] = False

    def __init__(
        self, table: zk.ParamTable, distribution: str, owners: Sequence[Owner] = ()
    ) -> None:
        self.table = table
        self.distribution = distribution
        self.owners = owners
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
            then: where the next session moves to first. The weights may be left there, in the same
                pass, until ``restore`` or the next session takes it off again.
        """

    def restore(self) -> None:  # noqa: B027
        """Takes off what ``update`` left on the weights for the next session."""

    def learn(self, functional: Collection[str], unread: Collection[str]) -> bool:
        """Is told how an evaluation used the parameters.

        Args:
            functional: names of those that were used without the forward of their module.
            unread: names of those that were not used.

        Returns:
            Whether the evaluation must be made again, as it did not see all of them perturbed.
        """
        del functional, unread
        return False

    def park(self) -> Any:
        """Takes perturbed weights away in the middle of an evaluation; see ``side_by_side``.

        Returns:
            What ``resume`` needs to go on with it.
        """
        raise NotImplementedError(f"{type(self).__name__} shows one evaluation at a time")

    def resume(self, parked: Any) -> None:
        """Goes on with an evaluation where ``park`` left it."""
        raise NotImplementedError(f"{type(self).__name__} shows one evaluation at a time")

    def refresh(self) -> None:
        """Follows parameters that have moved, to a device or another dtype, with ``remake``."""
        if self.remake is not None and not self.table.current:
            self.rebase(self.remake())

    def rebase(self, table: zk.ParamTable) -> None:
        """Works on another table of the same parameters from here on: they have moved."""
        self.table = table

    def _add(
        self,
        terms: NoiseTerms,
        rounding: str = "nearest",
        rounding_seed: int | None = None,
        decay: Tensor | None = None,
    ) -> None:
        """Adds terms to the weights themselves, in one pass."""
        program = zk.Program(
            terms.seeds,
            terms.coefs,
            self.distribution,
            rounding,
            rounding_seed,
            samples=terms.samples,
            decay=decay,
        )
        self._run(self.table, program)

    def _run(
        self, table: zk.ParamTable, program: zk.Program, out: zk.ParamTable | None = None
    ) -> None:
        """The one place from where a placement's passes go to a kernel."""
        # On a GPU this is the time to launch them: waiting would make every step slower.
        started = time.perf_counter()
        table.run(program, out)
        self.kernel_seconds += time.perf_counter() - started


class InplacePlacement(Placement):
    """Perturbs the weights themselves. No extra memory; restoring rounds, so 16-bit weights drift.

    A central difference costs three passes: perturb, flip, and one that restores and updates; two,
    where that one also perturbs for the next step (``then``).

    Attributes:
        ahead: whether the weights carry what the next session begins with.
    """

    def __init__(
        self, table: zk.ParamTable, distribution: str, owners: Sequence[Owner] = ()
    ) -> None:
        super().__init__(table, distribution, owners)
        self._current = NoiseTerms.none(table.num_groups)
        self.ahead = False

    @contextmanager
    def session(self) -> Iterator[None]:
        """See ``Placement.session``; restores to rounding."""
        # From here on what was left ahead is a perturbation like any other: if the closure raises
        # before it moves, it must come off.
        self.ahead = False
        try:
            yield
        finally:
            if not self.ahead:
                self.restore()

    def restore(self) -> None:
        """See ``Placement.restore``; one pass, or none where nothing is left."""
        self.refresh()
        self.move_to(NoiseTerms.none(self.table.num_groups))

    def move_to(self, terms: NoiseTerms) -> None:
        """See ``Placement.move_to``; one pass, or none where nothing changes."""
        delta = _difference(terms, self._current)
        # The pass and the note of where it led belong together: Ctrl-C between them would leave
        # weights perturbed that nobody knows of.
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
            # In float64: eps - lr * g, of very different sizes, is rounded to float32 once.
            column = sign * terms.coefs[:, k].double()
            merged[key] = merged[key] + column if key in merged else column
    kept = {key: column for key, column in merged.items() if bool((column != 0).any())}
    if not kept:
        return NoiseTerms.none(target.coefs.shape[0])
    seeds, samples = zip(*kept, strict=True)
    return NoiseTerms(seeds, samples, torch.stack(list(kept.values()), dim=1).float())
