"""What GPU backends keep in device memory for a table, copied once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from zorba_kernels.table import ParamTable

T = TypeVar("T")


@dataclass(frozen=True)
class DeviceTable:
    """A packed table in device memory."""

    segments: Tensor  # int64 [count, 8]
    ends: Tensor  # int64 [count], tiles up to and including each segment
    tiles: int
    made_on: torch.cuda.Stream | None  # None: host memory

    @classmethod
    def copy(cls, segments: Tensor, ends: Tensor, tiles: int, device: torch.device) -> DeviceTable:
        """Copies rows and ends from the CPU to the device, on its current stream."""
        # The copy is ordered on this stream; launches on it need no further care.
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        return cls(segments.to(device), ends.to(device), tiles, stream)

    def for_stream(self, stream: torch.cuda.Stream) -> None:
        """Keeps the memory from being used again before the stream is done with it."""
        # The allocator only knows the stream that a tensor was made on.
        if stream != self.made_on:
            self.segments.record_stream(stream)
            self.ends.record_stream(stream)


class OncePerPair(Generic[T]):
    """What is made once for a table and where its pass writes, kept as long as both are alive."""

    def __init__(self) -> None:
        # Weak on both sides: the entry goes with whichever table goes first.
        self._made: WeakKeyDictionary[ParamTable, WeakKeyDictionary[ParamTable, T]]
        self._made = WeakKeyDictionary()

    def get(self, table: ParamTable, out: ParamTable, make: Callable[[], T]) -> T:
        """Returns what ``make`` made, at the first call with this pair."""
        by_out = self._made.setdefault(table, WeakKeyDictionary())
        if out not in by_out:
            by_out[out] = make()
        return by_out[out]
