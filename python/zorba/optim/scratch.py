"""The exact placement: perturbed weights are made in a scratch buffer, a module at a time."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import zorba_kernels as zk
from zorba.optim.interrupt import deferred_interrupts
from zorba.optim.owners import Owner, find_owners
from zorba.optim.placement import Placement
from zorba.optim.terms import NoiseTerms


class UnreachedParameterError(RuntimeError):
    """A parameter was to be perturbed, but its module's forward never ran."""


class ScratchPlacement(Placement):
    """Each module's perturbed weights are written to scratch just before its forward.

    The module reads the scratch through its own parameters (their ``.data`` is exchanged for the
    length of the forward), so any module works, tied weights and modules called twice among them.
    The weights themselves are written by ``update`` alone: an evaluation leaves every bit of them
    as it was. Extra memory: the largest module's own active parameters; where owners are nested,
    the largest of each level; and all parameters that ``hold`` names.

    Args:
        model: whose modules are hooked during a session.
        table: its active parameters; names must be the model's canonical ones.
        distribution: of the noise.
    """

    def __init__(self, model: nn.Module, table: zk.ParamTable, distribution: str) -> None:
        super().__init__(table, distribution)
        self._model = model
        self._handles: list[Any] = []
        self._program: zk.Program | None = None
        self._moving: frozenset[int] = frozenset()  # groups that it changes
        self._shown: set[str] = set()
        self._held: set[str] = set()
        self._excused: set[str] = set()
        self._checked = False
        self._set_owners(find_owners(model, table))

    def _set_owners(self, owners: list[Owner]) -> None:
        self._owners = owners
        levels = range(1 + max(owner.level for owner in owners))
        self._level_bytes = [
            max((o.nbytes for o in owners if o.level == level), default=0) for level in levels
        ]
        self._free: list[list[Tensor]] = [[] for _ in levels]

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the buffers that wait for the next forward."""
        return sum(buffer.numel() for buffers in self._free for buffer in buffers)

    def hold(self, names: Collection[str]) -> None:
        """Shows these parameters perturbed during whole evaluations, not only in their forwards.

        For parameters that are used without the forward of their module (a head that multiplies
        with the weight of the embedding). They need scratch of their own during an evaluation.

        Raises:
            ValueError: a name is not in the table.
        """
        unknown = sorted(set(names) - set(self.table.names))
        if unknown:
            raise ValueError(f"the table has no parameters named {unknown}")
        in_session = bool(self._handles)
        self._leave()
        self._program = None
        self._held |= set(names)
        self._set_owners(find_owners(self._model, self.table, self._held))
        if in_session:
            self._enter()

    def rebase(self, table: zk.ParamTable) -> None:
        """See ``Placement.rebase``; outside of a session."""
        self.table = table
        self._checked = False
        self._set_owners(find_owners(self._model, table, self._held))

    def excuse(self, names: Collection[str]) -> None:
        """Says that an evaluation may pass without these parameters: it does not read them.

        Experts of a mixture that no token reaches, for example.
        """
        self._excused |= set(names)

    @contextmanager
    def session(self) -> Iterator[None]:
        """See ``Placement.session``; exact."""
        self._program = None
        try:
            with deferred_interrupts():
                self._enter()
            yield
            self._check_reached()
        finally:
            with deferred_interrupts():
                self._leave()

    def _enter(self) -> None:
        for owner in self._owners:
            if owner.module is not None:
                # In front of hooks that compute with the weights, as weight_norm's.
                before = owner.module.register_forward_pre_hook(self._before(owner), prepend=True)
                self._handles.append(before)
                self._handles.append(
                    owner.module.register_forward_hook(self._after(owner), always_call=True)
                )

    def _leave(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for owner in self._owners:
            owner.depth = 0
            self._put_back(owner)

    def move_to(self, terms: NoiseTerms) -> None:
        """See ``Placement.move_to``; costs nothing until a forward runs."""
        self._check_reached()
        self._moving = frozenset(g for g in range(self.table.num_groups) if terms.active(g))
        # One program for all owners' tables: it is packed, and its backend chosen, once.
        self._program = zk.Program(
            terms.seeds, terms.coefs, self.distribution, samples=terms.samples
        )
        for owner in self._owners:
            owner.depth = 0  # an evaluation that was cut short has not left its modules
            self._put_back(owner)
            if owner.module is None:
                self._show(owner)

    def park(self) -> Any:
        """Takes the perturbed weights away in the middle of an evaluation.

        Returns:
            What ``resume`` needs to go on with it.
        """
        running = [(o, o.depth, o.showing) for o in self._owners if o.depth or o.showing]
        buffers = [None if part is None else part.buffer for _, _, part in running]
        for owner, _, _ in running:
            owner.depth = 0
            self._put_back(owner)
        depths = [(owner, depth) for owner, depth, _ in running]
        program, self._program = self._program, None  # whose evaluation has not reached all yet
        return program, self._moving, depths, buffers

    def resume(self, parked: Any) -> None:
        """Goes on with an evaluation where ``park`` left it, in the same memory."""
        self._program, self._moving, depths, buffers = parked
        for (owner, depth), buffer in zip(depths, buffers, strict=True):
            owner.depth = depth
            if buffer is not None:
                free = self._free[owner.level]
                free.append(free.pop(next(i for i, b in enumerate(free) if b is buffer)))
                self._show(owner)

    def update(
        self,
        terms: NoiseTerms,
        rounding: str,
        rounding_seed: int | None = None,
        decay: Tensor | None = None,
        then: NoiseTerms | None = None,
    ) -> None:
        """See ``Placement.update``; one pass. ``then`` costs nothing here, and changes nothing."""
        self._check_reached()
        for owner in self._owners:
            if owner.module is None:
                self._put_back(owner)
        self._add(terms, rounding, rounding_seed, decay)

    def settle(self) -> None:
        """See ``Placement.settle``; there is never anything to do."""

    def _check_reached(self) -> None:
        """Once, after the first perturbed evaluation: did every active module run?

        A parameter that is used without its module's forward would be updated along a direction
        that the losses never saw.
        """
        if self._checked or self._program is None or not self._moving:
            return
        active = [o for o in self._owners if not self._moving.isdisjoint(o.groups)]
        reached = {name for o in active if o.reached for name in o.parameters} | self._excused
        missed = [n for o in active for n in o.parameters if n not in reached]
        if missed:
            raise UnreachedParameterError(
                f"the forward of these parameters' modules never ran: {', '.join(missed[:5])}"
                f"{' and more' if len(missed) > 5 else ''}. Are they used by another module "
                "directly? Then hold() them. Are they not used? Then freeze them "
                "(requires_grad=False) or excuse() them"
            )
        self._checked = True

    def _before(self, owner: Owner) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            del module, args
            owner.depth += 1
            if owner.depth == 1:
                self._show(owner)

        return hook

    def _after(self, owner: Owner) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            del module, args
            owner.depth = max(0, owner.depth - 1)
            if owner.depth or owner.showing is None:
                return None
            kept = _own(output, owner.showing.buffer)
            self._put_back(owner)
            return kept

        return hook

    def _show(self, owner: Owner) -> None:
        if self._moving.isdisjoint(owner.groups):
            return
        assert self._program is not None
        owner.reached = True
        # A module around this one may show some of its parameters already: tied weights.
        part = owner.without(self._shown)
        if part is None:
            return
        started = time.perf_counter()
        owner.showing = part
        part.buffer = self._take(owner.level)
        part.table.run(self._program, part.target(part.buffer))
        part.show()
        self._shown |= part.parameters.keys()
        self.kernel_seconds += time.perf_counter() - started

    def _take(self, level: int) -> Tensor:
        if self._free[level]:
            return self._free[level].pop()
        size = self._level_bytes[level]
        return torch.empty(size, dtype=torch.uint8, device=self.table.device)

    def _put_back(self, owner: Owner) -> None:
        part = owner.showing
        buffer = None if part is None else part.put_back()
        if part is not None and buffer is not None:
            self._shown -= part.parameters.keys()
            self._free[owner.level].append(buffer)
        owner.showing = None


def _own(output: Any, buffer: Tensor | None) -> Any:
    """The output of a forward, with copies of what are views of its perturbed weights."""
    if isinstance(output, Tensor):
        inside = (
            buffer is not None
            and output.layout == torch.strided
            and output.device == buffer.device
            and 0 <= output.data_ptr() - buffer.data_ptr() < buffer.nbytes
        )
        return output.clone() if inside else output
    if type(output) in (tuple, list):
        return type(output)(_own(value, buffer) for value in output)
    if isinstance(output, dict):
        for name, value in output.items():
            kept = _own(value, buffer)
            if kept is not value:
                output[name] = kept
    return output
