"""The exact placement: perturbed weights are made in a scratch buffer, a module at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import zorba_kernels as zk
from zorba.optim.interrupt import deferred_interrupts
from zorba.optim.placement import Placement
from zorba.optim.terms import NoiseTerms
from zorba_kernels.eager import run_program
from zorba_kernels.noise import canonical_name
from zorba_kernels.program import Program, make_program

_ALIGN = 64  # bytes between parameters in a scratch buffer


class UnreachedParameterError(RuntimeError):
    """A parameter was to be perturbed, but its module's forward never ran."""


class _Owner:
    """A module that owns active parameters, and what its hooks need."""

    def __init__(
        self,
        module: nn.Module,
        names: dict[str, nn.Parameter],
        main: zk.ParamTable,
        level: int,
    ) -> None:
        groups = {entry.name: entry.group for entry in main.entries}
        self.module = module
        self.level = level  # owners that it is nested in
        self.parameters = names
        self.table = zk.ParamTable(
            names, groups={name: groups[name] for name in names}, num_groups=main.num_groups
        )
        self.groups = sorted({groups[name] for name in names})
        self.nbytes = sum(
            -(-p.numel() * p.element_size() // _ALIGN) * _ALIGN for p in names.values()
        )
        self.depth = 0  # how many of its forwards are running
        self.buffer: Tensor | None = None
        self.reached = False
        self._targets: dict[int, zk.ParamTable] = {}

    def target(self, buffer: Tensor) -> zk.ParamTable:
        """A table of views of the buffer with the shapes and dtypes of the parameters."""
        key = buffer.data_ptr()
        if key not in self._targets:
            views, at = {}, 0
            for name, p in self.parameters.items():
                size = p.numel() * p.element_size()
                views[name] = buffer[at : at + size].view(p.dtype).view(p.shape)
                at += -(-size // _ALIGN) * _ALIGN
            groups = {entry.name: entry.group for entry in self.table.entries}
            self._targets[key] = zk.ParamTable(
                views, groups=groups, num_groups=self.table.num_groups
            )
        return self._targets[key]


class ScratchPlacement(Placement):
    """Each module's perturbed weights are written to scratch just before its forward.

    The module reads the scratch through its own parameters (their ``.data`` is exchanged for the
    length of the forward), so any module works, tied weights and modules called twice among them.
    The weights themselves are written by ``update`` alone: an evaluation leaves every bit of them
    as it was. Extra memory: the largest module's own active parameters; where owners are nested,
    the largest of each level.

    Args:
        model: whose modules are hooked during a session.
        table: its active parameters; names must be the model's canonical ones.
        distribution: of the noise.
    """

    def __init__(self, model: nn.Module, table: zk.ParamTable, distribution: str) -> None:
        super().__init__(table, distribution)
        self._owners = _find_owners(model, table)
        levels = range(1 + max(owner.level for owner in self._owners))
        self._level_bytes = [
            max((o.nbytes for o in self._owners if o.level == level), default=0) for level in levels
        ]
        self._free: list[list[Tensor]] = [[] for _ in levels]
        self._program: Program | None = None
        self._moving = [False] * table.num_groups
        self._checked = False

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the buffers that wait for the next forward."""
        return sum(buffer.numel() for buffers in self._free for buffer in buffers)

    @contextmanager
    def session(self) -> Iterator[None]:
        """See ``Placement.session``; exact."""
        handles: list[Any] = []
        self._program = None
        try:
            for owner in self._owners:
                handles.append(owner.module.register_forward_pre_hook(self._before(owner)))
                handles.append(
                    owner.module.register_forward_hook(self._after(owner), always_call=True)
                )
            yield
            self._check_reached()
        finally:
            with deferred_interrupts():
                for handle in handles:
                    handle.remove()
                for owner in self._owners:
                    owner.depth = 0
                    self._put_back(owner)

    def move_to(self, terms: NoiseTerms) -> None:
        """See ``Placement.move_to``; costs nothing until a forward runs."""
        self._check_reached()
        self._moving = [terms.active(g) for g in range(self.table.num_groups)]
        self._program = make_program(
            terms.seeds,
            terms.coefs,
            self.table.num_groups,
            self.distribution,
            "nearest",
            None,
            terms.samples,
            None,
        )

    def update(
        self,
        terms: NoiseTerms,
        rounding: str,
        rounding_seed: int | None = None,
        decay: Tensor | None = None,
    ) -> None:
        """See ``Placement.update``; one pass."""
        self._check_reached()
        self._add(terms, rounding, rounding_seed, decay)

    def _check_reached(self) -> None:
        """Once, after the first perturbed evaluation: did every active module run?

        A parameter that is used without its module's forward would be updated along a direction
        that the losses never saw.
        """
        if self._checked or self._program is None or not any(self._moving):
            return
        active = [o for o in self._owners if any(self._moving[g] for g in o.groups)]
        missed = [name for o in active if not o.reached for name in o.parameters]
        if missed:
            raise UnreachedParameterError(
                f"the forward of these parameters' modules never ran: {', '.join(missed[:5])}"
                f"{' and more' if len(missed) > 5 else ''}. They are unused, or used by another "
                "module directly: freeze them (requires_grad=False) or use placement='inplace'"
            )
        self._checked = True

    def _before(self, owner: _Owner) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            del module, args
            owner.depth += 1
            if owner.depth > 1 or not any(self._moving[g] for g in owner.groups):
                return
            assert self._program is not None
            owner.reached = True
            started = time.perf_counter()
            owner.buffer = self._take(owner.level)
            target = owner.target(owner.buffer)
            run_program(owner.table, target, self._program)
            for p, entry in zip(owner.parameters.values(), target.entries, strict=True):
                p.data = entry.tensor
            self.kernel_seconds += time.perf_counter() - started

        return hook

    def _after(self, owner: _Owner) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            del module, args, output
            owner.depth -= 1
            if owner.depth == 0:
                self._put_back(owner)

        return hook

    def _take(self, level: int) -> Tensor:
        if self._free[level]:
            return self._free[level].pop()
        size = self._level_bytes[level]
        return torch.empty(size, dtype=torch.uint8, device=self.table.device)

    def _put_back(self, owner: _Owner) -> None:
        if owner.buffer is None:
            return
        for p, entry in zip(owner.parameters.values(), owner.table.entries, strict=True):
            p.data = entry.tensor
        self._free[owner.level].append(owner.buffer)
        owner.buffer = None


def _find_owners(model: nn.Module, table: zk.ParamTable) -> list[_Owner]:
    """Every module that holds an active parameter itself; a tied one has several owners.

    Parameters are told by their storage: two of them may be views of the same weights.
    """
    wanted = {_key(entry.source): entry.name for entry in table.entries}
    owners: list[_Owner] = []
    owner_names: set[str] = set()
    for path, module in model.named_modules():
        mine: dict[str, nn.Parameter] = {}
        for p in module._parameters.values():
            name = wanted.get(_key(p)) if p is not None else None
            if p is None or name is None:
                continue
            if name in mine:
                raise ValueError(
                    f"module {path!r} holds the weights of {name!r} under two names: keep one"
                )
            mine[name] = p
        if mine:
            parts = path.split(".") if path else []
            above = {".".join(parts[:i]) for i in range(len(parts))}
            owners.append(_Owner(module, mine, table, len(above & owner_names)))
            owner_names.add(path)
    found = {name for owner in owners for name in owner.parameters}
    lost = [entry.name for entry in table.entries if entry.name not in found]
    if lost:
        raise ValueError(
            f"these parameters belong to no module of the model: {', '.join(lost[:5])}"
        )
    return owners


def _key(p: Tensor) -> object:
    return (p.data_ptr(), p.dtype, p.shape, p.stride()) if p.numel() else id(p)


def active_table(
    model: nn.Module, groups: dict[str, int] | None = None, num_groups: int | None = None
) -> zk.ParamTable:
    """Returns the table of a model's active parameters.

    Args:
        model: any module.
        groups: group of each active parameter by canonical name; None means all that require a
            gradient, in group 0.
        num_groups: rows that coefficients have.
    """
    named: dict[str, Tensor] = {}
    for full_name, p in model.named_parameters():
        name = canonical_name(full_name)
        if name in named:
            raise ValueError(f"two parameters are called {name!r} once wrapper prefixes are off")
        named[name] = p
    if groups is None:
        groups = {n: 0 for n, p in named.items() if p.requires_grad}
    missing = sorted(set(groups) - set(named))
    if missing:
        raise ValueError(f"the model has no parameters named {missing}")
    return zk.ParamTable({n: named[n] for n in groups}, groups=groups, num_groups=num_groups)
