"""Parameters of a model that may be on several devices, and may move between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import zorba_kernels as zk
from zorba_kernels.table import Entry


class DeviceTables:
    """One ``ParamTable`` a device, all with the same groups; made anew where parameters moved.

    ``tensors`` are parameters by canonical name, kept and looked at again later; ``num_groups`` is
    the number of rows of coefficients, by default one more than the largest group.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        groups: Mapping[str, int],
        num_groups: int | None = None,
    ) -> None:
        self._tensors, self._groups = dict(tensors), dict(groups)
        self.num_groups = 1 + max(groups.values(), default=0) if num_groups is None else num_groups
        self._tables: tuple[zk.ParamTable, ...] = ()

    @property
    def tables(self) -> tuple[zk.ParamTable, ...]:
        """Tables of the parameters where they are now."""
        if not (self._tables and all(table.current for table in self._tables)):
            by_device: dict[torch.device, dict[str, Tensor]] = {}
            for name, tensor in self._tensors.items():
                by_device.setdefault(tensor.device, {})[name] = tensor
            # Every table has all groups, so that one matrix of coefficients serves each of them.
            self._tables = tuple(
                zk.ParamTable(part, {n: self._groups[n] for n in part}, num_groups=self.num_groups)
                for part in by_device.values()
            )
        return self._tables

    @property
    def entries(self) -> list[Entry]:
        """Entries of all tables."""
        return [entry for table in self.tables for entry in table.entries]


Tables = zk.ParamTable | DeviceTables  # what holds weights: a table, or one a device
TableLike = Tables | Sequence[zk.ParamTable]  # the same, or plain tables of different devices

# Bytes between tensors of one buffer, as torch aligns tensors on a CPU: vector code takes other
# paths at other addresses, so the bits of a product may depend on the alignment.
_ALIGN = 64


def padded_bytes(tensor: Tensor) -> int:
    """Returns the bytes that a tensor takes in a buffer which holds several, each aligned."""
    return -(-tensor.nbytes // _ALIGN) * _ALIGN


def views_in(buffer: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Lays tensors out in a buffer (uint8), one behind the other: returns contiguous views of it.

    ``tensors`` are not read; the buffer needs the sum of their ``padded_bytes``.
    """
    views, start = {}, 0
    for name, tensor in tensors.items():
        views[name] = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += padded_bytes(tensor)
    return views


def each_table(tables: TableLike) -> Sequence[zk.ParamTable]:
    """Returns the tables of one device each."""
    if isinstance(tables, DeviceTables):
        return tables.tables
    return (tables,) if isinstance(tables, zk.ParamTable) else tuple(tables)


def fingerprint(tables: TableLike) -> int:
    """Returns the uint64 fingerprint of all weights, the sum of those of the devices."""
    return sum(zk.fingerprint(table) for table in each_table(tables)) % (1 << 64)
