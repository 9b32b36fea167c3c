"""Bytes of logs: a reader that checks sizes before it takes anything, and frames that tell damage.

A frame is ``kind:u8 number:varint length:varint check:u16 body crc:u32``, little-endian. ``crc``
is the CRC-32 of kind, number, length and body, started from the CRC-32 of the log's id: a frame of
another log, or one that was moved to another place, does not pass. ``check`` is the low half of the
CRC of kind, number and length alone, so that a length is believed only after it was checked.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

# Kinds of frames: a change of the weights, a number that changed nothing, the end of a run.
ENTRY, SKIP, END = 1, 2, 3
MAX_BODY_BYTES = 1 << 26  # a larger length is a lie, refused before anybody allocates for it

U64 = struct.Struct("<Q")
CRC = struct.Struct("<I")
_CHECK = struct.Struct("<H")
_SEARCH = 8  # times the bytes behind a damage that a search for whole frames may read


class LogError(RuntimeError):
    """A log cannot be written, read or replayed; the message says why."""


class DamagedLogError(LogError):
    """Bytes were cut or changed."""


class Reader:
    """Takes values off the front of a buffer, which is only read; arrays are copies."""

    error: type[Exception] = LogError  # what is raised where the bytes are wrong

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

    def varint(self, what: str) -> int:
        """Takes an unsigned LEB128 number below 2**63, in its shortest form."""
        value = 0
        for shift in range(0, 63, 7):
            byte = self.raw(1, what)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                # A last byte of zero could be left out: one number, one form, so that a log's
                # bytes follow from its entries.
                if byte == 0 and shift:
                    break
                return value
        raise self.error(f"{what} is not a number")

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


class Frame(NamedTuple):
    """A frame that was checked."""

    kind: int  # ENTRY, SKIP or END
    number: int
    body: memoryview
    end: int  # offset of the first byte behind it


def varint(value: int) -> bytes:
    """Returns the bytes that ``Reader.varint`` takes: 7 bits a byte, low ones first."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def frame(kind: int, number: int, body: bytes, log_id: int) -> bytes:
    """Returns a frame."""
    if len(body) > MAX_BODY_BYTES:
        raise LogError(f"an entry of {len(body)} bytes; at most {MAX_BODY_BYTES} are allowed")
    # The number is written out: a reader that meets damage must tell whether what follows fits.
    head = bytes([kind]) + varint(number) + varint(len(body))
    crc = zlib.crc32(head, zlib.crc32(U64.pack(log_id)))
    # Not over the check as well: data that is followed by its own CRC leaves a constant, whatever
    # the data, and the last CRC would say nothing of the head.
    return head + _CHECK.pack(crc & 0xFFFF) + body + CRC.pack(zlib.crc32(body, crc))


def unframe(view: memoryview, at: int, log_id: int) -> Frame:
    """Returns the frame at an offset; DamagedLogError where there is no whole, unchanged one."""
    number, length, start, crc = _head(view, at, log_id)
    # The head has passed its check, so a length that reaches past the end means a torn tail.
    end = start + length + CRC.size
    if end > len(view):
        raise DamagedLogError(f"an entry says {length} bytes, {len(view) - start} are left")
    body = view[start : start + length]
    if CRC.unpack_from(view, end - CRC.size)[0] != zlib.crc32(body, crc):
        raise DamagedLogError("the CRC of an entry does not match")
    return Frame(view[at], number, body, end)


def frame_follows(view: memoryview, at: int, log_id: int) -> bool:
    """Returns whether a whole frame starts behind an offset; LogError for a forgery of many."""
    # The check of a head lets one offset in 65,536 of arbitrary bytes through, and few of these say
    # a large length. A file that was made to cost quadratic time is refused instead.
    budget = _SEARCH * (len(view) - at)
    for start in range(at + 1, len(view)):
        try:
            _, length, body, _ = _head(view, start, log_id)
            if body + length > len(view):
                continue
            budget -= length
            if budget < 0:
                raise LogError(f"offset {start}: these bytes are a log's neither whole nor torn")
            unframe(view, start, log_id)
            return True
        except DamagedLogError:
            continue
    return False


def _head(view: memoryview, at: int, log_id: int) -> tuple[int, int, int, int]:
    """Returns number, length, offset of the body, and the CRC of kind, number and length."""
    if at >= len(view) or view[at] not in (ENTRY, SKIP, END):
        raise DamagedLogError("an entry does not start with a known kind")
    reader = Reader(view[at + 1 :])
    reader.error = DamagedLogError  # what no CRC has passed yet is damage, not a lie
    number = reader.varint("the number of an entry")
    length = reader.varint("the length of an entry")
    middle = len(view) - reader.left
    (check,) = reader.unpack(_CHECK, "the check of an entry")
    crc = zlib.crc32(view[at:middle], zlib.crc32(U64.pack(log_id)))
    if check != crc & 0xFFFF or length > MAX_BODY_BYTES:
        raise DamagedLogError("the head of an entry does not match its check")
    return number, length, middle + _CHECK.size, crc
