"""RowsTable: some rows of a parameter, in any order, with the noise of their places in it."""

from __future__ import annotations

from functools import cached_property
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from zorba_kernels.entry import DTYPE_CODES, Entry, identity_of
from zorba_kernels.noise import as_int64
from zorba_kernels.table import SEGMENT_FIELDS, ParamTable


class RowsTable(ParamTable):
    """Copies of some rows of a parameter: for an embedding, of which a batch reads few.

    A pass over it gives them the bits that a pass over the whole parameter would give them. It
    runs in place alone.

    Args:
        whole: the parameter, of two dimensions, as a table holds it.
        numbers: int64 [k], which rows; each once.
        num_groups: rows that coefficients have.

    Attributes:
        tensor: the copies, [k, columns], contiguous.
    """

    def __init__(self, whole: Entry, numbers: Tensor, num_groups: int) -> None:
        # Without what a table of unrelated tensors must check: rows have one name and one storage.
        # Making an entry for each would take longer than their noise.
        self.tensor = whole.tensor.index_select(0, numbers).contiguous()
        self.device, self.contiguous = self.tensor.device, True
        self.aliases, self.num_groups = {}, num_groups
        self._packed, self._alike = WeakKeyDictionary(), WeakSet()
        self._whole, self._numbers = whole, numbers.cpu().long()

    @cached_property
    def entries(self) -> list[Entry]:  # type: ignore[override]  # the oracle alone asks for them
        """One for each row."""
        whole = self._whole
        offsets = (whole.offset + self._numbers * whole.columns).tolist()
        return [
            Entry(
                whole.name, row, row, whole.stream, whole.group, at, whole.columns, identity_of(row)
            )
            for row, at in zip(self.tensor.unbind(), offsets, strict=True)
        ]

    def check(self) -> None:
        """Nothing can have moved: the tensor is the table's own."""

    def packed(self, out: ParamTable) -> Tensor:
        """See ``ParamTable.packed``."""
        if out is not self:
            raise ValueError("a table of rows is changed in place")
        if out not in self._packed:
            whole, (count, columns) = self._whole, self.tensor.shape
            rows = torch.empty(count, SEGMENT_FIELDS, dtype=torch.int64)
            size = columns * self.tensor.element_size()
            address = self.tensor.data_ptr() + size * torch.arange(count)
            fields: tuple[Tensor | int, ...] = (
                address, address, columns, whole.offset + self._numbers * whole.columns,
                as_int64(whole.stream), DTYPE_CODES[self.tensor.dtype], whole.group, whole.columns,
            )  # fmt: skip
            for number, values in enumerate(fields):
                rows[:, number] = values
            self._packed[out] = rows
        return self._packed[out]
