"""Where perturbed weights live: the interface, and the placement that perturbs in place."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

import zorba_kernels as zk
from zorba.optim.owners import Owner
from zorba.optim.terms import NoiseTerms
from zorba.optim.thread import deferred_interrupts

PlacementName = Literal["scratch", "inplace", "fused"]
PLACEMENTS: tuple[PlacementName, ...] = get_args(PlacementName)


class Placement(ABC):
    """Shows a model perturbed weights, and writes updates."""

    # Weights are perturbed in the forwards of their modules alone, but for those that it ``hold``s.
    by_module: ClassVar[bool] = False
    # Evaluations may take turns within a forward: ``park``, ``resume``.
    side_by_side: ClassVar[bool] = False

    def __init__(
        self, table: zk.ParamTable, distribution: str, owners: Sequence[Owner] = ()
    ) -> None:
        self.table = table  # active weights; its groups are the rows of every NoiseTerms given
        self.distribution = distribution  # of the noise
        self.owners = owners  # modules that hold the weights
        self.kernel_seconds = 0.0  # spent in passes over weights so far

    @abstractmethod
    def session(self) -> AbstractContextManager[None]:
        """Context of a step. On leaving it, by an exception too, no perturbation is left."""

    @abstractmethod
    def move_to(self, terms: Any) -> None:
        """Makes the following forwards see the weights plus ``terms``; inside a session.

        ``NoiseTerms``; ``FusedPlacement`` takes ``RowTerms`` too.
        """

    def update(
        self,
        terms: NoiseTerms,
        rounding: str,
        rounding_seed: int | None = None,
        decay: Tensor | None = None,
        then: NoiseTerms | None = None,
    ) -> None:
        """Writes ``w <- round(w - decay * w + terms)``, w being the unperturbed weights.

        The next session moves to ``then`` first: the weights may be left there, in the same pass,
        until ``restore`` or that session. ``decay`` is float32 [groups]; see ``zk.Program``.
        """
        self._show_weights()  # what is shown perturbed would be refused as moved
        how = self.distribution, rounding, rounding_seed
        program = zk.Program(terms.seeds, terms.coefs, *how, samples=terms.samples, decay=decay)
        self._run(self.table, program)

    def _show_weights(self) -> None:  # noqa: B027
        """Lets parameters read the weights themselves, which a pass is about to write."""

    def restore(self) -> None:  # noqa: B027
        """Takes off what ``update`` left on the weights for the next session."""

    def hold(self, names: Collection[str]) -> None:  # noqa: B027
        """Is told, between evaluations, what is used without the forward of its module."""

    def park(self) -> Any:  # noqa: B027
        """Takes perturbed weights away amid an evaluation; returns what ``resume`` takes."""

    def resume(self, parked: Any) -> None:  # noqa: B027
        """Goes on with an evaluation where ``park`` left it."""

    def refresh(self) -> None:
        """Follows parameters that have moved, to a device or another dtype; between sessions."""
        table = self.table
        if not table.current:
            self.table = table.with_tensors({e.name: e.source for e in table.entries})
            self._find_owners()

    def _find_owners(self) -> None:  # noqa: B027
        """Looks where the parameters of a new table are."""

    def _run(
        self, table: zk.ParamTable, program: zk.Program, out: zk.ParamTable | None = None
    ) -> None:
        """The one place from where a placement's passes go to a kernel."""
        # On a GPU this is the time to launch them: waiting would make every step slower.
        started = time.perf_counter()
        table.run(program, out)
        self.kernel_seconds += time.perf_counter() - started


class ModulePlacement(Placement):
    """Perturbs within the forwards of the modules that hold the weights, by hooks; exact."""

    by_module = True
    side_by_side = True

    def __init__(self, model: nn.Module, table: zk.ParamTable, distribution: str) -> None:
        super().__init__(table, distribution)
        self._model = model
        self._hooks = ExitStack()  # of a session

    @contextmanager
    def session(self) -> Iterator[None]:
        """See ``Placement.session``; exact."""
        try:
            self._enter()
            yield
        finally:
            self._leave()

    @abstractmethod
    def _enter(self) -> None:
        """Hooks the modules."""

    @deferred_interrupts()
    def _leave(self) -> None:
        self._hooks.close()
        self._show_weights()


