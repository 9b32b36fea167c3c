"""Binary formats: a reader that checks sizes before it takes anything."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

U64 = struct.Struct("<Q")


class Reader:
    """Takes values off the front of a buffer, which is only read; arrays are copies."""

    error: type[Exception]  # what is raised where the bytes are wrong; each format has its own

    def __init__(self, view: memoryview) -> None:
        self._view = view

    @property
    def left(self) -> int:
        """Bytes that were not taken yet."""
        return len(self._view)

    def raw(self, count: int, what: str) -> memoryview:
        """Takes ``count`` bytes."""
        # Before a slice or an array is made: a length from outside must not decide what is taken.
        if count > self.left:
            raise self.error(f"{what} needs {count} bytes but {self.left} are left")
        taken, self._view = self._view[:count], self._view[count:]
        return taken

    def unpack(self, layout: struct.Struct, what: str) -> tuple[Any, ...]:
        """Takes the fields of ``layout``."""
        return layout.unpack(self.raw(layout.size, what))

    def array(self, dtype: str, count: int, what: str) -> npt.NDArray[Any]:
        """Takes ``count`` numbers of the little-endian ``dtype``."""
        kind = np.dtype(dtype)
        return np.frombuffer(self.raw(count * kind.itemsize, what), dtype=kind).copy()

    def rest(self) -> memoryview:
        """Takes everything that is left."""
        return self.raw(self.left, "the rest")

    def end(self) -> None:
        """Raises unless everything was taken."""
        if self.left:
            raise self.error(f"{self.left} bytes follow the end")


def decode_choice(codes: Mapping[Any, int], code: int, what: str, error: type[Exception]) -> Any:
    """Returns the name of a code, or raises ``error`` for one that nobody gave."""
    for name, known in codes.items():
        if known == code:
            return name
    raise error(f"{what} has the unknown code {code}; known are {codes}")
