"""Which modules hold active parameters: the places where perturbed weights must appear."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

import zorba_kernels as zk
from zorba.tables import padded_bytes


class Owner:
    """Active parameters that are shown perturbed together, for the length of a module's forward.

    Attributes:
        module: whose forward it is; None for parameters that are held during a whole evaluation.
        level: owners that the module is nested in; those held have a level of their own.
        parameters: by canonical name; several where equal weights are tied by their storage alone.
        table: the same, for passes over them.
        groups: groups of the parameters.
        nbytes: scratch that they take.
    """

    def __init__(
        self,
        module: nn.Module | None,
        parameters: dict[str, list[nn.Parameter]],
        main: zk.ParamTable,
        level: int,
    ) -> None:
        groups = {entry.name: entry.group for entry in main.entries}
        self.module = module
        self.level = level
        self.parameters = parameters
        self.table = zk.ParamTable(
            {name: same[0] for name, same in parameters.items()},
            groups={name: groups[name] for name in parameters},
            num_groups=main.num_groups,
        )
        self.groups = frozenset(groups[name] for name in parameters)
        self.nbytes = sum(padded_bytes(same[0]) for same in parameters.values())
        self.depth = 0  # how many of its forwards are running
        self.buffer: Tensor | None = None
        self.showing: Owner | None = None  # itself, or the part that no other one shows
        self.reached = module is None
        self._main = main
        self._targets: dict[int, zk.ParamTable] = {}
        self._parts: dict[frozenset[str], Owner | None] = {}

    def without(self, names: Collection[str]) -> Owner | None:
        """Returns an owner of the other parameters of this module; None if there are none."""
        if not names:
            return self
        mine = frozenset(name for name in names if name in self.parameters)
        if not mine:
            return self
        if mine not in self._parts:
            rest = {n: same for n, same in self.parameters.items() if n not in mine}
            part = Owner(self.module, rest, self._main, self.level) if rest else None
            self._parts[mine] = part
        return self._parts[mine]

    def target(self, buffer: Tensor) -> zk.ParamTable:
        """Returns a table of views of the buffer with the shapes and dtypes of the parameters."""
        key = buffer.data_ptr()
        if key not in self._targets:
            views, at = {}, 0
            for name, (p, *_) in self.parameters.items():
                size = p.numel() * p.element_size()
                views[name] = buffer[at : at + size].view(p.dtype).view(p.shape)
                at += padded_bytes(p)
            groups = {entry.name: entry.group for entry in self.table.entries}
            self._targets[key] = zk.ParamTable(
                views, groups=groups, num_groups=self.table.num_groups
            )
        return self._targets[key]

    def show(self) -> None:
        """Lets the parameters read from ``buffer``."""
        assert self.buffer is not None
        self._point(self.target(self.buffer))

    def put_back(self) -> Tensor | None:
        """Lets the parameters read the weights again; returns the buffer, if there was one."""
        buffer = self.buffer
        if buffer is not None:
            self._point(self.table)
            self.buffer = None
        return buffer

    def _point(self, table: zk.ParamTable) -> None:
        for same, entry in zip(self.parameters.values(), table.entries, strict=True):
            for p in same:
                p.data = entry.tensor


def find_owners(model: nn.Module, table: zk.ParamTable, held: Collection[str] = ()) -> list[Owner]:
    """Returns every module that holds an active parameter itself; a tied one has several owners.

    Parameters are told by their storage: two of them may be views of the same weights.

    Args:
        model: the model.
        table: its active parameters.
        held: names of those that go to an owner without a module.

    Raises:
        ValueError: a parameter of the table is in no module, or twice in one.
    """
    wanted = {key_of(entry.source): entry.name for entry in table.entries}
    owners: list[Owner] = []
    owner_names: set[str] = set()
    whole: dict[str, list[nn.Parameter]] = {}
    for path, module in model.named_modules():
        mine: dict[str, list[nn.Parameter]] = {}
        for p in module._parameters.values():
            name = wanted.get(key_of(p)) if p is not None else None
            if p is None or name is None:
                continue
            if name in held:
                whole.setdefault(name, []).append(p)
                continue
            if name in mine:
                raise ValueError(
                    f"module {path!r} holds the weights of {name!r} under two names: keep one"
                )
            mine[name] = [p]
        if mine:
            parts = path.split(".") if path else []
            above = {".".join(parts[:i]) for i in range(len(parts))}
            owners.append(Owner(module, mine, table, len(above & owner_names)))
            owner_names.add(path)
    found = {name for owner in owners for name in owner.parameters} | set(whole)
    lost = [entry.name for entry in table.entries if entry.name not in found]
    if lost:
        raise ValueError(
            f"these parameters belong to no module of the model: {', '.join(lost[:5])}"
        )
    if whole:
        owners.append(Owner(None, whole, table, 1 + max((o.level for o in owners), default=-1)))
    return owners


def key_of(p: Tensor) -> object:
    """Returns what tells parameters apart: where their weights are."""
    return (p.data_ptr(), p.dtype, p.shape, p.stride()) if p.numel() else id(p)
