"""Frames: how an entry lies in a file or a message, so that a torn or changed one is recognised.

A frame is ``kind:u8 number:varint length:varint check:u16 body crc:u32``, little-endian. ``crc``
is the CRC-32 of kind, number, length and body, started from the CRC-32 of the log's id: a frame of
another log, or one that was moved to another place, does not pass. ``check`` is the low half of the
CRC of kind, number and length alone, so that a length is believed only after it was checked.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

from zorba.log.binary import Reader
from zorba.log.errors import DamagedLogError, LogError

# An entry of 2**20 terms with a column each fits many times over; a length above this is a lie, and
# is refused before anybody allocates for it.
MAX_BODY_BYTES = 1 << 26

ENTRY, SKIP, END = 1, 2, 3
"""Kinds of frames: a change of the weights, a number that changed nothing, the end of a run."""

_ID = struct.Struct("<Q")
_CHECK = struct.Struct("<H")
_CRC = struct.Struct("<I")
_MAX_HEAD_BYTES = 1 + 9 + 9 + _CHECK.size
_SEARCH = 8  # times the bytes behind a damage that a search for whole frames may read


class BodyReader(Reader):
    """Takes values off the front of a body."""

    error = LogError

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


class Frame(NamedTuple):
    """A frame that was checked.

    Attributes:
        kind: ``ENTRY``, ``SKIP`` or ``END``.
        number: of the step or round.
        body: a view of its bytes.
        end: offset of the first byte behind it.
    """

    kind: int
    number: int
    body: memoryview
    end: int


def varint(value: int) -> bytes:
    """Returns the bytes that ``BodyReader.varint`` takes: 7 bits a byte, low ones first."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def salt_of(log_id: int) -> int:
    """Returns the CRC from which those of a log's frames are continued."""
    return zlib.crc32(_ID.pack(log_id))


def frame(kind: int, number: int, body: bytes, salt: int) -> bytes:
    """Returns a frame."""
    if len(body) > MAX_BODY_BYTES:
        raise LogError(f"an entry of {len(body)} bytes; at most {MAX_BODY_BYTES} are allowed")
    # The number is written out: a reader that meets damage must tell whether what follows fits.
    head = bytes([kind]) + varint(number) + varint(len(body))
    crc = zlib.crc32(head, salt)
    # Not over the check as well: data that is followed by its own CRC leaves a constant, whatever
    # the data, and the last CRC would say nothing of the head.
    return head + _CHECK.pack(crc & 0xFFFF) + body + _CRC.pack(zlib.crc32(body, crc))


def unframe(view: memoryview, at: int, salt: int) -> Frame:
    """Checks the frame at an offset and returns it.

    Raises:
        DamagedLogError: there is no whole, unchanged frame.
    """
    number, length, start, crc = _head(view, at, salt)
    # The head has passed its check, so a length that reaches past the end means a torn tail.
    end = start + length + _CRC.size
    if end > len(view):
        raise DamagedLogError(f"an entry says {length} bytes, {len(view) - start} are left")
    body = view[start : start + length]
    if _CRC.unpack_from(view, end - _CRC.size)[0] != zlib.crc32(body, crc):
        raise DamagedLogError("the CRC of an entry does not match")
    return Frame(view[at], number, body, end)


def frame_follows(view: memoryview, at: int, salt: int) -> bool:
    """Returns whether a whole frame starts anywhere behind an offset.

    Raises:
        LogError: so much of what follows looks like frames that nothing but a forgery explains it.
    """
    # The check of a head lets one offset in 65,536 of arbitrary bytes through, and few of these say
    # a large length. A file that was made to cost quadratic time is refused instead.
    budget = _SEARCH * (len(view) - at)
    for start in range(at + 1, len(view)):
        try:
            _, length, body, _ = _head(view, start, salt)
            if body + length > len(view):
                continue
            budget -= length
            if budget < 0:
                raise LogError(f"offset {start}: these bytes are a log's neither whole nor torn")
            unframe(view, start, salt)
            return True
        except DamagedLogError:
            continue
    return False


def _head(view: memoryview, at: int, salt: int) -> tuple[int, int, int, int]:
    """Returns number, length, offset of the body, and the CRC of kind, number and length."""
    if at >= len(view) or view[at] not in (ENTRY, SKIP, END):
        raise DamagedLogError("an entry does not start with a known kind")
    # A slice of the longest head: a varint that never ends stops there, not at the end of the file.
    reader = BodyReader(view[at : at + _MAX_HEAD_BYTES])
    before = reader.left
    try:
        reader.raw(1, "the kind of an entry")
        number = reader.varint("the number of an entry")
        length = reader.varint("the length of an entry")
        middle = at + before - reader.left
        (check,) = reader.unpack(_CHECK, "the check of an entry")
    except LogError as error:
        raise DamagedLogError(str(error)) from None
    crc = zlib.crc32(view[at:middle], salt)
    if check != crc & 0xFFFF or length > MAX_BODY_BYTES:
        raise DamagedLogError("the head of an entry does not match its check")
    return number, length, middle + _CHECK.size, crc
