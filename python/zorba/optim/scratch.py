"""The exact placement: perturbed weights are made in a scratch buffer, a module at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
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
    as it was. Extra memory: the largest module's own active parameters; where modules with active
    parameters are nested, the largest of each level; and all parameters that ``hold`` names.

    Args:
        model: whose modules are hooked during a session.
        table: its active parameters; names must be the model's canonical ones.
        distribution: of the noise.
    """

    by_module = True
    side_by_side = True

    def __init__(self, model: nn.Module, table: zk.ParamTable, distribution: str) -> None:
        super().__init__(table, distribution, find_owners(model, table))
        self._model = model
        self._hooks = ExitStack()
        self._in_session = False
        self._program: zk.Program | None = None  # of the evaluation that runs
        self._moving: frozenset[int] = frozenset()  # groups that it changes
        self._shown: set[str] = set()  # names of parameters that read scratch now
        self._held: set[str] = set()
        self._excused: set[str] = set()
        self._checked = False
        self._make_sites()

    def _make_sites(self) -> None:
        """Places where parameters read scratch: the owners, and one for those that are held."""
        parts = [owner.without(self._held) for owner in self.owners]
        self._sites = [part for part in parts if part is not None]
        # Siblings run one after the other and share a buffer; a module that runs inside of another
        # one's forward needs its own beside it. So there is one size a level.
        whole: dict[str, list[nn.Parameter]] = {}
        for owner in self.owners:
            for name in owner.parameters.keys() & self._held:
                whole.setdefault(name, []).extend(owner.parameters[name])
        if whole:
            level = 1 + max((site.level for site in self._sites), default=-1)
            self._sites.append(Owner(self._model, whole, self.table, level, held=True))
        self._level_bytes = [0] * (1 + max(site.level for site in self._sites))
        for site in self._sites:
            self._level_bytes[site.level] = max(self._level_bytes[site.level], site.nbytes)
        self._free: list[list[Tensor]] = [[] for _ in self._level_bytes]

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
        in_session = self._in_session
        self._leave()
        self._program = None
        self._held |= set(names)
        self._make_sites()
        if in_session:
            self._enter()

    def excuse(self, names: Collection[str]) -> None:
        """Says that an evaluation may pass without these parameters: it does not read them.

        Experts of a mixture that no token reaches, for example.
        """
        self._excused |= set(names)

    def learn(self, functional: Collection[str], unread: Collection[str]) -> bool:
        """See ``Placement.learn``: ``hold`` what is functional, ``excuse`` what is unread."""
        self.excuse(unread)
        if functional:
            self.hold(functional)
        return bool(functional)

    def rebase(self, table: zk.ParamTable) -> None:
        """See ``Placement.rebase``; outside of a session."""
        super().rebase(table)
        self.owners = find_owners(self._model, table)
        self._checked = False
        self._make_sites()

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
        self._in_session = True
        for site in self._sites:
            if site.held:
                continue
            # In front of hooks that compute with the weights, as weight_norm's: they must find
            # perturbed ones. Behind a forward that raises too, or its parameters would keep
            # reading scratch.
            before, after = partial(self._before, site), partial(self._after, site)
            register = self._hooks.enter_context
            register(site.module.register_forward_pre_hook(before, prepend=True))
            register(site.module.register_forward_hook(after, always_call=True))

    def _leave(self) -> None:
        self._hooks.close()
        self._in_session = False
        self._put_all_back()

    def _put_all_back(self) -> None:
        for site in self._sites:
            site.depth = 0  # an evaluation that was cut short has not left its modules
            self._put_back(site)

    def move_to(self, terms: NoiseTerms) -> None:
        """See ``Placement.move_to``; costs nothing until a forward runs."""
        self._check_reached()
        self._moving = frozenset(g for g in range(self.table.num_groups) if terms.active(g))
        # Made once for all modules: checking and packing the terms costs more than a small pass.
        self._program = zk.Program(
            terms.seeds, terms.coefs, self.distribution, samples=terms.samples
        )
        self._put_all_back()
        for site in self._sites:
            if site.held:
                self._show(site)

    def park(self) -> Any:
        """See ``Placement.park``."""
        parked = [
            (site, site.depth, site.shown) for site in self._sites if site.depth or site.shown
        ]
        self._put_all_back()
        program, self._program = self._program, None  # whose evaluation has not reached all yet
        return program, self._moving, parked

    def resume(self, parked: Any) -> None:
        """See ``Placement.resume``; in the same memory."""
        self._program, self._moving, sites = parked
        for site, depth, shown in sites:
            site.depth = depth
            if shown is not None:
                # The values are made again, others may have used the buffer. But it must be the
                # same one: the forward that waits may hold a view of it.
                part, buffer = shown
                free = self._free[site.level]
                free[:] = [other for other in free if other is not buffer]
                self._show_part(site, part, buffer)

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
        # Parameters that are held read scratch until here, and would be refused as moved.
        self._put_all_back()
        self._add(terms, rounding, rounding_seed, decay)

    def _check_reached(self) -> None:
        """Once, after the first perturbed evaluation: did every active module run?"""
        # A parameter that is used without its module's forward would be updated along a direction
        # that the losses never saw: worse than an error, a random walk.
        if self._checked or self._program is None or not self._moving:
            return
        active = [s for s in self._sites if not self._moving.isdisjoint(s.groups)]
        # By name, not by site: a tied weight is seen if one of its modules ran.
        reached = {name for s in active if s.reached for name in s.parameters} | self._excused
        missed = [n for s in active for n in s.parameters if n not in reached]
        if missed:
            raise UnreachedParameterError(
                f"the forward of these parameters' modules never ran: {', '.join(missed[:5])}"
                f"{' and more' if len(missed) > 5 else ''}. Are they used by another module "
                "directly? Then hold() them. Are they not used? Then freeze them "
                "(requires_grad=False) or excuse() them"
            )
        self._checked = True

    def _before(self, site: Owner, module: nn.Module, args: tuple[Any, ...]) -> None:
        del module, args
        site.depth += 1
        if site.depth == 1:
            self._show(site)

    def _after(self, site: Owner, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        del module, args
        site.depth = max(0, site.depth - 1)
        if site.depth or site.shown is None:
            return None
        kept = _outside(output, site.shown[1])
        self._put_back(site)
        return kept

    def _show(self, site: Owner) -> None:
        if self._moving.isdisjoint(site.groups):
            return
        site.reached = True
        # A module around this one may show some of its parameters already: tied weights.
        part = site.without(self._shown)
        if part is not None:
            free = self._free[site.level]
            size = self._level_bytes[site.level]
            buffer = (
                free.pop()
                if free
                else torch.empty(size, dtype=torch.uint8, device=self.table.device)
            )
            self._show_part(site, part, buffer)

    def _show_part(self, site: Owner, part: Owner, buffer: Tensor) -> None:
        assert self._program is not None
        target = part.target(buffer)
        # Noted before the pass: if it raises, ``_leave`` gives the buffer back.
        site.shown = part, buffer
        self._run(part.table, self._program, target)
        part.point_to(target)
        self._shown |= part.parameters.keys()

    def _put_back(self, site: Owner) -> None:
        if site.shown is None:
            return
        part, buffer = site.shown
        # Ctrl-C may stop a closure anywhere in here, and ``_leave`` does it again: it may cost a
        # buffer, and must not put one back twice or leave a parameter pointing to it.
        part.point_to(part.table)
        self._shown -= part.parameters.keys()
        site.shown = None
        self._free[site.level].append(buffer)


def _outside(output: Any, buffer: Tensor) -> Any:
    """The output of a forward, with copies of views of its perturbed weights."""
    # The next module's weights will be written to the buffer while such a view is still in use.
    if isinstance(output, Tensor):
        inside = (
            output.layout == torch.strided
            and output.device == buffer.device
            and 0 <= output.data_ptr() - buffer.data_ptr() < buffer.nbytes
        )
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