class InplacePlacement(Placement):
    """Perturbs the weights themselves. No extra memory; restoring rounds, so 16-bit weights drift.

    A central difference costs three passes: perturb, flip, and one that restores and updates; two,
    where that one also perturbs for the next step (``then``): the weights are ``ahead`` until then.
    """

    def __init__(
        self, table: zk.ParamTable, distribution: str, owners: Sequence[Owner] = ()
    ) -> None:
        super().__init__(table, distribution, owners)
        self._current = NoiseTerms.none(table.num_groups)  # on the weights now
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

    # Of both: the pass and the note of where it led belong together. Ctrl-C between them would
    # leave weights perturbed that nobody knows of.
    @deferred_interrupts()
    def move_to(self, terms: NoiseTerms) -> None:
        """See ``Placement.move_to``; one pass, or none where nothing changes."""
        delta = _difference(terms, self._current)
        if delta.seeds:
            super().update(delta, "nearest")
        self._current, self.ahead = terms, False

    @deferred_interrupts()
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
        kept = 1.0 - (torch.zeros(1) if decay is None else decay).double()
        current = self._current
        left = NoiseTerms(current.seeds, current.samples, current.coefs * kept[:, None])
        target = NoiseTerms.none(self.table.num_groups) if then is None else then
        super().update(_difference(terms.plus(target), left), rounding, rounding_seed, decay)
        self._current, self.ahead = target, then is not None

    def guard(self, model: nn.Module) -> Callable[[], None]:
        """Restores weights before the model uses them outside of a step; returns what ends this."""
        # Forwards of the modules that hold active parameters, and both state dicts of all modules:
        # each may be called on a part of the model alone. Within a step weights are never
        # ``ahead``, and the hooks do nothing.
        restore = _Restore(self)
        hooks = ExitStack()
        for owner in self.owners:
            hooks.enter_context(owner.module.register_forward_pre_hook(restore))
        for module in model.modules():
            hooks.enter_context(module.register_state_dict_pre_hook(restore))  # type: ignore[no-untyped-call]
            hooks.enter_context(module.register_load_state_dict_pre_hook(restore))  # type: ignore[no-untyped-call]
        hooks.callback(restore)  # called first: the stack is undone from its end
        return hooks.close


@dataclass
class _Restore:
    """A hook. In a copy of the model it does nothing: the copy's weights are no placement's."""

    placement: InplacePlacement | None = None

    def __call__(self, *arguments: Any) -> None:
        if self.placement is not None and self.placement.ahead:
            self.placement.restore()

    def __reduce__(self) -> tuple[type[_Restore], tuple[()]]:
        # deepcopy and pickle come here: a copy that held the placement would restore the original
        # model, and a placement with its table cannot be pickled at all.
        return _Restore, ()


def _difference(target: NoiseTerms, current: NoiseTerms) -> NoiseTerms:
    """Terms that lead from one combination to another, equal noises merged, in a fixed order."""
    merged: dict[tuple[int, int], Tensor] = {}
    for sign, terms in ((-1.0, current), (1.0, target)):
        for k, key in enumerate(zip(terms.seeds, terms.samples, strict=True)):
            # In float64: eps - lr * g, of very different sizes, is rounded to float32 once.
            merged[key] = merged.get(key, torch.zeros(())) + sign * terms.coefs[:, k].double()
    kept = {key: column for key, column in merged.items() if bool((column != 0).any())}
    if not kept:
        return NoiseTerms.none(target.coefs.shape[0])
    seeds, samples = zip(*kept, strict=True)
    return NoiseTerms(seeds, samples, torch.stack(list(kept.values()), dim=1).float())
