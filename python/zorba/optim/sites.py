"""Sites: where a model reads perturbed weights from scratch memory instead of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

import zorba_kernels as zk
from zorba.optim.owners import Owner
from zorba.tables import padded_bytes, views_in


class Part:
    """Active parameters that are pointed to scratch together, and back to their weights.

    Attributes:
        parameters: by canonical name; several where equal weights are tied by their storage alone.
        table: of their weights.
        groups: groups of the parameters.
        nbytes: scratch that they take.
    """

    def __init__(self, parameters: Mapping[str, list[nn.Parameter]], whole: zk.ParamTable) -> None:
        self.parameters = dict(parameters)
        self._groups = {e.name: e.group for e in whole.entries if e.name in parameters}
        self._first = {name: same[0] for name, same in parameters.items()}
        self.table = zk.ParamTable(self._first, self._groups, num_groups=whole.num_groups)
        self.groups = frozenset(self._groups.values())
        self.nbytes = sum(map(padded_bytes, self._first.values()))
        self._targets: dict[int, zk.ParamTable] = {}

    def target(self, buffer: Tensor) -> zk.ParamTable:
        """Returns a table of views of the buffer, with the parameters' shapes and dtypes."""
        # Kept: making a table costs more than the pass over a small module. Buffers live as long
        # as their placement, so an address stands for one buffer.
        key = buffer.data_ptr()
        if key not in self._targets:
            views = views_in(buffer, self._first)
            self._targets[key] = zk.ParamTable(
                views, self._groups, num_groups=self.table.num_groups
            )
        return self._targets[key]

    def point_to(self, table: zk.ParamTable) -> None:
        """Lets the parameters read the tensors of a table."""
        # ``.data`` is exchanged, not the parameter: the module, optimizers and tied modules hold
        # the parameter itself, and whoever reads it sees the exchange.
        for same, entry in zip(self.parameters.values(), table.entries, strict=True):
            for p in same:
                p.data = entry.tensor


class Site:
    """Parameters that read scratch while a module's forward runs, or during whole evaluations.

    Attributes:
        module: whose forward it is; None for a whole evaluation.
        level: sites of one level are never shown at once, and share a buffer.
        part: all parameters of the site.
        depth: how many forwards of the module are running; a module may call itself.
        reached: whether an evaluation has used the site.
        shown: the part that reads scratch now, and the buffer.
    """

    def __init__(
        self,
        module: nn.Module | None,
        level: int,
        parameters: Mapping[str, list[nn.Parameter]],
        whole: zk.ParamTable,
    ) -> None:
        self.module = module
        self.level = level
        self.part = Part(parameters, whole)
        self.depth = 0
        self.reached = module is None
        self.shown: tuple[Part, Tensor] | None = None
        self._whole = whole
        self._parts: dict[frozenset[str], Part | None] = {frozenset(): self.part}

    def without(self, names: Collection[str]) -> Part | None:
        """Returns the site's other parameters; None if there are none."""
        mine = self.part.parameters
        left_out = frozenset(name for name in names if name in mine)
        if left_out not in self._parts:
            rest = {name: same for name, same in mine.items() if name not in left_out}
            self._parts[left_out] = Part(rest, self._whole) if rest else None
        return self._parts[left_out]


def make_sites(
    owners: Sequence[Owner], table: zk.ParamTable, held: Collection[str] = ()
) -> list[Site]:
    """Returns a site for each owner, and at last one for the parameters that are ``held``.

    Args:
        owners: of the table's parameters.
        table: the active parameters.
        held: names of those that read scratch during whole evaluations, not in forwards alone.
    """
    sites = []
    whole: dict[str, list[nn.Parameter]] = {}
    for owner in owners:
        own = {}
        for name, p in owner.parameters.items():
            if name in held:
                whole.setdefault(name, []).append(p)
            else:
                own[name] = [p]
        if own:
            sites.append(Site(owner.module, owner.level, own, table))
    if whole:
        sites.append(Site(None, 1 + max((s.level for s in sites), default=-1), whole, table))
    return sites
