"""The exact placement: perturbed weights are made in a scratch buffer, a module at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import zorba_kernels as zk
from zorba.forward import replaced_forward
from zorba.optim.owners import Owner, find_owners
from zorba.optim.placement import ModulePlacement
from zorba.optim.terms import NoiseTerms
from zorba.optim.thread import deferred_interrupts
from zorba_kernels.rows import RowsTable


class ScratchPlacement(ModulePlacement):
    """Each module's perturbed weights are written to scratch just before its forward.

    The module reads the scratch through its own parameters (their ``.data`` is exchanged for the
    length of the forward), so any module works, tied weights and modules called twice among them.
    The weights themselves are written by ``update`` alone: an evaluation leaves every bit of them
    as it was. Extra memory: the largest module's own active parameters; where modules with active
    parameters are nested, the largest of each level; and all parameters that ``hold`` names. Of an
    ``nn.Embedding`` whose weight nothing else uses, only the rows that a batch reads are made.
    Names of the table must be the model's canonical ones.
    """

    def __init__(self, model: nn.Module, table: zk.ParamTable, distribution: str) -> None:
        super().__init__(model, table, distribution)
        self._program: zk.Program  # of the evaluation that runs
        self._moving: frozenset[int] = frozenset()  # groups that it changes
        self._held: set[str] = set()
        self._embeddings: set[nn.Module] = set()  # of which the rows in use are made
        self._find_owners()

    def _find_owners(self) -> None:
        self.owners = find_owners(self._model, self.table, self._held)
        self._owner_of = {owner.module: owner for owner in self.owners if not owner.held}
        # Siblings run one after the other and share a buffer; a module that runs inside of another
        # one's forward needs its own beside it. So there is one size a level.
        levels = range(1 + max(owner.level for owner in self.owners))
        whole = [o for o in self.owners if o.held or o.module not in self._embeddings]
        self._sizes = [max((o.nbytes for o in whole if o.level == n), default=0) for n in levels]
        self._free: list[list[Tensor]] = [[] for _ in levels]

    def hold(self, names: Collection[str]) -> None:
        """See ``Placement.hold``: perturbed for whole evaluations, in scratch of their own."""
        self._show_weights()
        self._moving = frozenset()
        self._held |= set(names)
        self._find_owners()

    @deferred_interrupts()
    def _enter(self) -> None:
        self._moving = frozenset()
        register = self._hooks.enter_context
        # Looked at in each step: hooks of others may have come, or the model may be tied by now.
        embeddings = _embeddings(self.owners)
        if embeddings != self._embeddings:
            self._embeddings = embeddings
            self._find_owners()
        for module in self._owner_of:
            if module in embeddings:
                forward = partial(self._rows_in_use, module, module.forward)
                register(replaced_forward(module, forward))
                continue
            # In front of hooks that compute with the weights, as weight_norm's: they must find
            # perturbed ones. Behind a forward that raises too, or its parameters would keep
            # reading scratch.
            register(module.register_forward_pre_hook(self._before, prepend=True))
            register(module.register_forward_hook(self._after, always_call=True))

    def move_to(self, terms: NoiseTerms) -> None:
        """See ``Placement.move_to``; costs nothing until a forward runs."""
        self._show_weights()
        self._moving = frozenset(g for g in range(self.table.num_groups) if terms.active(g))
        # Made once for all modules: checking and packing the terms costs more than a small pass.
        how = self.distribution
        self._program = zk.Program(terms.seeds, terms.coefs, how, samples=terms.samples)
        for owner in self.owners:
            if owner.held:
                self._show(owner)

    def park(self) -> Any:
        """See ``Placement.park``."""
        shown = [(owner, owner.depth, owner.buffer, owner.before) for owner in self.owners]
        self._show_weights()
        return self._program, self._moving, shown

    def resume(self, parked: Any) -> None:
        """See ``Placement.resume``; in the same memory."""
        self._program, self._moving, shown = parked
        for owner, depth, buffer, before in shown:
            owner.depth = depth
            if buffer is not None:
                # The values are made again, others may have used the buffer. But it must be the
                # same one: the forward that waits may hold a view of it.
                free = self._free[owner.level]
                free[:] = [other for other in free if other is not buffer]
                self._show(owner, buffer)
                owner.before = before

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        owner = self._owner_of.get(module)  # none where all its parameters are held by now
        if owner is not None:
            owner.depth += 1
            if owner.depth == 1:
                self._show(owner)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        owner = self._owner_of.get(module)
        if owner is None:
            return None
        owner.depth = max(0, owner.depth - 1)
        if owner.depth or owner.buffer is None:
            return None
        kept = _outside(output, owner.buffer)
        self._put_back(owner, owner.before)
        return kept

    def _rows_in_use(
        self, module: nn.Module, forward: Callable[..., Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The forward of an embedding, from copies of the rows that it reads."""
        owner = self._owner_of.get(module)
        ids: Tensor = args[0] if args else kwargs["input"]
        if owner is None or self._moving.isdisjoint(owner.groups) or not ids.numel():
            return forward(*args, **kwargs)
        numbers, places = torch.unique(ids, return_inverse=True)
        (entry,) = owner.table.entries
        rows = RowsTable(entry, numbers, self.table.num_groups)
        self._run(rows, self._program)
        return nn.functional.embedding(places, rows.tensor)

    def _show(self, owner: Owner, buffer: Tensor | None = None) -> None:
        """Writes an owner's perturbed weights to scratch, and lets its parameters read it."""
        if self._moving.isdisjoint(owner.groups):
            return
        if buffer is None:
            free, size = self._free[owner.level], self._sizes[owner.level]
            device = self.table.device
            buffer = free.pop() if free else torch.empty(size, dtype=torch.uint8, device=device)
        table, views = owner.target(buffer)
        # Noted before the pass: if it raises, ``_leave`` gives the buffer back.
        owner.buffer, owner.before = buffer, owner.shown()
        self._run(owner.table, self._program, table)
        owner.point_to(views)

    def _put_back(self, owner: Owner, tensors: list[Tensor]) -> None:
        # Ctrl-C may stop a closure anywhere in here, and ``_leave`` does it again: it may cost a
        # buffer, and must not put one back twice or leave a parameter pointing to it.
        owner.point_to(tensors)
        buffer, owner.buffer = owner.buffer, None
        if buffer is not None:
            self._free[owner.level].append(buffer)

    def _show_weights(self) -> None:
        for owner in self.owners:
            owner.depth = 0  # an evaluation that was cut short has not left its modules
            if owner.buffer is not None:
                self._put_back(owner, owner.weights)


