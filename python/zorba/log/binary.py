"""Binary formats: a reader that checks sizes before it takes anything."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt


class FormatError(ValueError):
    """Bytes are not what their format says they must be."""


class Reader:
    """Takes values off the front of a buffer; every take is checked against what is left.

    Attributes:
        error: what is raised where the bytes are wrong; formats have their own.
    """

    error: type[Exception] = FormatError

    def __init__(self, view: memoryview) -> None:
        """``view`` is only read, and values are copied out of it."""
        self._view = view
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes that were not taken yet."""
        return len(self._view) - self._at

    def raw(self, count: int, what: str) -> memoryview:
        """Takes ``count`` bytes."""
        # Before a slice or an array is made: a length from outside must not decide what is taken.
        if count > self.left:
            raise self.error(f"{what} needs {count} bytes but {self.left} are left")
        self._at += count
        return self._view[self._at - count : self._at]

    def peek(self) -> memoryview:
        """Returns what is left without taking it."""
        return self._view[self._at :]

    def unpack(self, layout: struct.Struct, what: str) -> tuple[Any, ...]:
        """Takes the fields of ``layout``."""
        return layout.unpack(self.raw(layout.size, what))

    def array(self, dtype: str, count: int, what: str) -> npt.NDArray[Any]:
        """Takes ``count`` numbers of the little-endian ``dtype`` and returns a copy of them."""
        kind = np.dtype(dtype)
        return np.frombuffer(self.raw(count * kind.itemsize, what), dtype=kind).copy()

    def rest(self) -> memoryview:
        """Takes everything that is left."""
        return self.raw(self.left, "the rest")

    def end(self) -> None:
        """Raises unless everything was taken."""
        if self.left:
            raise self.error(f"{self.left} bytes follow the end")


def decode_choice(
    codes: Mapping[Any, int], code: int, what: str, error: type[Exception] = FormatError
) -> Any:
    """Returns the name of a code, or raises ``error`` for one that nobody gave."""
    for name, known in codes.items():
        if known == code:
            return name
    raise error(f"{what} has the unknown code {code}; known are {codes}")
