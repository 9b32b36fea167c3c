"""ParamTable: the tensors that a pass works on, checked and packed once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import torch
from torch import Tensor

from zorba_kernels.dispatch import Backend
from zorba_kernels.entry import (
    DTYPE_CODES,
    Entry,
    Identity,
    check_tensor,
    columns_of,
    identity_of,
    non_negative,
    refuse_duplicates,
    refuse_overlap,
)
from zorba_kernels.noise import MAX_ELEMENTS, as_int64, canonical_name, stream_of
from zorba_kernels.program import Program

__all__ = ["DTYPE_CODES", "SEGMENT_FIELDS", "Entry", "ParamTable", "find_table"]

SEGMENT_FIELDS = 8
"""int64 fields of a packed row: src, dst, numel, offset, stream, dtype, group, columns."""


class ParamTable:
    """Named tensors on one device, each with its stream and its group.

    Args:
        tensors: mapping of parameter names to tensors, or an iterable of such pairs, for example
            ``model.named_parameters()``. float32, bfloat16 or float16, all on one device, of any
            shape (also empty and 0-dimensional). A name given twice, or two names that become one
            without their wrapper prefixes, are refused. Two names for the same storage (tied
            weights) count once, under the first name; ``aliases`` maps the others to it. Tensors
            that overlap without being the same view are refused. A non-contiguous tensor is
            accepted; a pass copies it into a contiguous buffer and back.
        groups: group of each name, an integer from 0; names left out, or None, mean group 0. A
            group selects a row of coefficients.
        num_groups: rows that coefficients have; one more than the largest group by default.
        offsets: for shards: row-major index of the tensor's first element in the whole parameter,
            0 for names left out. The shard must be a contiguous range of the row-major order.
        columns: for shards that are flat: elements of a row of the whole parameter (the product of
            its dimensions but the first), 0 where it has one dimension; by default the tensor's.

    Raises:
        TypeError: a value is no tensor, or has another dtype.
        ValueError: duplicate names, mixed devices, overlapping storage, bad group or offset, or a
            parameter of more than 2**35 elements.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        groups: Mapping[str, int] | None = None,
        offsets: Mapping[str, int] | None = None,
        num_groups: int | None = None,
        columns: Mapping[str, int] | None = None,
    ) -> None:
        # An iterable may be a generator: it is read once, and its length matters.
        pairs = list(tensors.items()) if isinstance(tensors, Mapping) else list(tensors)
        # A stream is a hash of the name, so a wrapper around the model must not change it.
        names = [canonical_name(name) for name, _ in pairs]
        refuse_duplicates(names)
        group_of = {canonical_name(name): g for name, g in (groups or {}).items()}
        offset_of = {canonical_name(name): o for name, o in (offsets or {}).items()}
        columns_in = {canonical_name(name): c for name, c in (columns or {}).items()}
        every = (("groups", group_of), ("offsets", offset_of), ("columns", columns_in))
        for what, given in every:
            unknown = sorted(set(given) - set(names))
            if unknown:
                raise ValueError(f"{what} names parameters that are not in the table: {unknown}")

        self.entries: list[Entry] = []
        self.aliases: dict[str, str] = {}
        first_name: dict[Identity, str] = {}
        for name, (_, tensor) in zip(names, pairs, strict=True):
            check_tensor(name, tensor)
            group = non_negative(group_of.get(name, 0), f"group of {name!r}")
            offset = non_negative(offset_of.get(name, 0), f"offset of {name!r}")
            if offset + tensor.numel() > MAX_ELEMENTS:
                raise ValueError(
                    f"{name!r} reaches element {offset + tensor.numel()}; the noise contract ends "
                    f"at {MAX_ELEMENTS} (2**35) elements a parameter"
                )
            # Tied weights must change once. Empty tensors may share an address by chance.
            identity = identity_of(tensor)
            if tensor.numel() and identity in first_name:
                self._add_alias(name, first_name[identity], group, offset)
                continue
            if tensor.numel():
                first_name[identity] = name
            # Detached, so that passes write to leaves that require gradients.
            plain, stream = tensor.detach(), stream_of(name)
            row = non_negative(
                columns_in.get(name, columns_of(tensor.shape)), f"columns of {name!r}"
            )
            self.entries.append(Entry(name, tensor, plain, stream, group, offset, row, identity))
        refuse_overlap(self.entries)
        # Both are weak: a table of a scratch buffer must not live as long as the weights' one.
        self._packed: WeakKeyDictionary[ParamTable, Tensor] = WeakKeyDictionary()
        self._alike: WeakSet[ParamTable] = WeakSet()  # tables that check_like() has passed
        self.contiguous = all(entry.tensor.is_contiguous() for entry in self.entries)
        devices = {entry.tensor.device for entry in self.entries}
        if len(devices) > 1:
            got = sorted(map(str, devices))
            raise ValueError(f"a ParamTable lives on one device, got {got}: make one for each")
        self.device = devices.pop() if devices else torch.device("cpu")
        # Shards and parts of a model may hold no parameter of the last groups: num_groups says so.
        least = 1 + max((entry.group for entry in self.entries), default=0)
        self.num_groups = least if num_groups is None else num_groups
        if self.num_groups < least:
            raise ValueError(f"num_groups is {num_groups}, but group {least - 1} is in use")
        # Operators of a graph, which hold tensors only, find this table again: see find_table().
        _alive[_key(self)] = self

    def _add_alias(self, name: str, first: str, group: int, offset: int) -> None:
        # One storage cannot have two streams, groups or places: the noise would depend on order.
        entry = next(e for e in self.entries if e.name == first)
        if (entry.group, entry.offset) != (group, offset):
            raise ValueError(
                f"{name!r} and {first!r} share their storage but have different groups or "
                f"offsets: ({group}, {offset}) and ({entry.group}, {entry.offset})"
            )
        self.aliases[name] = first

    def __len__(self) -> int:
        """Number of distinct tensors."""
        return len(self.entries)

    @property
    def names(self) -> list[str]:
        """Canonical names, aliases left out."""
        return [entry.name for entry in self.entries]

    @property
    def numel(self) -> int:
        """Elements in all tensors together."""
        return sum(entry.tensor.numel() for entry in self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(e.tensor.numel() * e.tensor.element_size() for e in self.entries)

    @property
    def current(self) -> bool:
        """Whether all tensors are where, and what, they were when the table was made."""
        return all(entry.unchanged for entry in self.entries)

    def check(self) -> None:
        """Raises RuntimeError if a tensor was moved, resized or freed since the table was made."""
        for entry in self.entries:
            if not entry.unchanged:
                raise RuntimeError(
                    f"the storage or shape of {entry.name!r} changed after its ParamTable was "
                    "made: make a new table"
                )

    def run(self, program: Program, out: ParamTable | None = None) -> None:
        """Adds a program's noise to every tensor, in place or into the tensors of ``out``.

        A program is packed and its backend chosen at its first run; further runs, on any tables,
        cost the launch.

        Args:
            program: what to add.
            out: a table of the same names, shapes, dtypes, groups and offsets, whose tensors are
                overwritten while this one's are only read; None: this table itself.

        Raises:
            ValueError: the tables differ, or the program is for another number of groups.
            BackendUnavailableError: no backend, or not the program's, can serve.
            RuntimeError: a tensor was moved or resized since its table was made.
        """
        # A stale address would be written to: nothing may skip this, however often it runs.
        self.check()
        target = self if out is None else out
        if target is not self:
            # Likeness cannot change while both are current, so it is checked once for a pair.
            if target not in self._alike:
                self._check_like(target)
                self._alike.add(target)
            target.check()
        backend = program.backend(self.device)
        if self.contiguous and target.contiguous:
            backend.run(self, target, program)
        else:
            self._run_through_copies(backend, target, program)

    def _run_through_copies(self, backend: Backend, out: ParamTable, program: Program) -> None:
        """Kernels want contiguous tensors: one copy at a time bounds the memory that it takes."""
        for source, target in zip(self.entries, out.entries, strict=True):
            copy = source.tensor.clone(memory_format=torch.contiguous_format)
            # The groups of the whole table: a row of coefficients keeps its number.
            piece = self.with_tensors({source.name: copy})
            backend.run(piece, piece, program)
            target.tensor.copy_(piece.entries[0].tensor)

    def made_contiguous(self) -> ParamTable:
        """Returns the table itself where its tensors are contiguous, else a table of copies."""
        if self.contiguous:
            return self
        return self.with_tensors({e.name: e.tensor.contiguous() for e in self.entries})

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> ParamTable:
        """Returns a table of other tensors of some of its parameters, which keep their places."""
        mine = [e for e in self.entries if e.name in tensors]
        groups, offsets = {e.name: e.group for e in mine}, {e.name: e.offset for e in mine}
        columns = {e.name: e.columns for e in mine}
        return ParamTable(tensors, groups, offsets, self.num_groups, columns)

    def _check_like(self, other: ParamTable) -> None:
        """Raises ValueError unless ``other`` holds the same parameters in the same layout."""
        mine, theirs = ([e.likeness for e in table.entries] for table in (self, other))
        if self.device != other.device:
            raise ValueError(f"the tables are on {self.device} and {other.device}")
        if len(mine) != len(theirs):
            raise ValueError(f"the tables hold {len(mine)} and {len(theirs)} tensors")
        for a, b in zip(mine, theirs, strict=True):
            if a != b:
                raise ValueError(
                    "the tables differ in (name, shape, dtype, group, offset, columns): "
                    f"{a[0]!r} {a[1:]} and {b[0]!r} {b[1:]}"
                )
        # Written in place where both are the same tensor; anything between would be read torn.
        pairs = zip(self.entries, other.entries, strict=True)
        refuse_overlap([*self.entries, *(b for a, b in pairs if a.identity != b.identity)])

    def packed(self, out: ParamTable) -> Tensor:
        """Returns the rows that the compiled backends read: int64 [tensors, 8], on the CPU.

        Cached for as long as ``out``, where the pass writes, is alive. In place, ``out`` is the
        table itself.
        """
        # int64 throughout: addresses and uint64 bits fit, and the rows are one array of structs.
        packed = self._packed.get(out)
        if packed is None:
            rows = []
            for e, t in zip(self.entries, out.entries, strict=True):
                place = e.tensor.data_ptr(), t.tensor.data_ptr(), e.tensor.numel(), e.offset
                kind = DTYPE_CODES[e.tensor.dtype], e.group, e.columns
                rows.append((*place, as_int64(e.stream), *kind))
            packed = torch.tensor(rows, dtype=torch.int64).reshape(-1, SEGMENT_FIELDS)
            self._packed[out] = packed
        return packed


_Key = tuple[Hashable, ...]
_alive: WeakValueDictionary[_Key, ParamTable] = WeakValueDictionary()


def find_table(
    tensors: Sequence[Tensor], names: Sequence[str], groups: Sequence[int],
    offsets: Sequence[int], columns: Sequence[int], num_groups: int,
) -> ParamTable:  # fmt: skip
    """Returns the table of these tensors if there is one already, or a new one."""
    # Making a table hashes names and checks for overlap: too much for each run of a graph.
    identities = tuple(identity_of(t) for t in tensors)
    key = (identities, tuple(names), tuple(groups), tuple(offsets), tuple(columns), num_groups)
    known = _alive.get(key)
    if known is not None:
        return known
    given = (groups, offsets, columns)
    group_of, offset_of, columns_in = (dict(zip(names, each, strict=True)) for each in given)
    return ParamTable(zip(names, tensors, strict=True), group_of, offset_of, num_groups, columns_in)


def _key(table: ParamTable) -> _Key:
    rows = [(e.identity, e.name, e.group, e.offset, e.columns) for e in table.entries]
    columns = tuple(zip(*rows, strict=True)) or ((), (), (), (), ())
    return (*columns, table.num_groups)