def _embeddings(owners: Sequence[Owner]) -> set[nn.Module]:
    """Those whose forward looks rows of their own weight up, and does nothing else."""
    uses = Counter(name for owner in owners for name in owner.names)
    return {
        owner.module
        for owner in owners
        if isinstance(module := owner.module, nn.Embedding)
        and not owner.held
        and type(module).forward is nn.Embedding.forward
        # A forward on the instance, and hooks, may read the weight.
        and "forward" not in vars(module)
        and not (module._forward_pre_hooks or module._forward_hooks)
        and module.max_norm is None  # writes the weight
        and not (module.sparse or module.scale_grad_by_freq)
        and owner.local_names == ["weight"]
        and uses[owner.parameter_names[0]] == 1  # not tied
    }


def _outside(output: Any, buffer: Tensor) -> Any:
    """The output of a forward, with copies of views of its perturbed weights."""
    # The next module's weights will be written to the buffer while such a view is still in use.
    if isinstance(output, Tensor):
        dense = output.layout == torch.strided  # others have no address
        inside = dense and 0 <= output.data_ptr() - buffer.data_ptr() < buffer.nbytes
        return output.clone() if inside else output
    if type(output) in (tuple, list):
        return type(output)(_outside(value, buffer) for value in output)
    if isinstance(output, dict):
        # In place, for subclasses: a ModelOutput is a dict whose attributes follow its items.
        for name, value in output.items():
            kept = _outside(value, buffer)
            if kept is not value:
                output[name] = kept
    return output
