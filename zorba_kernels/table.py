"""ParamTable: the tensors that a pass works on, checked and packed once."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from zorba_kernels.noise import MAX_ELEMENTS, as_int64, canonical_name, stream_of

DTYPE_CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Supported weight dtypes and their code in ``csrc/noise.h``."""

SEGMENT_FIELDS = 7
"""int64 fields of a packed row: src, dst, numel, offset, stream, dtype, group."""


@dataclass(frozen=True)
class Entry:
    """One parameter of a table."""

    name: str
    source: Tensor  # as it was given
    tensor: Tensor  # the same storage without autograd
    stream: int  # uint64
    group: int  # row of coefs
    offset: int  # index of the tensor's first element in the whole parameter


class _Identity(NamedTuple):
    device: torch.device
    address: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]


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
    ) -> None:
        pairs = list(tensors.items()) if isinstance(tensors, Mapping) else list(tensors)
        names = [canonical_name(name) for name, _ in pairs]
        _refuse_duplicates(names)
        group_of = {canonical_name(name): g for name, g in (groups or {}).items()}
        offset_of = {canonical_name(name): o for name, o in (offsets or {}).items()}
        for what, given in (("groups", group_of), ("offsets", offset_of)):
            unknown = sorted(set(given) - set(names))
            if unknown:
                raise ValueError(f"{what} names parameters that are not in the table: {unknown}")

        self.entries: list[Entry] = []
        self.aliases: dict[str, str] = {}
        first_name: dict[_Identity, str] = {}
        for name, (_, tensor) in zip(names, pairs, strict=True):
            _check_tensor(name, tensor)
            group = _non_negative(group_of.get(name, 0), f"group of {name!r}")
            offset = _non_negative(offset_of.get(name, 0), f"offset of {name!r}")
            if offset + tensor.numel() > MAX_ELEMENTS:
                raise ValueError(
                    f"{name!r} reaches element {offset + tensor.numel()}; the noise contract ends "
                    f"at {MAX_ELEMENTS} (2**35) elements a parameter"
                )
            identity = _identity(tensor)
            if tensor.numel() and identity in first_name:
                self._add_alias(name, first_name[identity], group, offset)
                continue
            if tensor.numel():
                first_name[identity] = name
            self.entries.append(
                Entry(name, tensor, tensor.detach(), stream_of(name), group, offset)
            )
        _refuse_overlap(self.entries)
        self._identities = [_identity(entry.source) for entry in self.entries]
        self._packed: WeakKeyDictionary[ParamTable, Tensor] = WeakKeyDictionary()
        self.contiguous = all(entry.tensor.is_contiguous() for entry in self.entries)
        devices = {entry.tensor.device for entry in self.entries}
        if len(devices) > 1:
            raise ValueError(
                f"a ParamTable lives on one device, got {sorted(map(str, devices))}: make one "
                "table for each device"
            )
        self.device = devices.pop() if devices else torch.device("cpu")
        least = 1 + max((entry.group for entry in self.entries), default=0)
        self.num_groups = least if num_groups is None else num_groups
        if self.num_groups < least:
            raise ValueError(f"num_groups is {num_groups}, but group {least - 1} is in use")
        _alive[_key(self)] = self

    def _add_alias(self, name: str, first: str, group: int, offset: int) -> None:
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
        return all(
            _identity(entry.source) == before
            for entry, before in zip(self.entries, self._identities, strict=True)
        )

    def check(self) -> None:
        """Raises RuntimeError if a tensor was moved, resized or freed since the table was made."""
        for entry, before in zip(self.entries, self._identities, strict=True):
            if _identity(entry.source) != before:
                raise RuntimeError(
                    f"the storage or shape of {entry.name!r} changed after its ParamTable was "
                    "made: make a new table"
                )

    def check_like(self, other: ParamTable) -> None:
        """Raises ValueError unless ``other`` holds the same parameters in the same layout."""
        mine = [(e.name, e.tensor.shape, e.tensor.dtype, e.group, e.offset) for e in self.entries]
        theirs = [
            (e.name, e.tensor.shape, e.tensor.dtype, e.group, e.offset) for e in other.entries
        ]
        if self.device != other.device:
            raise ValueError(f"the tables are on {self.device} and {other.device}")
        if len(mine) != len(theirs):
            raise ValueError(f"the tables hold {len(mine)} and {len(theirs)} tensors")
        for a, b in zip(mine, theirs, strict=True):
            if a != b:
                raise ValueError(
                    "the tables differ in (name, shape, dtype, group, offset): "
                    f"{a[0]!r} {a[1:]} and {b[0]!r} {b[1:]}"
                )
        # Written in place where both are the same tensor; anything between would be read torn.
        apart = [
            b
            for a, b in zip(self.entries, other.entries, strict=True)
            if _identity(a.tensor) != _identity(b.tensor)
        ]
        _refuse_overlap([*self.entries, *apart])

    def packed(self, out: ParamTable) -> Tensor:
        """Returns the rows that the compiled backends read: int64 [tensors, 7], on the CPU.

        Cached for as long as ``out``, where the pass writes, is alive. In place, ``out`` is the
        table itself.
        """
        packed = self._packed.get(out)
        if packed is None:
            rows = [
                (
                    e.tensor.data_ptr(),
                    t.tensor.data_ptr(),
                    e.tensor.numel(),
                    e.offset,
                    as_int64(e.stream),
                    DTYPE_CODES[e.tensor.dtype],
                    e.group,
                )
                for e, t in zip(self.entries, out.entries, strict=True)
            ]
            packed = torch.tensor(rows, dtype=torch.int64).reshape(-1, SEGMENT_FIELDS)
            self._packed[out] = packed
        return packed


