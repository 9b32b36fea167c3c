"""Which modules hold active parameters: the places where perturbed weights must appear."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property

from torch import Tensor, nn

import zorba_kernels as zk
from zorba.tables import padded_bytes, views_in


class Owner:
    """Active parameters that a module holds itself, and the scratch that they may read.

    Attributes:
        module: whose forward reads them.
        held: whether they read scratch during whole evaluations, not in that forward alone.
        parameters: by canonical name; several where equal weights are tied by their storage alone.
        level: how many owners the module is nested in.
        groups: groups of the parameters.
        nbytes: scratch that they take.
        depth: how many forwards of the module are running: it may call itself.
        reached: whether an evaluation has used it.
        shown: the part that reads scratch now (itself, or what no other owner shows), and where.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, list[nn.Parameter]],
        whole: zk.ParamTable,
        level: int,
        held: bool = False,
    ) -> None:
        self.module = module
        self.held = held
        self.parameters = dict(parameters)
        self.level = level
        self.depth = 0
        self.reached = held
        self.shown: tuple[Owner, Tensor] | None = None
        self._whole = whole
        # Entries, not the parameters: these may read scratch when a part of an owner is made.
        entries = {entry.name: entry for entry in whole.entries}
        self._weights = {name: entries[name].tensor for name in parameters}
        self._groups = {name: entries[name].group for name in parameters}
        self.groups = frozenset(self._groups.values())
        self.nbytes = sum(map(padded_bytes, self._weights.values()))
        self._targets: dict[int, zk.ParamTable] = {}
        self._parts: dict[frozenset[str], Owner | None] = {frozenset(): self}

    @cached_property
    def table(self) -> zk.ParamTable:
        """The parameters' weights; made when asked for: not every placement needs it."""
        return self._table_of(self._weights)

    def without(self, names: Collection[str]) -> Owner | None:
        """Returns an owner of the other parameters of this module; None if there are none."""
        left_out = frozenset(name for name in names if name in self.parameters)
        if left_out not in self._parts:
            rest = {n: same for n, same in self.parameters.items() if n not in left_out}
            part = Owner(self.module, rest, self._whole, self.level) if rest else None
            self._parts[left_out] = part
        return self._parts[left_out]

    def target(self, buffer: Tensor) -> zk.ParamTable:
        """Returns a table of views of the buffer with the shapes and dtypes of the parameters."""
        # Kept: making a table costs more than the pass over a small module. Buffers live as long
        # as their placement, so that an address means one buffer.
        key = buffer.data_ptr()
        if key not in self._targets:
            self._targets[key] = self._table_of(views_in(buffer, self._weights))
        return self._targets[key]

    def point_to(self, table: zk.ParamTable) -> None:
        """Lets the parameters read the tensors of a table."""
        # ``.data`` is exchanged, not the parameter: whoever holds the parameter (the module, tied
        # modules, optimizers) sees the exchange.
        for same, entry in zip(self.parameters.values(), table.entries, strict=True):
            for p in same:
                p.data = entry.tensor

    def _table_of(self, tensors: Mapping[str, Tensor]) -> zk.ParamTable:
        return zk.ParamTable(tensors, self._groups, num_groups=self._whole.num_groups)


def find_owners(model: nn.Module, table: zk.ParamTable) -> list[Owner]:
    """Returns every module that holds an active parameter itself; a tied one has several owners.

    Args:
        model: the model.
        table: its active parameters.

    Raises:
        ValueError: a parameter of the table is in no module, or twice in one.
    """
    # Parameters are told apart by their storage, not their identity: two of them may be views of
    # the same weights (``b.weight.data = a.weight.data``), and both must show the noise.
    wanted = {key_of(entry.source): entry.name for entry in table.entries}
    owners: list[Owner] = []
    paths: set[str] = set()
    for path, module in model.named_modules():
        mine: dict[str, list[nn.Parameter]] = {}
        for p in module._parameters.values():
            name = wanted.get(key_of(p)) if p is not None else None
            if p is None or name is None:
                continue
            if name in mine:
                raise ValueError(
                    f"module {path!r} holds the weights of {name!r} under two names: keep one"
                )
            mine[name] = [p]
        if mine:
            parts = path.split(".") if path else []
            above = {".".join(parts[:i]) for i in range(len(parts))}
            owners.append(Owner(module, mine, table, len(above & paths)))
            paths.add(path)
    found = {name for owner in owners for name in owner.parameters}
    lost = [name for name in table.names if name not in found]
    if lost:
        raise ValueError(
            f"these parameters belong to no module of the model: {', '.join(lost[:5])}"
        )
    return owners


def key_of(p: Tensor) -> object:
    """Returns a key that is the same for parameters with the same weights: where these are."""
    # An empty tensor has no address, and nothing in it could be tied.
    return (p.data_ptr(), p.dtype, p.shape, p.stride()) if p.numel() else id(p)