_Key = tuple[Hashable, ...]
_alive: WeakValueDictionary[_Key, ParamTable] = WeakValueDictionary()


def find_table(
    tensors: Sequence[Tensor],
    names: Sequence[str],
    groups: Sequence[int],
    offsets: Sequence[int],
    num_groups: int,
) -> ParamTable:
    """Returns the table of these tensors if there is one already, or a new one."""
    identities = tuple(_identity(t) for t in tensors)
    key = (identities, tuple(names), tuple(groups), tuple(offsets), num_groups)
    known = _alive.get(key)
    return (
        known
        if known is not None
        else ParamTable(
            zip(names, tensors, strict=True),
            dict(zip(names, groups, strict=True)),
            dict(zip(names, offsets, strict=True)),
            num_groups,
        )
    )


def _key(table: ParamTable) -> _Key:
    rows = [(e.name, e.group, e.offset) for e in table.entries]
    columns = tuple(zip(*rows, strict=True)) or ((), (), ())
    return (tuple(table._identities), *columns, table.num_groups)


def _identity(tensor: Tensor) -> _Identity:
    return _Identity(tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _refuse_duplicates(names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(
                f"parameter name {name!r} is given twice (wrapper prefixes are left out)"
            )
        seen.add(name)


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name!r} is a {type(tensor).__name__}; a ParamTable holds tensors")
    if tensor.dtype not in DTYPE_CODES:
        supported = ", ".join(str(d) for d in DTYPE_CODES)
        raise TypeError(f"{name!r} has dtype {tensor.dtype}; supported are {supported}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name!r} has layout {tensor.layout}; only strided tensors are supported")
    reach = 0
    for stride, count in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if tensor.numel() and count > 1 and stride <= reach:
            raise ValueError(
                f"{name!r} is an expanded or overlapping view (shape {tuple(tensor.shape)}, "
                f"strides {tensor.stride()}): several of its elements may share one memory location"
            )
        reach += (count - 1) * stride


def _non_negative(value: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{what} must be an integer from 0, got {value!r}")
    return value


def _refuse_overlap(entries: list[Entry]) -> None:
    """Different views of one storage are fine while their memory ranges are disjoint.

    Strided views whose ranges interleave (the halves of ``x[:, ::2]``) are told apart by no cheap
    test, so they are refused too.
    """
    spans = []
    for entry in entries:
        t = entry.tensor
        if t.numel():
            reach = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
            spans.append(
                (t.device, t.data_ptr(), t.data_ptr() + reach * t.element_size(), entry.name)
            )
    spans.sort(key=lambda s: (str(s[0]), s[1]))
    for before, after in itertools.pairwise(spans):
        if before[0] == after[0] and after[1] < before[2]:
            raise ValueError(
                f"{before[3]!r} and {after[3]!r} overlap in memory without being the same tensor"
            )
